"""The vocabularies that texts are tried on: the demo model's, and the real one of Phi-3-mini."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama.model import Model, load_file
from tests.golden.vocabularies import VOCABULARY_GGUF


class VocabularyModel(Model):
    """The vocabulary of a GGUF file without its weights."""

    def __init__(self, path: Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._handle = load_file(path, params)
        self._vocab = llama_cpp.llama_model_get_vocab(self._handle)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.adds_bos = False


@pytest.fixture(scope="session", params=["demo", "real"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    path = VOCABULARY_GGUF
    if request.param == "demo":
        path = convert(DEMO_CHECKPOINT, tmp_path_factory.mktemp("demo") / "demo.gguf").path
    model = VocabularyModel(path)
    yield Tokenizer(model)
    model.close()
