"""What runs where: KV types, LoRA adapters, names from elsewhere, and the line that says it."""

import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.engine import loader
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama import ModelLoadError
from edge_phi3.llama.context import Context
from edge_phi3.llama.model import Model
from edge_phi3.llama.options import Lora
from tests.engine.conftest import MakeModel, ask, running_engine
from tests.golden.attention import FIRST_TOKEN, LAST_TOKEN, write_model
from tests.golden.checkpoints import write_checkpoint
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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv_cache_type": "q8_0"}, r"4096 KV cells of type q8_0 \(.*block size 32.*\)"),
        ({"require_gpu": True}, r"--require-gpu asks for a GPU, but llama\.cpp finds none.*runtimeClassName"),
        ({"require_gpu": True, "n_gpu_layers": 0}, r"--n-gpu-layers 0 puts no layer there"),
        ({"lora": (Lora(Path("absent.gguf")),)}, r"absent\.gguf is not a LoRA adapter .* for 4k\.gguf"),
    ],
)
def test_what_does_not_fit_the_model_is_told(make_model: MakeModel, options: dict[str, Any], sentence: str) -> None:
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


def test_a_lora_adapter_equals_merged_weights(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    write_model(folder, "4k")
    base = convert(folder, tmp_path / "base.gguf", outtype="f32").path
    random = np.random.default_rng(3)
    name = "blk.1.attn_output.weight"
    down, up = (random.standard_normal(shape).astype(np.float32) for shape in ((RANK, 64), (64, RANK)))
    adapter = tmp_path / "adapter.gguf"
    write_adapter(adapter, {name: (down, up)})
    merged = tmp_path / "merged.gguf"
    merged.write_bytes(base.read_bytes())
    weight = next(tensor for tensor in gguf.GGUFReader(merged, "r+").tensors if tensor.name == name).data
    weight[:] += 0.5 * (up @ down)
    weight.base.flush() if hasattr(weight.base, "flush") else None
    del weight

    with running_engine(base) as engine:
        plain = ask(engine, PROMPT, **OPTIONS)
    with running_engine(merged) as engine:
        expected = ask(engine, PROMPT, **OPTIONS)
    with running_engine(base, lora=(Lora(adapter, 0.5),)) as engine:
        assert ask(engine, PROMPT, **OPTIONS) == expected != plain
    with running_engine(base, lora=(Lora(adapter, 0.0),)) as engine:
        assert ask(engine, PROMPT, **OPTIONS) == plain


def test_a_model_from_elsewhere_keeps_the_tokenizer_rules(make_model: MakeModel, tmp_path: Path) -> None:
    """Neither the name that llama.cpp's rules go by nor our description of the added tokens is there."""
    foreign = tmp_path / "foreign.gguf"
    data = make_model("4k").read_bytes()
    for key in (b"general.name", b"edge_phi3.tokenizer.added_tokens", b"edge_phi3.generation.config"):
        assert data.count(key) == 1
        data = data.replace(key, b"x" * len(key))
    foreign.write_bytes(data)
    ours, theirs = Model(make_model("4k")), Model(foreign)
    tokens = [
        Tokenizer(model).encode("<|user|>\n\u00a0Hi </s> <|end|>\n<|endoftext|> <|assistant|>\n")
        for model in (ours, theirs)
    ]
    assert tokens[0].tolist() == tokens[1].tolist()
    assert Tokenizer(ours).special_ids == Tokenizer(theirs).special_ids
    for model in (ours, theirs):
        model.close()
    with running_engine(make_model("4k")) as mine, running_engine(foreign) as other:
        assert mine.model.defaults.eos_token_ids == other.model.defaults.eos_token_ids


def test_a_split_model_is_loaded_whole(make_model: MakeModel, tmp_path: Path) -> None:
    first, *_, last = split(make_model("4k"), tmp_path)
    with running_engine(make_model("4k")) as engine:
        expected = ask(engine, PROMPT, **OPTIONS)
    with running_engine(first) as engine:
        assert ask(engine, PROMPT, **OPTIONS) == expected
    last.unlink()
    with pytest.raises(ModelLoadError, match=rf"{last} cannot be read: No such file"), running_engine(first):
        pass
