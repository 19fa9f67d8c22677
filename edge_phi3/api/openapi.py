"""The OpenAPI document: every route, request, response and status code, made from the types that the code uses."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import msgspec

from edge_phi3 import __version__
from edge_phi3.api import schemas
from edge_phi3.api.openai import schemas as openai_schemas
from edge_phi3.generation.reference import generate_kwargs_schema

JSON = dict[str, Any]

_ERRORS = {
    400: "The request is wrong; the sentence names the field and what is allowed.",
    401: "The service needs an API key (only where keys are set).",
    404: "No model of this name is served.",
    413: "The body is larger than --max-body-size.",
    415: "The body is not said to be JSON.",
    429: "The queue is full, or the rate limit is reached; Retry-After tells when to try again.",
    500: "llama.cpp failed on the request, or the service met an error of its own.",
    503: "The model is not loaded yet, or the service is stopping.",
    504: "The request took longer than --request-timeout.",
}
_GENERATION_ERRORS = (400, 401, 413, 415, 429, 500, 503, 504)
_TOKEN_ERRORS = (400, 401, 413, 415, 429, 503)

_CHAT_EXAMPLES: JSON = {
    "basic": {
        "summary": "A prompt in Phi-3's chat format",
        "value": {
            "prompt": "<|user|>\nHow to explain Internet for a medieval knight?<|end|>\n<|assistant|>\n",
            "return_full_text": False,
        },
    },
    "conversation": {
        "summary": "A conversation, answered greedily",
        "value": {
            "messages": [{"role": "user", "content": "What does json.dumps do?"}],
            "generate_kwargs": {"do_sample": False, "max_new_tokens": 64},
        },
    },
    "sampling": {
        "summary": "Sampling that can be repeated",
        "value": {
            "prompt": "<|user|>\nTell me a story.<|end|>\n<|assistant|>\n",
            "generate_kwargs": {"temperature": 0.8, "top_p": 0.95, "seed": 42, "max_new_tokens": 200},
        },
    },
    "beams": {
        "summary": "Beam search with scores",
        "value": {
            "prompt": "<|user|>\nWhat does json.dumps do?<|end|>\n<|assistant|>\n",
            "generate_kwargs": {
                "do_sample": False,
                "num_beams": 4,
                "num_return_sequences": 2,
                "return_dict_in_generate": True,
                "output_scores": True,
            },
        },
    },
}

_STREAM_TEXT = """With `"stream": true`: server-sent events. Each unnamed event holds a piece of generated text,
`{"index": 0, "text": "..."}`, with the number of its returned sequence; pieces never split a character. The event
`result` ends the stream and holds the plain response. An event `error` holds `{"detail": ...}` when the request failed
after the stream began. Beam modes send `result` alone. Lines that begin with a colon are comments that keep the
connection alive."""


@functools.cache
def openapi_document() -> bytes:
    """Give the document as JSON."""
    return msgspec.json.encode(_document())


def _document() -> JSON:
    types = [*_structs(schemas), *_structs(openai_schemas)]
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    components["GenerateKwargs"] = generate_kwargs_schema()
    kwargs = components["ChatRequest"]["properties"]["generate_kwargs"]
    kwargs["anyOf"] = [{"$ref": "#/components/schemas/GenerateKwargs"}, {"type": "null"}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "edge-phi3",
            "version": __version__,
            "description": "Phi-3-mini on llama.cpp, with the meaning of transformers' `generate`.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "tags": [
            {"name": "text", "description": "Text and tokens"},
            {"name": "operations", "description": "Health, metrics and versions"},
        ],
        "paths": _paths(),
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _structs(module: ModuleType) -> list[type[msgspec.Struct]]:
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == module.__name__
    ]


def _paths() -> JSON:
    chat = _post("chat", "Continue a prompt or a conversation.", "ChatRequest", "ChatResponse", _GENERATION_ERRORS)
    chat["requestBody"]["content"]["application/json"]["examples"] = _CHAT_EXAMPLES
    answer = chat["responses"]["200"]
    answer["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    answer["description"] = f"The answer. {_STREAM_TEXT}"
    return {
        "/chat": {"post": chat},
        "/v1/chat/completions": {
            "post": _openai_post(
                "chatCompletions", "Continue a conversation (OpenAI's API).", "ChatCompletionRequest", "ChatCompletion"
            )
        },
        "/v1/completions": {
            "post": _openai_post(
                "completions", "Continue prompts (OpenAI's API).", "CompletionRequest", "Completion"
            )
        },
        "/v1/models": {
            "get": _openai_get("listModels", "Which models are served? (OpenAI's API)", "ModelList", (401, 503))
        },
        "/v1/models/{name}": {
            "get": _openai_get("showModel", "Describe the model (OpenAI's API).", "Model", (401, 404, 503), "name")
        },
        "/tokenize": {
            "post": _post(
                "tokenize", "Split a text into tokens.", "TokenizeRequest", "TokenizeResponse", _TOKEN_ERRORS
            )
        },
        "/detokenize": {
            "post": _post(
                "detokenize", "Turn tokens into text.", "DetokenizeRequest", "DetokenizeResponse", _TOKEN_ERRORS
            )
        },
        "/": {"get": _home()},
        "/healthz": {
            "get": _get("healthz", "Is the model loaded, and does the engine work?", "HealthResponse", {
                500: "The model is not loaded yet, or the engine is broken.",
            })
        },
        "/livez": {
            "get": _get("livez", "Does the process work, if only to load the model?", "HealthResponse", {
                500: "The engine is broken; only a restart helps.",
            })
        },
        "/readyz": {
            "get": _get("readyz", "Are requests taken?", "HealthResponse", {
                503: "The model is not loaded yet, or the service is stopping.",
            })
        },
        "/version": {"get": _get("version", "What runs here?", "VersionResponse")},
        "/metrics": {"get": _with_prometheus(_get("metrics", "How does the machine do?", "MetricsResponse"))},
        "/metrics/prometheus": {"get": _prometheus_only()},
    }  # fmt: skip


def _post(name: str, summary: str, request: str, response: str, errors: tuple[int, ...]) -> JSON:
    return {
        "operationId": name,
        "summary": summary,
        "tags": ["text"],
        "security": _SECURITY,
        "parameters": [_REQUEST_ID],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(request)}}},
        "responses": {"200": _response("The answer.", response)} | _errors({code: _ERRORS[code] for code in errors}),
    }


def _get(name: str, summary: str, response: str, errors: dict[int, str] | None = None) -> JSON:
    return {
        "operationId": name,
        "summary": summary,
        "tags": ["operations"],
        "parameters": [_REQUEST_ID],
        "responses": {"200": _response("Yes." if errors else "The answer.", response)} | _errors(errors or {}),
    }


def _home() -> JSON:
    operation = _get("home", "Is the service there?", "RunningResponse")
    operation["responses"]["307"] = {"description": "A browser, which prefers HTML, is sent to the playground."}
    return operation


def _openai_post(name: str, summary: str, request: str, response: str) -> JSON:
    operation = _post(name, summary, request, response, _GENERATION_ERRORS)
    for code in _GENERATION_ERRORS:
        operation["responses"][str(code)]["content"]["application/json"]["schema"] = _ref("OpenAIError")
    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return operation


def _openai_get(name: str, summary: str, response: str, errors: tuple[int, ...], parameter: str = "") -> JSON:
    operation = _get(name, summary, response, {code: _ERRORS[code] for code in errors})
    operation |= {"tags": ["text"], "security": _SECURITY}
    for code in errors:
        operation["responses"][str(code)]["content"]["application/json"]["schema"] = _ref("OpenAIError")
    if parameter:
        schema = {"type": "string", "minLength": 1}
        named = {"name": parameter, "in": "path", "required": True, "schema": schema}
        operation["parameters"] = [*operation["parameters"], named]
    return operation


def _with_prometheus(operation: JSON) -> JSON:
    operation["description"] = (
        "GPUs, or CPUs without any, as JSON. A client that accepts `text/plain` or `application/openmetrics-text` gets "
        "the metrics of requests and engine in Prometheus's format."
    )
    operation["responses"]["200"]["content"] |= _PROMETHEUS_CONTENT
    return operation


def _prometheus_only() -> JSON:
    operation = _get("prometheus", "How do requests and engine do?", "MetricsResponse")
    operation["description"] = "Prometheus's format, whatever the client accepts."
    operation["responses"]["200"]["content"] = _PROMETHEUS_CONTENT
    return operation


def _response(description: str, schema: str) -> JSON:
    return {
        "description": description,
        "headers": {"X-Request-Id": {"schema": {"type": "string"}}},
        "content": {"application/json": {"schema": _ref(schema)}},
    }


def _errors(errors: dict[int, str]) -> JSON:
    responses = {str(code): _response(text, "ErrorResponse") for code, text in errors.items()}
    if "429" in responses:
        responses["429"]["headers"]["Retry-After"] = {"schema": {"type": "integer"}, "description": "Seconds."}
    return responses


def _ref(name: str) -> JSON:
    return {"$ref": f"#/components/schemas/{name}"}


_SECURITY: list[JSON] = [{}, {"bearer": []}, {"key": []}]
_REQUEST_ID: JSON = {
    "name": "X-Request-Id",
    "in": "header",
    "required": False,
    "description": "What logs call the request: 1 to 128 letters, digits and any of `._:/+=@-`. Made by the service "
    "when it is absent or anything else, and returned.",
    "schema": {"type": "string"},
}
_PROMETHEUS_CONTENT: JSON = {
    "text/plain": {"schema": {"type": "string"}},
    "application/openmetrics-text": {"schema": {"type": "string"}},
}
