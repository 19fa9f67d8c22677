"""What operators and probes ask: is it there, is it well, is it ready, what is it, how does it do."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Any

from litestar import MediaType, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import RawBody
from litestar.response import Redirect

from edge_phi3 import __version__
from edge_phi3.api.body import decode_body, work_on
from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.machine_metrics import machine_metrics
from edge_phi3.api.schemas import (
    DetokenizeRequest,
    DetokenizeResponse,
    HealthResponse,
    MetricsResponse,
    ModelInfo,
    RunningResponse,
    TokenizeRequest,
    TokenizeResponse,
    VersionResponse,
)
from edge_phi3.api.service import Service
from edge_phi3.api.static_files import prefers_html

_PROMETHEUS_TYPES = ("application/openmetrics-text", "text/plain")


@get("/", sync_to_thread=False)
def home(request: Request[Any, Any, Any]) -> Response[Any]:
    """Say that the service is there, whether or not a model is loaded; browsers are sent to the playground."""
    headers = {"Vary": "Accept"}
    if prefers_html(request.headers.get("accept", "")):
        return Redirect("ui", status_code=307, headers=headers)
    return Response(RunningResponse("Server is running"), headers=headers)


@get("/healthz", sync_to_thread=False)
def healthz(service: NamedDependency[Service]) -> HealthResponse:
    """Say that the model is loaded and the engine works, as the original service does; 500 otherwise."""
    service.check_healthy()
    return HealthResponse("Healthy")


@get("/livez", sync_to_thread=False)
def livez(service: NamedDependency[Service]) -> HealthResponse:
    """Say that the process works, also while the model is downloaded or loaded; 500 when only a restart helps."""
    service.check_alive()
    return HealthResponse("Alive")


@get("/readyz", sync_to_thread=False)
def readyz(service: NamedDependency[Service]) -> HealthResponse:
    """Say that requests are taken: 503 while the model loads, and from SIGTERM on."""
    service.check_ready()
    return HealthResponse("Ready")


@get("/version", sync_to_thread=False)
def show_version(service: NamedDependency[Service]) -> VersionResponse:
    """Tell which edge-phi3, which llama.cpp and which model this is."""
    pipeline = service.loaded
    card = None if pipeline is None else pipeline.model
    model = None
    if card is not None:
        model = ModelInfo(
            name=card.name,
            description=card.description,
            file=card.file,
            parameters=card.parameters,
            size=card.size,
            context_length=card.context_length,
            vocab_size=card.vocab_size,
        )
    return VersionResponse(version=__version__, llama_cpp=version("llama-cpp-python"), model=model)


@get("/metrics")
async def metrics(
    request: Request[Any, Any, Any], service: NamedDependency[Service]
) -> Response[MetricsResponse] | Response[bytes]:
    """Describe the GPUs, or the CPUs without any; for clients that accept it, in Prometheus's formats instead."""
    accept = request.headers.get("accept", "")
    if any(kind in accept for kind in _PROMETHEUS_TYPES):
        return _exposed(service, accept)
    return Response(await asyncio.to_thread(machine_metrics), media_type=MediaType.JSON)


@get("/metrics/prometheus", sync_to_thread=False)
def prometheus(request: Request[Any, Any, Any], service: NamedDependency[Service]) -> Response[bytes]:
    """Give the metrics of requests and engine, for scrapers that send no ``Accept``."""
    return _exposed(service, request.headers.get("accept", ""))


@post("/tokenize", status_code=200)
async def tokenize(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> TokenizeResponse:
    """Split a text into the model's tokens, as the prompt of a request is split."""
    asked = decode_body(request, body, TokenizeRequest)
    pipeline = service.pipeline
    tokens = await work_on(body, lambda: pipeline.tokenize(asked.text, parse_special=asked.parse_special_tokens))
    return TokenizeResponse(tokens)


@post("/detokenize", status_code=200)
async def detokenize(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> DetokenizeResponse:
    """Turn tokens into text."""
    asked = decode_body(request, body, DetokenizeRequest)
    pipeline = service.pipeline
    size = pipeline.model.vocab_size
    for index, token in enumerate(asked.tokens):
        if not 0 <= token < size:
            raise InvalidRequestError(f"`tokens[{index}]` must be a token id from 0 to {size - 1}, but is {token}.")
    skip = asked.skip_special_tokens
    text = await work_on(body, lambda: pipeline.detokenize(asked.tokens, skip_special_tokens=skip))
    return DetokenizeResponse(text)


def _exposed(service: Service, accept: str) -> Response[bytes]:
    content, content_type = service.metrics.expose(accept)
    return Response(content, media_type=content_type)
