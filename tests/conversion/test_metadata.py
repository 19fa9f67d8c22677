"""What a GGUF says on itself: its name, size, licence and source, and what ends a generation."""

import json
import shutil
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.metadata import EOS_TOKEN_IDS_KEY, GENERATION_CONFIG_KEY, PAD_TOKEN_ID_KEY, SourceInfo
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama.model import Model, tokenize
from tests.conversion.conftest import edit, fields_of
from tests.golden.vocabularies import phi3_vocabulary
from tests.support.cases import cases

ENDS = [phi3_vocabulary(merges=300).id_of(text) for text in ("<|endoftext|>", "<|assistant|>", "<|end|>")]

CARD = (
    "---\nlicense: mit\nlicense_link: https://example.org/LICENSE\n"
    "language:\n- en\ntags:\n- nlp\n- code\n---\n# A model\n"
)


def converted(checkpoint: Path, source: SourceInfo | None = None) -> dict[str, Any]:
    output = checkpoint.parent / "out.gguf"
    return fields_of(convert(checkpoint, output, source=source, force=True).path)


def ends_of(checkpoint: Path) -> list[int]:
    """Return the tokens that llama.cpp ends a generation on."""
    model = Model(checkpoint.parent / "out.gguf")
    found = [token for token in range(model.vocab_size) if llama_cpp.llama_vocab_is_eog(model._vocab, token)]
    model.close()
    return found


@cases
def test_the_name_makes_llama_cpp_follow_phi3s_tokenizer(
    checkpoint: Path, repository: str | None, stated: str, folder: str, name: str
) -> None:
    checkpoint = checkpoint.rename(checkpoint.parent / folder)
    edit(checkpoint / "config.json", _name_or_path=stated or ...)
    keys = converted(checkpoint, SourceInfo(repository) if repository else None)
    assert keys["general.name"] == name
    chat = "<|user|>\n Hello<|end|>\n<|assistant|>\n"
    model = Model(checkpoint.parent / "out.gguf")
    assert tokenize(model._vocab, chat, parse_special=True).tolist() == Tokenizer(model).encode(chat).tolist()
    model.close()


def test_size_licence_languages_window_and_rope(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text(CARD, encoding="utf-8")
    edit(checkpoint / "config.json", sliding_window=None, rope_theta=25000.5)
    keys = converted(checkpoint)
    assert keys["general.type"] == "model"
    assert keys["general.size_label"] == "129K"
    assert (keys["general.license"], keys["general.license.link"]) == ("mit", "https://example.org/LICENSE")
    assert (keys["general.languages"], keys["general.tags"]) == (["en"], ["nlp", "code"])
    assert (keys["phi3.attention.sliding_window"], keys["phi3.rope.freq_base"]) == (0, 25000.5)
    # A model card that says nothing is no error.
    for card in ("---\nlicense: [\n---\n", "---\nlicense: {a: b}\ntags: 3\n---\n", "no card", ""):
        (checkpoint / "README.md").write_text(card, encoding="utf-8")
        assert "general.license" not in converted(checkpoint)


def test_the_source_is_named_as_told_or_as_the_hubs_cache_names_it(pristine: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--microsoft--Phi-3-mini-4k-instruct" / "snapshots" / "0a67737c"
    shutil.copytree(pristine, snapshot)
    told = SourceInfo("owner/phi-3-name", "0123abcd")
    for source, repository, revision in (
        (told, told.repository, told.revision),
        (None, "microsoft/Phi-3-mini-4k-instruct", "0a67737c"),
    ):
        keys = converted(snapshot, source)
        assert [keys["general.organization"], keys["general.name"]] == repository.split("/")
        assert keys["general.source.repo_url"] == f"https://huggingface.co/{repository}"
        assert keys["general.source.huggingface.repository"] == repository
        assert keys["general.source.huggingface.revision"] == revision
    elsewhere = Path(shutil.copytree(pristine, tmp_path / "phi-3"))
    assert not any(key.startswith("general.source") for key in converted(elsewhere))


def test_llama_cpp_learns_ends_it_can_and_our_key_has_all(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = converted(checkpoint)
    assert keys[EOS_TOKEN_IDS_KEY] == ENDS
    assert keys[PAD_TOKEN_ID_KEY] == keys["tokenizer.ggml.eos_token_id"] == ENDS[0]
    # "</s>" is one of llama.cpp's own accord, by its text.
    assert ends_of(checkpoint) == [2, *ENDS]
    edit(checkpoint / "generation_config.json", eos_token_id=[300, 301, 302, ENDS[2]])
    assert converted(checkpoint)[EOS_TOKEN_IDS_KEY] == [300, 301, 302, ENDS[2]]
    assert set(ends_of(checkpoint)) >= {300, 301, ENDS[0], ENDS[2]}
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert f"will not end a generation on {list(vocabulary)[302]}" in caplog.text


def test_the_generation_config_is_kept_whole_and_without_one_the_model_config_counts(checkpoint: Path) -> None:
    stated: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "do_sample": True, "stop_strings": ["\u00e9"]}
    edit(checkpoint / "generation_config.json", transformers_version="4.49.0", **stated)
    tokens = {"bos_token_id": 1, "eos_token_id": ENDS, "pad_token_id": ENDS[0]}
    assert json.loads(converted(checkpoint)[GENERATION_CONFIG_KEY]) == tokens | stated
    (checkpoint / "generation_config.json").unlink()
    keys = converted(checkpoint)
    # And <|end|>, which ends a turn of a chat whoever forgot to say so.
    assert keys[EOS_TOKEN_IDS_KEY] == [ENDS[0], ENDS[2]]
    assert json.loads(keys[GENERATION_CONFIG_KEY]) == tokens | {"eos_token_id": [ENDS[0], ENDS[2]]}
    edit(checkpoint / "config.json", eos_token_id=..., pad_token_id=None, bos_token_id=...)
    keys = converted(checkpoint)
    assert keys[EOS_TOKEN_IDS_KEY] == [ENDS[2]]
    assert PAD_TOKEN_ID_KEY not in keys
