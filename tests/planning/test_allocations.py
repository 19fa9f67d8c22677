"""Planned memory against what llama.cpp allocates when an engine really loads the model, as its own log tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.imatrix import make_imatrix
from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES
from edge_phi3.conversion.quantize import quantize
from edge_phi3.planning.fit import Machine, Options, fit
from edge_phi3.planning.gguf_layout import Layout, read_layout
from edge_phi3.planning.source import find_base
from edge_phi3.progress import SilentProgress
from tests.golden.checkpoints import longrope, write_checkpoint
from tests.planning.buffers import Places, check, loaded, planned

MACHINE = Machine(gpu=False, name="a machine", free=64 << 30, reserve=0)

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "heads": 4, "layers": 3}
MODELS: dict[str, dict[str, Any]] = {
    "4k": {},
    "grouped": {"kv_heads": 2},
    "tied": {"config": {"tie_word_embeddings": True}},
    "128k": {"max_position_embeddings": 131072, "rope_scaling": longrope(64), "sliding_window": None},
}

TYPES = "F32 F16 Q8_0 Q6_K Q5_K_M Q4_K_M Q4_0 IQ4_NL IQ4_XS Q3_K_M Q2_K IQ3_XXS IQ2_XS"
FEW_TYPES = ("F16", "Q4_K_M", "Q4_0")

GRID: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one sequence": {"parallel": 1, "ctx_size": 256},
    "large": {"parallel": 64, "ctx_size": 16384},
    "odd context": {"parallel": 3, "ctx_size": 5000},
    "f32": {"kv_cache_type": "f32", "ctx_size": 2048},
    "q8_0": {"kv_cache_type": "q8_0", "ctx_size": 8192},
    "small batch": {"batch_size": 64, "ctx_size": 4096},
    "large batch": {"batch_size": 2048, "ctx_size": 8192},
    "no flash attention": {"flash_attn": "off", "ctx_size": 4096},
    "flash attention": {"flash_attn": "on", "kv_cache_type": "f32", "ctx_size": 4096},
}


@dataclass(frozen=True)
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
        matrix = self.folder / f"{name}-imatrix.gguf" if QUANTIZATION_TYPES[kind].needs_imatrix else None
        if matrix and not matrix.exists():
            make_imatrix(self.gguf(name, "F16"), matrix, chunks=2)
        return quantize(self.gguf(name, "F16"), path, type=kind, imatrix=matrix).path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("models"))


def plans_of(base: Layout, types: Sequence[str], **options: Any) -> dict[str, Places]:
    """Plan each type of a model."""
    return {row.type: planned(row) for row in fit(base, Options(**options), MACHINE, types).rows}


def skeleton(checkpoint: Path, folder: Path) -> Layout:
    return find_base(str(checkpoint), folder, store=None, progress=SilentProgress())


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


def test_a_file_is_planned_as_its_checkpoint(made: Made, tmp_path: Path) -> None:
    expected = plans_of(skeleton(made.checkpoint("128k"), tmp_path), FEW_TYPES)
    for kind in ("F32", "F16"):
        assert plans_of(read_layout(made.gguf("128k", kind)), FEW_TYPES) == expected


def test_two_contexts_are_counted_for_a_model_with_two_sets_of_rotary_factors(made: Made, tmp_path: Path) -> None:
    base = skeleton(made.checkpoint("128k"), tmp_path)
    assert fit(base, Options(ctx_size=4096), MACHINE, ["F16"]).cells == (4096,)
    both = fit(base, Options(ctx_size=16384, parallel=3), MACHINE, ["F16"])
    # Half as many cells for short sequences, which take at least one and at most three of the original context.
    assert both.cells == (8192, 16384)
    cell = 2 * 3 * 256 * 2
    assert both.rows[0].placement.host.kv_cache == pytest.approx((8192 + 16384) * cell, rel=0.001)
