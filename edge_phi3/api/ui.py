"""The playground at ``/ui``: a page for people, whose every file comes from the package itself."""

from __future__ import annotations

import functools
import hashlib
from importlib.resources import files
from typing import Any, Final

from litestar import Request, Response, get
from litestar.datastructures.headers import Accept
from litestar.di import NamedDependency
from litestar.exceptions import NotFoundException
from litestar.params import FromPath
from litestar.response import Redirect
from msgspec import Struct

from edge_phi3.api.parameter_docs import generate_kwargs_schema
from edge_phi3.api.service import Service

_STATIC = files("edge_phi3.api") / "static" / "ui"
_MEDIA_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'; "
    # Texts can only ever be inserted as texts: the browser itself refuses to parse a string as HTML.
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

GROUPS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    (
        "Essentials",
        (
            "max_new_tokens",
            "do_sample",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "stop_strings",
            "seed",
        ),
    ),
    ("Length and time", ("max_length", "min_new_tokens", "min_length", "max_time")),
    ("Sampling", ("num_return_sequences", "typical_p", "epsilon_cutoff", "eta_cutoff", "renormalize_logits")),
    (
        "Beam search",
        ("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"),
    ),
    (
        "Repetition",
        ("no_repeat_ngram_size", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
    ),
    (
        "Tokens",
        (
            "bad_words_ids",
            "sequence_bias",
            "suppress_tokens",
            "begin_suppress_tokens",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "exponential_decay_length_penalty",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        ),
    ),
    ("Response", ("return_dict_in_generate", "output_scores", "remove_invalid_values")),
)
"""The sections of the form; a parameter that none of them names has its place in a last one, "More"."""

ROOM_FOR_AN_ANSWER: Final = 512
"""New tokens that the page asks for at first: the API's default counts the prompt, which a conversation outgrows."""


class ParameterGroup(Struct):
    """A section of the form."""

    title: str
    parameters: list[str]


class PlaygroundConfig(Struct):
    """What the page needs to know of the service.

    Attributes:
        groups: the sections of the form.
        parameters: the JSON schema of each parameter, with meaning, range and default.
        initial: what a new visitor's form holds. Counting tokens takes `return_dict_in_generate`.
        needs_key: whether the service has API keys.
        end_token_ids: tokens that end a sequence unless a request names others; empty while the model loads.
    """

    groups: list[ParameterGroup]
    parameters: dict[str, Any]
    initial: dict[str, Any]
    needs_key: bool
    end_token_ids: list[int]


@get("/ui", sync_to_thread=False)
def playground(request: Request[Any, Any, Any]) -> Response[Any]:
    """Show the playground."""
    if request.scope["raw_path"].endswith(b"/"):
        return Redirect("../ui", status_code=307)  # the page's links are relative to the folder that `ui` lies in
    return _file(request, "index.html")


@get("/ui/config.json", sync_to_thread=False)
def playground_config(service: NamedDependency[Service]) -> Response[PlaygroundConfig]:
    """Tell the page what the service takes."""
    parameters = generate_kwargs_schema()["properties"]
    pipeline = service.loaded
    config = PlaygroundConfig(
        groups=groups_of(list(parameters)),
        parameters=parameters,
        initial={
            "max_new_tokens": min(ROOM_FOR_AN_ANSWER, service.settings.max_new_tokens or ROOM_FOR_AN_ANSWER),
            "return_dict_in_generate": True,
        },
        needs_key=bool(service.keys),
        end_token_ids=[] if pipeline is None else list(pipeline.engine.model.defaults.eos_token_ids),
    )
    return Response(config, headers={"Cache-Control": "no-store"})


@get("/ui/{name:str}", sync_to_thread=False)
def playground_file(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[Any]:
    """Give one of the page's files."""
    return _file(request, name)


HANDLERS = [playground, playground_config, playground_file]
"""The page's routes."""


def prefers_html(accept: str) -> bool:
    """Tell whether an ``Accept`` header asks for a page rather than for JSON, as browsers do and clients do not."""
    try:
        return Accept(accept).best_match(["application/json", "text/html"]) == "text/html"
    except OverflowError:  # a weight of "inf"
        return False


def groups_of(names: list[str]) -> list[ParameterGroup]:
    """Divide parameters into the sections of the form: each name once."""
    groups = [ParameterGroup(title, [name for name in members if name in names]) for title, members in GROUPS]
    placed = {name for group in groups for name in group.parameters}
    rest = [name for name in names if name not in placed]
    return groups + [ParameterGroup("More", rest)] * bool(rest)


@functools.cache
def _files() -> dict[str, tuple[bytes, str, str]]:
    """Give content, media type and entity tag of each file."""
    found = {}
    for file in _STATIC.iterdir():
        media_type = _MEDIA_TYPES.get(file.name.rpartition(".")[2])
        if media_type is not None:
            content = file.read_bytes()
            found[file.name] = (content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def _file(request: Request[Any, Any, Any], name: str) -> Response[Any]:
    if name not in _files():
        raise NotFoundException
    content, media_type, tag = _files()[name]
    headers = _HEADERS | {"ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(b"", status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)
