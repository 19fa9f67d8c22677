"""Which quantisations of a model fit a machine's memory, with how much context, and how to serve the best of them."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES, quantization_type
from edge_phi3.conversion.quantize import predict_sizes
from edge_phi3.engine.engine_settings import EngineSettings, context_shapes
from edge_phi3.llama import PlanningError
from edge_phi3.llama.memory import ContextMemory, Job, plan_memory
from edge_phi3.llama.options import ContextOptions, FlashAttention, KVCacheType
from edge_phi3.planning.gguf_layout import Layout, Placement, host_pattern, place, write_blank_imatrix, write_skeleton

BEST_FIRST = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K", "IQ2_M", "IQ2_XS", "IQ1_M")
"""What is recommended: the first that fits. What the advice of the other types says speaks against them."""

PARTLY = "Q4_K_M"
"""What is recommended when only some layers fit the GPU."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is to be served, in the words of `Settings`."""

    ctx_size: int = 0
    parallel: int = 16
    batch_size: int = 512
    kv_cache_type: KVCacheType = "f16"
    flash_attn: FlashAttention = "auto"
    n_gpu_layers: int = -1


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it is to be served: with so many bytes free, of the GPU or of main memory, some kept in reserve.

    `main_memory` are the bytes beside the GPU's, None when they are not known or the same; `visible` is the GPU to ask,
    as in CUDA_VISIBLE_DEVICES, None when that is left as it is.
    """

    gpu: bool
    name: str
    free: int
    reserve: int
    main_memory: int | None = None
    visible: str | None = None

    @property
    def budget(self) -> int:
        """Bytes that the model may take."""
        return max(0, self.free - self.reserve)


class Row(NamedTuple):
    """One quantisation, with as many layers on the GPU as requested or fit; `made` is whether the model is that one."""

    type: str
    bits_per_weight: float
    needs_imatrix: bool
    placement: Placement
    fits: bool
    made: bool


class Fit(NamedTuple):
    """The answer: each quantisation, from large to small, and the recommended one, None when nothing fits.

    `layers` counts blocks, and one for the output; `cells` are the KV cells of each context; compute buffers are those
    of a CPU's llama.cpp unless `gpu_asked`.
    """

    options: Options
    machine: Machine
    layers: int
    cells: tuple[int, ...]
    gpu_asked: bool
    rows: tuple[Row, ...]
    best: Row | None


class _Candidate(NamedTuple):
    type: str
    needs_imatrix: bool
    layout: Layout


def fit(base: Layout, options: Options, machine: Machine, types: Sequence[str] = ()) -> Fit:
    """Plan quantisations of a model, real or a skeleton: to all types for Phi-3, or as it is when it is quantised.

    Raises:
        PlanningError: llama.cpp cannot plan the model with these options; types are given for a quantised file.
        UnknownQuantizationError, QuantizeError: a type that llama.cpp does not have, or a model that it cannot read.
    """
    with tempfile.TemporaryDirectory(prefix="edge-phi3-fit-") as folder:
        candidates = _candidates(base, types, Path(folder))
        planner = _Planner(base, options, machine)
        placed = planner.plan(candidates)
    rows, layers = [], base.layers + 1
    types_of_base = {(tensor.name, tensor.type) for tensor in base.tensors}
    for candidate, placement in zip(candidates, placed, strict=True):
        made = {(tensor.name, tensor.type) for tensor in candidate.layout.tensors} == types_of_base
        figures = candidate.layout.bits_per_weight, candidate.needs_imatrix, placement, planner.fits(placement)
        rows.append(Row(candidate.type, *figures, made))
    return Fit(options, machine, layers, planner.cells, planner.gpu_asked, tuple(rows), _best(rows, layers))


def _candidates(base: Layout, types: Sequence[str], folder: Path) -> list[_Candidate]:
    if base.quantised and types:
        raise PlanningError(f"{base.path} is quantised already and is planned as it is; leave out --quant.")
    if base.quantised:
        return [_Candidate(base.path.stem, False, base)]
    names = [quantization_type(name).name for name in types]
    names = names or [type_.name for type_ in QUANTIZATION_TYPES.values() if not type_.special]
    plans = {
        plan.type.name: plan for plan in predict_sizes(base.path, sorted(names, key=list(QUANTIZATION_TYPES).index))
    }
    # With a matrix some of these recipes give other types to some tensors.
    guided = [name for name, plan in plans.items() if plan.needs_imatrix]
    if guided:
        matrix = write_blank_imatrix(folder / "imatrix.gguf", base)
        plans |= {plan.type.name: plan for plan in predict_sizes(base.path, guided, imatrix=matrix)}
    return [
        _Candidate(name, name in guided, write_skeleton(folder / f"{name}.gguf", base, plan))
        for name, plan in plans.items()
    ]


class _Planner:
    """Asks llama.cpp, and where a model does not fit the GPU asks again with fewer layers there."""

    def __init__(self, base: Layout, options: Options, machine: Machine) -> None:
        self._options, self._machine, self._all = options, machine, base.layers + 1
        self._context_options = ContextOptions(
            batch_size=options.batch_size,
            parallel=options.parallel,
            kv_cache_type=options.kv_cache_type,
            flash_attn=options.flash_attn,
        )
        length = base.hyper_parameter("context_length")
        original = base.hyper_parameter("rope.scaling.original_context_length")
        settings = EngineSettings(
            base.path, ctx_size=options.ctx_size, parallel=options.parallel, batch_size=options.batch_size
        )
        shapes = context_shapes(settings, length, original if 0 < original < length else None, gpu=machine.gpu)
        self._contexts = [(shape.cells, shape.sequences) for shape in shapes]
        self.gpu_asked = False
        self.cells: tuple[int, ...] = ()

    def plan(self, candidates: Sequence[_Candidate]) -> list[Placement]:
        wanted = self._options.n_gpu_layers
        layers = self._all if wanted < 0 else min(wanted, self._all)
        counts: list[int | None] = [layers if self._machine.gpu else None] * len(candidates)
        found = self._ask(candidates, counts)
        while wanted < 0 and (missing := [i for i, place in enumerate(found) if self._too_large(place)]):
            fewer = [self._fewer(candidates[i], found[i]) for i in missing]
            for i, placement in zip(missing, self._ask([candidates[i] for i in missing], fewer), strict=True):
                found[i] = placement
        return found

    def fits(self, placement: Placement) -> bool:
        """Whether all is within the budget, and the GPU, where there is one, has something to do."""
        machine = self._machine
        if placement.layers is None:
            return placement.host.total <= machine.budget
        within = machine.main_memory is None or placement.host.total <= machine.main_memory
        chosen = self._options.n_gpu_layers >= 0 or placement.layers > 0
        return placement.device.total <= machine.budget and within and chosen

    def _too_large(self, placement: Placement) -> bool:
        return bool(placement.layers) and placement.device.total > self._machine.budget

    def _fewer(self, candidate: _Candidate, placement: Placement) -> int:
        """Return the number of layers that would fit if the compute buffers stayed as they are, one fewer at least."""
        assert placement.layers is not None
        device = placement.device
        # The cache of one block, whichever is counted, from what all take together.
        contexts = [ContextMemory(0, device.kv_cache + placement.host.kv_cache, {}, 0)]
        for count in range(placement.layers - 1, 0, -1):
            planned = place(candidate.layout, contexts, set(), offloaded=count, gpu_asked=True)
            if planned.device.total + device.compute <= self._machine.budget:
                return count
        return 0

    def _ask(self, candidates: Sequence[_Candidate], counts: Sequence[int | None]) -> list[Placement]:
        jobs = [
            Job(layout.path, count or 0, host_pattern(layout, count or 0), self._contexts, self._context_options)
            for layout, count in zip((candidate.layout for candidate in candidates), counts, strict=True)
        ]
        ready, answers = plan_memory(jobs, gpu=self._machine.visible if self._machine.gpu else "")
        self.gpu_asked = self._machine.gpu and ready.gpu_offload
        shared = answers[0].contexts
        self.cells = tuple(memory.cells for memory in shared)
        return [
            place(
                candidate.layout,
                answer.contexts or shared,
                # A CPU without a GPU beside it repacks weights, with one it does not.
                answer.buffers if self.gpu_asked or not self._machine.gpu else set(),
                offloaded=count,
                gpu_asked=self.gpu_asked,
            )
            for candidate, answer, count in zip(candidates, answers, counts, strict=True)
        ]


def _best(rows: Sequence[Row], layers: int) -> Row | None:
    fitting = {row.type: row for row in rows if row.fits}
    if len(rows) == 1:
        return next(iter(fitting.values()), None)
    whole = {name: row for name, row in fitting.items() if row.placement.layers in {None, layers}}
    order = [*BEST_FIRST, *whole]
    ready = next((whole[name] for name in order if name in whole and not whole[name].needs_imatrix), None)
    partly = fitting.get(PARTLY)
    guided = next((whole[name] for name in order if name in whole), None)
    return ready or partly or guided or next(iter(fitting.values()), None)
