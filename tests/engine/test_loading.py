"""What runs where: KV types, LoRA adapters, huge pages, and the line that says it."""

import logging
import mmap
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.engine import loader
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.llama import ModelLoadError
from edge_phi3.llama.context import Context
from edge_phi3.llama.huge_pages import use_huge_pages
from edge_phi3.llama.model import Model
from edge_phi3.llama.options import Lora
from tests.golden.attention import FIRST_TOKEN, LAST_TOKEN
from tests.golden.checkpoints import write_checkpoint
from tests.support.cases import cases
from tests.support.engines import MakeModel, ask, running_engine
from tests.support.models import RANK, split, write_adapter

PROMPT = np.random.default_rng(5).integers(FIRST_TOKEN, LAST_TOKEN, 30, dtype=np.int32)
OPTIONS: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": []}


@pytest.mark.parametrize("kv_cache_type", ["f16", "q8_0"])
@pytest.mark.parametrize("flash_attn", ["auto", "on"])
def test_smaller_kv_types_serve(tmp_path: Path, kv_cache_type: str, flash_attn: str) -> None:
    write_checkpoint(tmp_path, hidden_size=64, heads=2)
    model = convert(tmp_path, tmp_path / "wide-heads.gguf", outtype="f32").path
    with running_engine(model, kv_cache_type=kv_cache_type, flash_attn=flash_attn) as engine:
        assert len(ask(engine, PROMPT, **OPTIONS)[0]) == 16


@cases
def test_what_does_not_fit_the_model_is_told(make_model: MakeModel, options: dict[str, Any], sentence: str) -> None:
    options = options | {"lora": [Lora(Path(name)) for name in options.get("lora", ())]}
    with pytest.raises(ModelLoadError, match=sentence), running_engine(make_model("4k"), **options):
        pass


def test_f16_cells_begin_like_f32_ones(make_model: MakeModel) -> None:
    with running_engine(make_model("4k")) as engine:
        exact = ask(engine, PROMPT, **OPTIONS)[0]
    with running_engine(make_model("4k"), kv_cache_type="f16") as engine:
        assert ask(engine, PROMPT, **OPTIONS)[0][:4] == exact[:4]


def test_start_is_told_in_one_line(make_model: MakeModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "edge_phi3.engine.loader"), running_engine(make_model("4k"), ctx_size=1024):
        pass
    (line,) = [record.getMessage() for record in caplog.records if record.name == "edge_phi3.engine.loader"]
    for part in ("4k.gguf", "F32", "2 threads", "1024 cells", "f32", "16 sequences"):
        assert part in line


@pytest.mark.parametrize(("wanted", "there"), [(-1, 3), (2, 2), (9, 3)])
def test_layers_are_counted_where_there_is_a_gpu(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, wanted: int, there: int
) -> None:
    monkeypatch.setattr(loader, "supports_gpu_offload", lambda: True)
    with running_engine(make_model("4k"), n_gpu_layers=wanted, require_gpu=True) as engine:
        assert (engine.stats().gpu_layers, engine.stats().cpu_layers) == (there, 3 - there)


def test_a_context_that_cannot_be_made_leaves_nothing(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first context of two is freed before the weights that it points to."""
    freed: list[str] = []

    def noted(owner: type[Context | Model]) -> None:
        close = owner.close

        def note(self: Any) -> None:
            freed.append(owner.__name__)
            close(self)

        monkeypatch.setattr(owner, "close", note)

    class Second(Context):
        def __init__(self, model: Model, **options: Any) -> None:
            if options["cells"] == 8192:
                raise ModelLoadError("llama.cpp cannot make a context of 8192 KV cells.")
            super().__init__(model, **options)

    monkeypatch.setattr(loader, "Context", Second)
    noted(Second)
    noted(Model)
    with pytest.raises(ModelLoadError, match="8192 KV cells"):
        loader.load(EngineSettings(make_model("128k")))
    assert freed == ["Second", "Model"]


@pytest.mark.parametrize("ctx_size", [0, 512, 4096, 4097, 8192])
def test_two_sets_of_rotary_factors_take_all_sequences_in_both_contexts(make_model: MakeModel, ctx_size: int) -> None:
    with running_engine(make_model("128k"), ctx_size=ctx_size) as engine:
        cells = {0: [4096, 8192], 512: [512], 4096: [4096], 4097: [4096, 4352], 8192: [4096, 8192]}[ctx_size]
        assert [runner.kv.cells for runner in engine.model.runners] == cells
        assert all(runner.context.sequences == 16 for runner in engine.model.runners)
        beams = ask(engine, PROMPT, num_beams=8, num_return_sequences=8, **OPTIONS)
        assert len(beams) == 8


def test_a_lora_adapter_equals_merged_weights(make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model("4k")
    random = np.random.default_rng(3)
    name = "blk.1.attn_output.weight"
    down, up = (random.standard_normal(shape).astype(np.float32) for shape in ((RANK, 64), (64, RANK)))
    adapter = write_adapter(tmp_path / "adapter.gguf", {name: (down, up)})
    merged = Path(shutil.copy(base, tmp_path / "merged.gguf"))
    weight = next(tensor for tensor in gguf.GGUFReader(merged, "r+").tensors if tensor.name == name).data
    weight[:] += 0.5 * (up @ down)
    del weight
    with running_engine(base) as engine:
        plain = ask(engine, PROMPT, **OPTIONS)
    with running_engine(merged) as engine:
        expected = ask(engine, PROMPT, **OPTIONS)
    with running_engine(base, lora=(Lora(adapter, 0.5),)) as engine:
        assert ask(engine, PROMPT, **OPTIONS) == expected != plain
    with running_engine(base, lora=(Lora(adapter, 0.0),)) as engine:
        assert ask(engine, PROMPT, **OPTIONS) == plain


def test_a_split_model_is_loaded_whole(make_model: MakeModel, tmp_path: Path) -> None:
    first, *_, last = split(make_model("4k"), tmp_path)
    with running_engine(make_model("4k")) as engine:
        expected = ask(engine, PROMPT, **OPTIONS)
    with running_engine(first) as engine:
        assert ask(engine, PROMPT, **OPTIONS) == expected
    last.unlink()
    with pytest.raises(ModelLoadError, match=rf"{last} cannot be read: No such file"), running_engine(first):
        pass


def test_large_memory_is_moved_and_stays_what_it_is_and_what_nobody_has_written_is_not_taken() -> None:
    memory = np.frombuffer(mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint32)
    half = memory[: len(memory) // 2]
    half[:] = np.arange(len(half), dtype=np.uint32)
    unwritten = mmap.mmap(-1, 256 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    before = psutil.Process().memory_info().rss
    moved = use_huge_pages()
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert moved % (2 << 20) == 0, "how many huge pages there are is the kernel's affair"
    assert np.array_equal(half, np.arange(len(half), dtype=np.uint32))
    assert not memory[len(half) :].any()
    unwritten.close()
