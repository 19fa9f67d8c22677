"""From a model's name to a pipeline that answers, reporting progress on the way."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import msgspec
import structlog
from rich.console import Console

from edge_phi3.api.service import Say
from edge_phi3.catalog import Catalog
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.pipeline import TextGenerationPipeline
from edge_phi3.progress import LineProgress, ProgressReporter, RichProgress, Step
from edge_phi3.settings import Settings

logger = structlog.get_logger(__name__)

_ENGINE_OPTIONS = {field.name for field in dataclasses.fields(EngineSettings)} - {"model_path"}


def load_pipeline(settings: Settings, say: Say) -> TextGenerationPipeline:
    """Find, download, convert and quantise the model as needed, and load it.

    Args:
        settings: which model, and how to run it.
        say: called with each step, for `/readyz`; what it raises ends the work.

    Raises:
        EdgePhi3Error: any step failed.
    """
    with _progress(settings, say) as progress:
        stored = Catalog(settings.store).resolve(settings.model, quant=settings.quant, progress=progress)
        options = {name: getattr(settings, name) for name in _ENGINE_OPTIONS}
        engine = Engine(EngineSettings(stored.path, **options))
        with progress.step(f"Loading {stored.path.name}"):
            engine.load()
    pipeline = TextGenerationPipeline(engine)
    pipeline.model = msgspec.structs.replace(pipeline.model, name=stored.name)
    return pipeline


@contextlib.contextmanager
def _progress(settings: Settings, say: Say) -> Iterator[ProgressReporter]:
    """Draw bars on a terminal, and write log lines where there is none or a machine reads them."""
    console = Console(stderr=True)
    if settings.log_format == "text" and console.is_terminal:
        with RichProgress(console) as bars:
            yield _SaidProgress(bars, say)
        return
    yield _SaidProgress(LineProgress(logger.info), say)


class _SaidProgress:
    """Passes everything on, and says it to the service too."""

    def __init__(self, inner: ProgressReporter, say: Say) -> None:
        self._inner = inner
        self._say = say

    @contextlib.contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        """Begin a step."""
        self._say(f"{title}.")
        with self._inner.step(title, total) as step:
            yield _SaidStep(step, self._say, title, total)

    def note(self, sentence: str) -> None:
        """Pass a sentence on."""
        self._inner.note(sentence)


class _SaidStep:
    def __init__(self, inner: Step, say: Say, title: str, total: int | None) -> None:
        self._inner = inner
        self._say = say
        self._title = title
        self._total = total

    def update(self, done: int, total: int | None = None, detail: str = "") -> None:
        """Pass on how far the step is."""
        self._total = self._total if total is None else total
        self._say(f"{self._title}: {100 * done // self._total} %." if self._total else f"{self._title}.")
        self._inner.update(done, total, detail)
