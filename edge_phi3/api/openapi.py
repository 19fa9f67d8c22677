"""The OpenAPI document: every route, request, response and status code, made from the types that the code uses."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import msgspec

from edge_phi3.api import schemas
from edge_phi3.api.openai import schemas as openai_schemas
from edge_phi3.generation.reference import generate_kwargs_schema
from edge_phi3.version import __version__

JSON = dict[str, Any]

_NOT_LOADED = "The model is not loaded yet"
_ERRORS = {
    400: "The request is wrong; the sentence names the field and what is allowed.",
    401: "The service needs an API key (only where keys are set).",
    404: "No model of this name is served.",
    413: "The body is larger than --max-body-size.",
    415: "The body is not said to be JSON.",
    429: "The queue is full, or the rate limit is reached; Retry-After says when to try again.",
    500: "llama.cpp failed on the request, or the service met an error of its own.",
    503: f"{_NOT_LOADED}, or the service is stopping.",
    504: "The request took longer than --request-timeout.",
}
_GENERATION = (400, 401, 413, 415, 429, 500, 503, 504)
_TOKENS = (400, 401, 413, 415, 429, 503)

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
    """Return the document as JSON."""
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
    chat = _operation(
        "chat", "Continue a prompt or a conversation.", "ChatResponse", _GENERATION, request="ChatRequest"
    )
    chat["requestBody"]["content"]["application/json"]["examples"] = _CHAT_EXAMPLES
    chat["responses"]["200"]["description"] = f"The answer. {_STREAM_TEXT}"
    conversation = _openai(
        "chatCompletions", "Continue a conversation", "ChatCompletion", _GENERATION, request="ChatCompletionRequest"
    )
    completion = _openai("completions", "Continue prompts", "Completion", _GENERATION, request="CompletionRequest")
    for operation in (chat, conversation, completion):
        operation["responses"]["200"]["content"]["text/event-stream"] = {
            "schema": {"description": "Server-sent events, each with JSON as its `data`."}
        }
    model = _openai("showModel", "Describe the model", "Model", (401, 404, 503))
    model["parameters"].append(
        {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    )
    home = _operation("home", "Check that the service is there.", "RunningResponse")
    home["responses"]["307"] = {"description": "A browser, which prefers HTML, is sent to the playground."}
    metrics = _operation("metrics", "Show the state of the machine.", "MetricsResponse")
    metrics["description"] = (
        "GPUs, or CPUs without any, as JSON. A client that accepts `text/plain` or `application/openmetrics-text` gets "
        "the metrics of requests and engine in Prometheus's format."
    )
    metrics["responses"]["200"]["content"] |= _PROMETHEUS
    prometheus = _operation("prometheus", "Show the metrics of requests and engine.", "MetricsResponse")
    prometheus["description"] = "Prometheus's format, whatever the client accepts."
    prometheus["responses"]["200"]["content"] = _PROMETHEUS
    tokenize = _operation(
        "tokenize", "Split a text into tokens.", "TokenizeResponse", _TOKENS, request="TokenizeRequest"
    )
    detokenize = _operation(
        "detokenize", "Turn tokens into text.", "DetokenizeResponse", _TOKENS, request="DetokenizeRequest"
    )
    posts = {
        "/chat": chat,
        "/v1/chat/completions": conversation,
        "/v1/completions": completion,
        "/tokenize": tokenize,
        "/detokenize": detokenize,
    }
    gets = {
        "/v1/models": _openai("listModels", "List the models that are served", "ModelList", (401, 503)),
        "/v1/models/{name}": model,
        "/": home,
        "/healthz": _health(
            "healthz",
            "Check that the model is loaded and the engine works.",
            500,
            f"{_NOT_LOADED}, or the engine is broken.",
        ),
        "/livez": _health("livez", "Check that the process works.", 500, "The engine is broken; only a restart helps."),
        "/readyz": _health("readyz", "Check that requests are accepted.", 503, _ERRORS[503]),
        "/version": _operation("version", "Show the versions and the model.", "VersionResponse"),
        "/metrics": metrics,
        "/metrics/prometheus": prometheus,
    }
    return {path: {"post": operation} for path, operation in posts.items()} | {
        path: {"get": operation} for path, operation in gets.items()
    }


def _operation(
    name: str, summary: str, response: str, errors: tuple[int, ...] = (), *, request: str = "", error: str = ""
) -> JSON:
    """Return an operation, which needs a key where it has errors."""
    operation: JSON = {
        "operationId": name,
        "summary": summary,
        "tags": ["text" if errors else "operations"],
        "parameters": [_REQUEST_ID],
        "responses": {"200": _response("The answer.", response)},
    }
    for code in errors:
        operation["responses"][str(code)] = _response(_ERRORS[code], error or "ErrorResponse")
    if errors:
        operation["security"] = [{}, {"bearer": []}, {"key": []}]
    if 429 in errors:
        headers = operation["responses"]["429"]["headers"]
        headers["Retry-After"] = {"schema": {"type": "integer"}, "description": "Seconds."}
    if request:
        content = {"application/json": {"schema": _ref(request)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _openai(name: str, summary: str, response: str, errors: tuple[int, ...], *, request: str = "") -> JSON:
    return _operation(name, f"{summary} (OpenAI's API).", response, errors, request=request, error="OpenAIError")


def _health(name: str, summary: str, code: int, otherwise: str) -> JSON:
    operation = _operation(name, summary, "HealthResponse")
    operation["responses"] = {
        "200": _response("Yes.", "HealthResponse"),
        str(code): _response(otherwise, "ErrorResponse"),
    }
    return operation


def _response(description: str, schema: str) -> JSON:
    return {
        "description": description,
        "headers": {"X-Request-Id": {"schema": {"type": "string"}}},
        "content": {"application/json": {"schema": _ref(schema)}},
    }


def _ref(name: str) -> JSON:
    return {"$ref": f"#/components/schemas/{name}"}


_REQUEST_ID: JSON = {
    "name": "X-Request-Id",
    "in": "header",
    "required": False,
    "description": "What logs call the request: 1 to 128 letters, digits and any of `._:/+=@-`. Made by the service "
    "when it is absent or anything else, and returned.",
    "schema": {"type": "string"},
}
_PROMETHEUS: JSON = {
    "text/plain": {"schema": {"type": "string"}},
    "application/openmetrics-text": {"schema": {"type": "string"}},
}
