"""A vocabulary from tokenizer.json alone, as today's libraries save it: the same tokens as the tokenizers library's."""

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from edge_phi3.conversion import ConversionError
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.vocabulary import read_vocabulary
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama.model import Model
from tests.conversion.conftest import edit, tensors_of
from tests.conversion.edits import renamed, split
from tests.golden.byte_level import reference_tokenizer
from tests.golden.checkpoints import write_checkpoint
from tests.golden.family import write_member
from tests.support.cases import cases
from tests.support.models import SAVED, write_fine_tune, write_random_checkpoint
from tests.support.odd_texts import random_text

ADDED = ["<tool>", "newword", "two words", "sp \u2581 ace", "\u2581begun", "hello", "caf\u00e9", "do"]
ALONE = ["json", "Single", "<one>", "of a", "\u24b6word", "x\u0301"]
"""What is no token within a word."""
SPECIAL = [
    "<|user|>", "<|end|>", "<|assistant|>", "<|endoftext|>", "<|im_sep|>", "<s>", "</s>", "<unk>",
    *(part for token in ADDED + ALONE for part in (token, f" {token}", f"{token}s", f"a{token}", token[:3], token[3:])),
]  # fmt: skip


@contextlib.contextmanager
def converted(folder: Path) -> Iterator[tuple[Tokenizer, Library]]:
    """Convert a checkpoint; yield its tokenizer, and that of its tokenizer.json."""
    model = Model(convert(folder, folder / "model.gguf", force=True).path, n_gpu_layers=0)
    yield Tokenizer(model), reference_tokenizer(folder)
    model.close()


def compare(folder: Path, texts: int, seed: int) -> None:
    generator = random.Random(seed)
    with converted(folder) as (ours, theirs):
        for text in (random_text(generator, SPECIAL) for _ in range(texts)):
            ids = theirs.encode(text).ids
            assert ours.encode(text).tolist() == ids, text
            assert ours.decode(ids) == theirs.decode(ids), text


def add_tokens(folder: Path) -> None:
    """Add tokens as ``tokenizer.add_tokens([...])`` does, the last behind a gap; save what the library saves."""
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_tokens(ADDED)
    library.add_tokens([AddedToken(text, single_word=True, normalized=i % 2 > 0) for i, text in enumerate(ALONE)])
    library.save(str(folder / "tokenizer.json"))
    change(folder, lambda content: content["added_tokens"][-1].update(id=len(library.get_vocab()) + 4))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the demo's vocabulary and nothing of it but tokenizer.json. Not to be changed."""
    sizes: dict[str, Any] = {"layers": 1, "hidden_size": 8, "heads": 1, "intermediate_size": 8, "vocab_size": 4032}
    folder = write_checkpoint(tmp_path_factory.mktemp("demo") / "phi-3", **sizes)
    for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink()
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(DEMO_CHECKPOINT / name, folder)
    edit(folder / "config.json", eos_token_id=4000, pad_token_id=4000)
    return folder


@pytest.fixture
def checkpoint(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / demo.name))


def change(folder: Path, edit_it: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    edit_it(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def test_the_demos_scores_follow_from_its_merges(checkpoint: Path) -> None:
    from_json, stored = read_vocabulary(checkpoint, 4032), read_vocabulary(DEMO_CHECKPOINT, 4032)
    assert (from_json.tokens, from_json.types) == (stored.tokens, stored.types)
    merges = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    merged = [stored.tokens.index(text) for text in {"".join(pair) for pair in merges}]
    ranked = [sorted(merged, key=scores.__getitem__) for scores in (from_json.scores, stored.scores)]
    assert ranked[0] == ranked[1]
    compare(checkpoint, 800, seed=1)


@pytest.mark.parametrize("kept", [True, False], ids=["with tokenizer.model", "without"])
def test_the_real_vocabulary_with_added_tokens(kept: bool, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "phi-3", "tiny")
    for name in ("added_tokens.json", "tokenizer_config.json", *([] if kept else ["tokenizer.model"])):
        (folder / name).unlink()
    add_tokens(folder)
    compare(folder, 1200, seed=2)


def test_merges_as_texts_and_added_tokens_in_the_vocabulary(checkpoint: Path) -> None:
    def older(content: dict[str, Any]) -> None:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
        content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}

    before = read_vocabulary(checkpoint, 4032)
    change(checkpoint, older)
    assert read_vocabulary(checkpoint, 4032) == before
    shutil.copy(DEMO_CHECKPOINT / "tokenizer.model", checkpoint)
    assert read_vocabulary(checkpoint, 4032).tokens == before.tokens


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "split": False}


