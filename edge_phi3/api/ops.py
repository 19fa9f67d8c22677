"""What operators and probes need: health, readiness, versions and metrics; tokens for whoever debugs a prompt."""

import asyncio
import functools
from importlib import metadata
from typing import Any

import psutil
from litestar import MediaType, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import RawBody
from litestar.response import Redirect
from prometheus_client.exposition import choose_encoder

from edge_phi3.api import schemas
from edge_phi3.api.body import decode_body, sift
from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.openai.fields import TokenizeRequest
from edge_phi3.api.openai.translate import conversation_of
from edge_phi3.api.service import Service
from edge_phi3.api.static_files import prefers_html
from edge_phi3.pipeline import TextGenerationPipeline
from edge_phi3.system_resources import Gpu, gpus
from edge_phi3.version import __version__

_PROMETHEUS_TYPES = ("application/openmetrics-text", "text/plain")

_CPU_SAMPLE_SECONDS = 0.1
"""How long the CPUs are watched for their load; psutil advises at least this."""


@get("/", sync_to_thread=False)
def home(request: Request[Any, Any, Any]) -> Response[schemas.RunningResponse] | Redirect:
    """Check that the service is there, whether or not a model is loaded."""
    headers = {"Vary": "Accept"}
    if prefers_html(request.headers.get("accept", "")):
        return Redirect("ui", status_code=307, headers=headers)
    return Response(schemas.RunningResponse("Server is running"), headers=headers)


@get(
    ["/healthz", "/health"], sync_to_thread=False, errors={500: "The model is not loaded yet, or the engine is broken."}
)
def healthz(service: NamedDependency[Service]) -> schemas.HealthResponse:
    """Check that the model is loaded and the engine works, as the original service does."""
    service.check_healthy()
    return schemas.HealthResponse("Healthy")


@get("/livez", sync_to_thread=False, errors={500: "The engine is broken or has stalled; only a restart helps."})
def livez(service: NamedDependency[Service]) -> schemas.HealthResponse:
    """Check that the process works, also while the model is downloaded or loaded."""
    service.check_alive()
    return schemas.HealthResponse("Alive")


@get("/readyz", sync_to_thread=False, errors={503: "The model is not loaded yet, or the service is stopping."})
def readyz(service: NamedDependency[Service]) -> schemas.HealthResponse:
    """Check that requests are accepted."""
    service.check_ready()
    return schemas.HealthResponse("Ready")


@get("/version", sync_to_thread=False)
def version(service: NamedDependency[Service]) -> schemas.VersionResponse:
    """Show the versions and the model."""
    model = service.loaded.model if service.loaded else None
    return schemas.VersionResponse(__version__, metadata.version("llama-cpp-python"), model)


@get("/metrics")
async def metrics(
    request: Request[Any, Any, Any], service: NamedDependency[Service]
) -> Response[schemas.MetricsResponse] | Response[bytes]:
    """Show the GPUs, or the CPUs without any, or Prometheus metrics to clients that accept their formats."""
    if any(kind in request.headers.get("accept", "") for kind in _PROMETHEUS_TYPES):
        return _exposed(request, service)
    return Response(await asyncio.to_thread(_machine), media_type=MediaType.JSON)


@get("/metrics/prometheus", sync_to_thread=False)
def prometheus(request: Request[Any, Any, Any], service: NamedDependency[Service]) -> Response[bytes]:
    """Show the metrics of requests and engine in Prometheus's formats, whatever the client accepts."""
    return _exposed(request, service)


@post("/tokenize", status_code=200, body=TokenizeRequest)
async def tokenize(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> schemas.TokenizeResponse:
    """Split a text into the model's tokens, as the prompt of a request is split."""
    prepare = functools.partial(service.lanes.prepare, request, body)
    wanted = await prepare(
        lambda: decode_body(request, body, TokenizeRequest, functools.partial(sift, TokenizeRequest))
    )
    return await prepare(lambda: _tokenized(service.pipeline, wanted), foreign=service.is_foreign(wanted.messages))


@post("/detokenize", status_code=200, body=schemas.DetokenizeRequest)
async def detokenize(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> schemas.DetokenizeResponse:
    """Turn tokens into text."""

    def decode() -> str:
        wanted = decode_body(request, body, schemas.DetokenizeRequest)
        service.check_tokens(wanted.tokens, "tokens")
        return service.pipeline.tokenizer.decode(wanted.tokens, skip_special_tokens=bool(wanted.skip_special_tokens))

    text = await service.lanes.prepare(request, body, decode)
    return schemas.DetokenizeResponse(text, text, text)


OPEN = [home, healthz, livez, readyz, version, metrics, prometheus]
GUARDED = [tokenize, detokenize]
"""The routes that need no key, and those that do."""


def _tokenized(pipeline: TextGenerationPipeline, wanted: TokenizeRequest) -> schemas.TokenizeResponse:
    given = [text for text in (wanted.text, wanted.prompt, wanted.content, wanted.messages) if text is not None]
    if len(given) != 1:
        raise InvalidRequestError("Give one of `text`, `prompt`, `content` and `messages`.")
    text, parse_special = given[0], False not in {wanted.parse_special_tokens, wanted.parse_special}
    if isinstance(text, str):
        add_bos = False not in {wanted.add_special_tokens, wanted.add_special}
        tokens = pipeline.tokenizer.encode(text, parse_special=parse_special, add_bos=add_bos).tolist()
    else:
        tokens = pipeline.encode_conversation(
            conversation_of(text),
            wanted.chat_template_kwargs or {},
            parse_special=parse_special,
            add_generation_prompt=wanted.add_generation_prompt,
            continue_final_message=wanted.continue_final_message,
        ).tolist()
    shown = wanted.with_pieces or wanted.return_token_strs
    pieces = [pipeline.tokenizer.bytes_of(token) for token in tokens] if shown else []
    return schemas.TokenizeResponse(
        list(map(schemas.TokenPiece, tokens, map(_piece, pieces))) if wanted.with_pieces else tokens,
        len(tokens),
        pipeline.engine.max_length,
        [piece.decode(errors="replace") for piece in pieces] if wanted.return_token_strs else None,
    )


def _piece(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def _exposed(request: Request[Any, Any, Any], service: Service) -> Response[bytes]:
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(service.metrics.registry), headers={"Content-Type": content_type})


def _machine() -> schemas.MetricsResponse:
    """Describe the GPUs, or the CPUs when there is no GPU. Blocks for a tenth of a second without GPUs."""
    if found := gpus():
        return schemas.MetricsResponse([_gpu(gpu) for gpu in found])
    memory = psutil.virtual_memory()
    total = psutil.cpu_count(logical=True) or 1
    cpus = schemas.CPUInfo(
        load_percentage=psutil.cpu_percent(interval=_CPU_SAMPLE_SECONDS),
        physical_cores=psutil.cpu_count(logical=False) or total,
        total_cores=total,
        memory=_memory(memory.used, memory.total),
    )
    return schemas.MetricsResponse(cpu_info=cpus)


def _gpu(gpu: Gpu) -> schemas.GPUInfo:
    load = "n/a" if gpu.load is None else f"{gpu.load:.2f}%"
    temperature = "n/a" if gpu.temperature is None else f"{gpu.temperature} C"
    return schemas.GPUInfo(str(gpu.index), gpu.name, load, temperature, _memory(gpu.used, gpu.total))


def _memory(used: int, total: int) -> schemas.MemoryInfo:
    return schemas.MemoryInfo(f"{used / 1024**3:.2f} GB", f"{total / 1024**3:.2f} GB")
