"""The vocabularies that texts are tried on: the demo model's, the real one of Phi-3-mini, a byte-level one."""

from collections.abc import Iterator

import llama_cpp
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama.model import Model
from tests.golden.family import write_member
from tests.golden.vocabularies import VOCABULARY_GGUF


@pytest.fixture(scope="session", params=["demo", "real", "phi-4-mini-instruct"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    folder, path = tmp_path_factory.mktemp("model"), VOCABULARY_GGUF
    if request.param != "real":
        checkpoint = DEMO_CHECKPOINT if request.param == "demo" else write_member(folder, request.param, layers=1)
        path = convert(checkpoint, folder / "model.gguf").path
    with pytest.MonkeyPatch.context() as patch:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        patch.setattr(llama_cpp, "llama_model_default_params", lambda: params)
        model = Model(path)
    yield Tokenizer(model)
    model.close()