@pytest.mark.parametrize("scheme", ["first", "always", "never", "replaced before", "in sequences"])
def test_other_rules_for_the_space_in_front(scheme: str, checkpoint: Path) -> None:
    def apply(content: dict[str, Any]) -> None:
        if scheme == "replaced before":
            content["normalizer"]["normalizers"].reverse()
        elif scheme == "in sequences":
            one = {"type": "Sequence", "pretokenizers": [METASPACE | {"prepend_scheme": "first"}]}
            content |= {"normalizer": {"type": "Sequence", "normalizers": []}, "pre_tokenizer": one}
        else:
            content |= {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": scheme}}

    change(checkpoint, apply)
    add_tokens(checkpoint)
    compare(checkpoint, 600, seed=3)


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_what_transformers_5_saves(kind: str, tmp_path: Path) -> None:
    """A fine-tune of the demo, and one of a copy that says it is a Llama, from the files that transformers wrote."""
    folder = write_fine_tune(tmp_path / kind, kind)
    if kind == "llama":
        split(folder, groups=1)
    compare(folder, 500, seed=4)
    ours, original = (
        tensors_of(convert(path, tmp_path / "out.gguf", force=True).path) for path in (folder, DEMO_CHECKPOINT)
    )
    assert ours.keys() == original.keys()


@pytest.mark.parametrize(
    ("kind", "member", "groups"), [("phi-4-mini", "phi-4-mini-instruct", 2), ("phi-4", "phi-4", 4)]
)
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_what_transformers_5_saves_of_a_byte_level_member(
    kind: str, member: str, groups: int, ignore_merges: bool, tmp_path: Path
) -> None:
    """Projections that are split and wrapped, and added tokens of which some are words that the vocabulary has."""
    original = write_member(tmp_path / "original", member, layers=1, dtype="bfloat16")
    folder = Path(shutil.copytree(SAVED / kind, tmp_path / member))
    stored = json.loads((original / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    whole = {"vocab": stored["vocab"], "merges": stored["merges"], "ignore_merges": ignore_merges}
    change(folder, lambda content: content["model"].update(whole))
    if ignore_merges:
        change(folder, lambda content: [token.update(single_word=True) for token in content["added_tokens"][-10:]])
    shutil.copy(original / "model.safetensors", folder)
    split(folder, groups=groups)
    renamed(folder, "^", "base_model.model.")
    compare(folder, 500, seed=5)
    ours, theirs = (
        tensors_of(convert(path, tmp_path / f"{path.parent.name}.gguf").path) for path in (folder, original)
    )
    for name, tensor in theirs.items():
        assert ours[name].data.tobytes() == tensor.data.tobytes()


@cases
def test_merges_that_no_scores_give_are_refused(
    damage: str, given: Any, error: str, sentence: str, checkpoint: Path
) -> None:
    def edit_it(content: dict[str, Any]) -> None:
        model, merges = content["model"], content["model"]["merges"]
        twice = next(i for i in range(1, len(merges)) if "".join(merges[i]) == "".join(merges[i - 1]))
        damages: dict[str, Callable[[Any], object]] = {
            "a merge": merges.append,
            "without the merge": merges.pop,
            "without the piece": model["vocab"].pop,
            "pieces": model["vocab"].update,
            "the model": model.update,
            "the rules": content.update,
            "the second merge to a piece behind all others": lambda _: merges.append(merges.pop(twice)),
        }
        damages[damage](given)

    change(checkpoint, edit_it)
    with pytest.raises(ConversionError, match=sentence) as caught:
        read_vocabulary(checkpoint, 4032)
    assert type(caught.value).__name__ == error
