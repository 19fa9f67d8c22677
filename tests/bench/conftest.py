"""A real service on a small random model, and clients of servers that answer what a test says."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_phi3.bench.endpoints import HttpClient
from edge_phi3.bench.workload import WORDS, Ruler
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.pipeline import TextGenerationPipeline
from tests.support.in_process import Running, ready

DATA = Path(__file__).with_name("data")
RULER = Ruler(WORDS, 1.0, 0, exact=True)


@pytest.fixture(scope="session")
def service(model_file: Callable[[str, str], Path]) -> Iterator[Running]:
    """Serve a small random model with Phi-3's whole vocabulary at its real endpoints."""
    engine = Engine(EngineSettings(model_file("tiny", "F32"), threads=1))

    def load(_: object) -> TextGenerationPipeline:
        engine.load()
        return TextGenerationPipeline(engine)

    with ready(load) as running:
        yield running


def client_of(answer: Callable[[httpx.Request], Any], url: str = "http://server", **options: Any) -> HttpClient:
    """Return a client of a server that answers as `answer` does."""
    return HttpClient(url, transport=httpx.MockTransport(answer), **options)
