"""Checkpoints as people have them: saved by other libraries, wrapped, split, with files that are stale, or no model."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_phi3.conversion import ConversionError
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.metadata import EOS_TOKEN_IDS_KEY, GENERATION_CONFIG_KEY, PAD_TOKEN_ID_KEY
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.planning.source import find_base
from edge_phi3.progress import SilentProgress
from tests.conversion import edits
from tests.conversion.conftest import edit, fields_of, tensors_of
from tests.golden.checkpoints import longrope
from tests.support.cases import cases
from tests.support.engines import ask, running_engine


@pytest.fixture(scope="module")
def expected(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return convert(pristine, tmp_path_factory.mktemp("expected") / "out.gguf").path.read_bytes()


@cases
def test_it_is_the_same_model(
    *,
    what: str,
    changes: list[Any],
    note: str | None,
    checkpoint: Path,
    expected: bytes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    edits.apply(checkpoint, *changes)
    found = convert(checkpoint, tmp_path / "out.gguf").path
    assert found.read_bytes() == expected, what
    assert (caplog.messages == []) == (note is None), caplog.messages
    assert note is None or any(re.search(note, message) for message in caplog.messages)


@cases
def test_what_is_refused_is_named(
    checkpoint: Path, tmp_path: Path, *, what: str, changes: list[Any], error: str, sentence: str
) -> None:
    edits.apply(checkpoint, *changes)
    output = tmp_path / "output" / "out.gguf"
    with pytest.raises(ConversionError, match=sentence) as caught:
        convert(checkpoint, output)
    assert type(caught.value).__name__ == error, what
    assert not output.parent.exists()


def test_factors_in_the_spelling_of_old_revisions(checkpoint: Path, tmp_path: Path) -> None:
    scaling = longrope(16)
    found = []
    for spelling in ({"type": "longrope"}, {"rope_type": None, "type": "su"}, {"rope_type": "longrope"}):
        factors = {name: scaling[name] for name in ("short_factor", "long_factor")}
        edit(checkpoint / "config.json", max_position_embeddings=131072, rope_scaling=factors | spelling)
        found.append(convert(checkpoint, tmp_path / "out.gguf", force=True).path.read_bytes())
    assert found[0] == found[1] == found[2]
    assert "rope_factors_long.weight" in tensors_of(tmp_path / "out.gguf")


@pytest.mark.parametrize("wanted", ["norm", "lm_head", "q_proj", "up_proj"])
def test_tensors_of_different_types_are_the_same_values(checkpoint: Path, tmp_path: Path, wanted: str) -> None:
    before = tensors_of(convert(checkpoint, tmp_path / "before.gguf", outtype="f32").path)
    edits.split(checkpoint)
    edits.widened(checkpoint, wanted)
    after = tensors_of(convert(checkpoint, tmp_path / "after.gguf", outtype="f32").path)
    assert {name: tensor.data.tobytes() for name, tensor in before.items()} == {
        name: tensor.data.tobytes() for name, tensor in after.items()
    }
    assert convert(checkpoint, tmp_path / "auto.gguf").outtype == "bf16", "that of most values"


@pytest.mark.parametrize("outtype", ["q8_0", "f16"])
def test_split_matrices_are_quantised_as_fused_ones(
    pristine: Path, checkpoint: Path, tmp_path: Path, outtype: str
) -> None:
    edits.split(checkpoint)
    found = [convert(folder, tmp_path / f"{i}", outtype=outtype) for i, folder in enumerate((pristine, checkpoint))]
    assert found[0].path.read_bytes() == found[1].path.read_bytes()


def test_a_padding_token_of_minus_one_is_none(checkpoint: Path, tmp_path: Path) -> None:
    plain = fields_of(convert(checkpoint, tmp_path / "out.gguf").path)
    edit(checkpoint / "config.json", pad_token_id=-1)
    assert fields_of(convert(checkpoint, tmp_path / "out.gguf", force=True).path) == plain, (
        "generation_config.json counts"
    )
    edit(checkpoint / "generation_config.json", pad_token_id=None, eos_token_id=[-1, *plain[EOS_TOKEN_IDS_KEY]])
    found = fields_of(convert(checkpoint, tmp_path / "out.gguf", force=True).path)
    assert PAD_TOKEN_ID_KEY not in found
    assert found[EOS_TOKEN_IDS_KEY] == plain[EOS_TOKEN_IDS_KEY]
    assert "pad_token_id" not in json.loads(found[GENERATION_CONFIG_KEY])


def test_a_chat_template_among_named_ones(checkpoint: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages }}"}]
    for template in (named, {entry["name"]: entry["template"] for entry in named}):
        edit(checkpoint / "tokenizer_config.json", chat_template=template)
        found = fields_of(convert(checkpoint, tmp_path / "out.gguf", force=True).path)
        assert found["tokenizer.chat_template"] == "{{ messages }}"
    (checkpoint / "chat_template.jinja").write_bytes(b"\xef\xbb\xbffile")
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "rag.jinja").write_text("rag")
    for left in ("tokenizer.json", "tokenizer_config.json"):
        found = fields_of(convert(checkpoint, tmp_path / "out.gguf", force=True).path)
        assert found["tokenizer.chat_template"] == "file"
        assert found["tokenizer.chat_template.rag"] == "rag"
        (checkpoint / left).unlink()


def test_fit_knows_a_copy_by_its_tokens(checkpoint: Path, tmp_path: Path) -> None:
    edits.split(checkpoint)
    edits.config(checkpoint, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None)
    assert find_base(str(checkpoint), tmp_path, store=None, progress=SilentProgress()).layers == 1


def test_a_chat_ends_with_its_turn_where_nothing_names_the_ends(tmp_path: Path) -> None:
    demo = shutil.copytree(DEMO_CHECKPOINT, tmp_path / "phi-3-demo")
    (demo / "generation_config.json").unlink()
    with running_engine(convert(demo, tmp_path / "out.gguf").path) as engine:
        prompt = engine.model.tokenizer.encode("<|user|>\nWhat does json.dumps do?<|end|>\n<|assistant|>\n")
        answer = ask(engine, prompt, max_new_tokens=100, do_sample=False)[0]
        assert answer[-1] == engine.model.tokenizer.special_token("<|end|>")
        assert 5 < len(answer) < 50
