"""From a model's name to a pipeline that answers, reporting progress on the way."""

import contextlib
import dataclasses

import msgspec
import structlog

from edge_phi3.api.service import Say
from edge_phi3.catalog import Catalog
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.json_schema import SchemaLimits
from edge_phi3.pipeline import TextGenerationPipeline
from edge_phi3.progress import LineProgress, stderr_progress
from edge_phi3.settings import Settings, SettingsError

logger = structlog.get_logger(__name__)

_ENGINE_OPTIONS = {field.name for field in dataclasses.fields(EngineSettings)} - {"model_path"}


def load_pipeline(settings: Settings, say: Say) -> TextGenerationPipeline:
    """Find, download, convert and quantise the model as needed, and load it.

    `say` is called with each step, for `/readyz`; what it raises ends the work.
    """
    # A machine that reads the log gets no bars.
    lines = LineProgress(logger.info)
    with stderr_progress(lines) if settings.log_format == "text" else contextlib.nullcontext(lines) as progress:
        progress.say = say
        stored = Catalog(settings.store).resolve(settings.model, quant=settings.quant, progress=progress)
        if stored.name in (lora.name for lora in settings.lora):
            raise SettingsError(f"--lora: {stored.name} is the model's own name; give the adapter another one.")
        options = {name: getattr(settings, name) for name in _ENGINE_OPTIONS}
        engine = Engine(EngineSettings(stored.path, **options))
        with progress.step(f"Loading {stored.path.name}"):
            engine.load()
    pipeline = TextGenerationPipeline(
        engine,
        encode_user_tokens_as_text=settings.encode_user_tokens_as_text,
        schema_limits=SchemaLimits(int(settings.max_schema_size), settings.max_schema_depth),
    )
    pipeline.model = msgspec.structs.replace(pipeline.model, name=stored.name)
    return pipeline
