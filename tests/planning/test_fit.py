"""What is planned: beside what llama.cpp allocates when an engine loads the model, and when memory is short."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES
from edge_phi3.conversion.quantize import quantize
from edge_phi3.llama.memory import ContextMemory, context_memory
from edge_phi3.planning.fit import Machine, Options, Row, fit
from edge_phi3.planning.gguf_layout import Layout, host_pattern, place, read_layout, write_blank_imatrix
from edge_phi3.planning.source import find_base
from edge_phi3.progress import SilentProgress
from tests.golden.checkpoints import longrope, write_checkpoint
from tests.planning.buffers import MIB, Places, check, loaded, planned
from tests.support.cases import tables

GIB = 1 << 30
CPU = Machine(gpu=False, name="a machine", free=64 * GIB, reserve=0)

# Zeros take as much memory as other weights, and no time to quantise.
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "heads": 4, "layers": 3, "gain": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "4k": {},
    "grouped": {"kv_heads": 2},
    "tied": {"config": {"tie_word_embeddings": True}},
    "128k": {"max_position_embeddings": 131072, "rope_scaling": longrope(64), "sliding_window": None},
}

TYPES = "F32 F16 Q8_0 Q6_K Q4_K_M Q4_0 IQ4_NL Q2_K Q2_K_S"
FEW_TYPES = ("F16", "Q4_K_M", "Q4_0")

GRID: dict[str, dict[str, Any]] = tables(__file__)["GRID"]


@dataclasses.dataclass(frozen=True)
class Made:
    """The models in a folder, each made once."""

    folder: Path

    def checkpoint(self, name: str) -> Path:
        path = self.folder / name
        return path if path.exists() else write_checkpoint(path, **(SHAPE | MODELS[name]))

    def gguf(self, name: str, kind: str) -> Path:
        path = self.folder / f"{name}-{kind}.gguf"
        if path.exists():
            return path
        if kind in {"F32", "F16"}:
            return convert(self.checkpoint(name), path, outtype=kind.lower()).path
        source = self.gguf(name, "F16")
        matrix = write_blank_imatrix(self.folder / "imatrix.gguf", read_layout(source))
        needed = QUANTIZATION_TYPES[kind].needs_imatrix
        return quantize(source, path, type=kind, imatrix=matrix if needed else None).path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("models"))


def plans_of(base: Layout, types: Sequence[str], **options: Any) -> dict[str, Places]:
    """Plan each type of a model."""
    return {row.type: planned(row) for row in fit(base, Options(**options), CPU, types).rows}


def skeleton(model: str | Path, folder: Path) -> Layout:
    return find_base(str(model), folder, store=None, progress=SilentProgress())


@pytest.mark.parametrize("case", GRID)
@pytest.mark.parametrize("model", ["4k", "128k"])
def test_contexts_and_parallelism(made: Made, model: str, case: str) -> None:
    path = made.gguf(model, "Q4_K_M")
    ((name, plan),) = plans_of(read_layout(path), (), **GRID[case]).items()
    assert name == path.stem
    check(plan, loaded(path, **GRID[case]).places())


@pytest.mark.parametrize("model", MODELS)
def test_types(made: Made, tmp_path: Path, model: str) -> None:
    options = {"ctx_size": 8192, "parallel": 2} if model == "128k" else {"ctx_size": 512}
    plans = plans_of(skeleton(made.checkpoint(model), tmp_path), () if model == "4k" else FEW_TYPES, **options)
    if model == "4k":
        assert plans.keys() == {type_.name for type_ in QUANTIZATION_TYPES.values() if not type_.special}
    for name in TYPES.split() if model == "4k" else FEW_TYPES:
        check(plans[name], loaded(made.gguf(model, name), **options).places())
    for kind in ("F32", "F16") if model == "128k" else ():
        assert plans_of(read_layout(made.gguf(model, kind)), FEW_TYPES, **options) == plans, "as its checkpoint"


CONTEXT = ContextMemory(4096, 320 * MIB, {"CUDA0": 70 * MIB, "CUDA_Host": 9 * MIB}, 30 * MIB)


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return skeleton("phi-3-mini-4k-instruct", tmp_path_factory.mktemp("mini"))


def gpu(free: int, main_memory: int | None = None) -> Machine:
    return Machine(gpu=True, name="a GPU", free=free, reserve=0, main_memory=main_memory)


def row_of(layout: Layout, options: Options, machine: Machine) -> Row:
    (row,) = fit(layout, options, machine, ["Q8_0"]).rows
    return row


def test_a_gpu_that_was_not_asked_is_thought_to_take_all_compute_buffers(mini: Layout) -> None:
    # 3,821,079,552 weights, of which 199,680 of the norms are F32.
    assert sum(tensor.size for tensor in mini.tensors) == 2 * (3_821_079_552 - 199_680) + 4 * 199_680
    for offloaded, asked, compute in ((33, True, 70), (33, False, 79), (0, False, 0)):
        placement = place(mini, [CONTEXT], set(), offloaded=offloaded, gpu_asked=asked)
        assert (placement.device.compute, not asked or placement.host.compute == 9 * MIB) == (compute * MIB, True)
    # The pattern names the tensors that stay.
    assert host_pattern(mini, 0) == ".*"
    assert host_pattern(mini, 33) == r"^token_embd\."
    assert host_pattern(mini, 31) == r"^token_embd\.|^blk\.(0|1)\."


def test_less_memory_means_fewer_bits_then_fewer_layers_then_nothing(mini: Layout) -> None:
    options = Options(ctx_size=2048)
    types = ("Q8_0", "Q4_K_M", "Q2_K")
    large, middle, small, none = (fit(mini, options, gpu(eighths * GIB // 8), types) for eighths in (44, 28, 18, 1))
    best = [found.best and found.best.type for found in (large, middle, small, none)]
    assert best == ["Q8_0", "Q4_K_M", "Q2_K", None]
    assert [row.placement.layers for row in large.rows] == [33, 33, 33]
    assert not any(row.fits for row in none.rows)
    for found in (middle, small):
        assert all(row.fits and row.placement.device.total <= found.machine.budget for row in found.rows)
    # As many layers as fit, and not one more.
    layers = small.rows[0].placement.layers or 0
    assert 0 < layers < 33
    assert not row_of(mini, Options(ctx_size=2048, n_gpu_layers=layers + 1), small.machine).fits
    # When no type fits whole, the default one is recommended with the layers that fit.
    partly = fit(mini, options, gpu(GIB), types).best
    assert partly
    assert partly.type == "Q4_K_M"


def test_what_stays_beside_the_gpu_needs_room_too_and_the_reserve_is_left_free(mini: Layout) -> None:
    for free, fits in ((1, False), (8, True)):
        row = row_of(mini, Options(n_gpu_layers=10), gpu(free * GIB))
        assert (row.placement.layers, row.fits) == (10, fits), "what is asked for is planned"
    row = row_of(mini, Options(), gpu(3 * GIB, main_memory=GIB // 4))
    assert 0 < (row.placement.layers or 0) < 33
    assert not row.fits
    total = row_of(mini, Options(ctx_size=512), CPU).placement.host.total
    for reserve in (0, 1):
        exact = dataclasses.replace(CPU, free=total, reserve=reserve)
        assert row_of(mini, Options(ctx_size=512), exact).fits is (reserve == 0)


def test_of_contexts_for_several_batches_the_largest_buffers_count() -> None:
    # llama.cpp's words on a CUDA build, planning a context for batches of 64 tokens and of 17: the second needs more
    # beside the GPU, which is handed large batches of any layer.
    cells = "4096 cells,   3 layers, 17/1 seqs"
    both = [
        "llama_context:  CUDA_Host  output buffer size =     0.04 MiB",
        f"llama_kv_cache: size =   24.00 MiB (  {cells}), K (f32):   12.00 MiB, V (f32):   12.00 MiB",
    ]
    first, second = (
        [f"sched_reserve:  {name} compute buffer size =     {size} MiB" for name, size in sizes.items()]
        for sizes in ({"CUDA0": 10.88, "CUDA_Host": 0.86}, {"CUDA0": 4.18, "CUDA_Host": 4.20})
    )
    found = context_memory([*both, *first, *both, *second])
    assert (found.cells, found.kv) == (4096, 24 * MIB)
    assert found.compute == {"CUDA0": round(10.88 * MIB), "CUDA_Host": round(4.20 * MIB)}
    assert found.output == round(0.04 * MIB)
