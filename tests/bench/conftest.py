"""A real service on a small random model, and clients of servers that answer what a test says."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_phi3.bench.endpoints import HttpClient
from edge_phi3.bench.workload import WORDS, Ruler
from edge_phi3.conversion.convert import convert
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.pipeline import TextGenerationPipeline
from tests.golden.checkpoints import write_checkpoint
from tests.golden.vocabularies import phi3_vocabulary
from tests.support.in_process import Running, ready

DATA = Path(__file__).with_name("data")
RULER = Ruler(WORDS, 1.0, 0, exact=True)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Serve a small random model with Phi-3's whole vocabulary at its real endpoints."""
    folder = tmp_path_factory.mktemp("bench")
    checkpoint = write_checkpoint(folder / "checkpoint", vocabulary=phi3_vocabulary(), layers=1)
    engine = Engine(EngineSettings(convert(checkpoint, folder / "tiny.gguf", outtype="f32").path, threads=1))

    def load(_: object) -> TextGenerationPipeline:
        engine.load()
        return TextGenerationPipeline(engine)

    with ready(load) as running:
        yield running


def client_of(answer: Callable[[httpx.Request], Any], url: str = "http://server", **options: Any) -> HttpClient:
    """Return a client of a server that answers as `answer` does."""
    return HttpClient(url, transport=httpx.MockTransport(answer), **options)
