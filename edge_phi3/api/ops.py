"""What operators and probes need: health, readiness, versions and metrics; tokens for whoever debugs a prompt."""

from __future__ import annotations

import asyncio
import dataclasses
from importlib.metadata import version
from typing import Any

from litestar import MediaType, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import RawBody
from litestar.response import Redirect

from edge_phi3.api.body import decode_body, work_on
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
from edge_phi3.version import __version__

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
    """Return the versions of edge-phi3 and llama.cpp, and the model."""
    pipeline = service.loaded
    model = None if pipeline is None else ModelInfo(**dataclasses.asdict(pipeline.model))
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
    """Return the metrics of requests and engine, for scrapers that send no ``Accept``."""
    return _exposed(service, request.headers.get("accept", ""))


@post("/tokenize", status_code=200)
async def tokenize(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> TokenizeResponse:
    """Split a text into the model's tokens, as the prompt of a request is split."""
    wanted = decode_body(request, body, TokenizeRequest)
    pipeline = service.pipeline
    tokens = await work_on(body, lambda: pipeline.tokenize(wanted.text, parse_special=wanted.parse_special_tokens))
    return TokenizeResponse(tokens)


@post("/detokenize", status_code=200)
async def detokenize(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> DetokenizeResponse:
    """Turn tokens into text."""
    wanted = decode_body(request, body, DetokenizeRequest)
    skip = wanted.skip_special_tokens
    text = await work_on(body, lambda: service.text_of(wanted.tokens, "tokens", skip_special_tokens=skip))
    return DetokenizeResponse(text)


HANDLERS = [home, healthz, livez, readyz, show_version, metrics, prometheus]
"""What needs no key."""


def _exposed(service: Service, accept: str) -> Response[bytes]:
    content, content_type = service.metrics.expose(accept)
    return Response(content, media_type=content_type)
