"""The limits of a request, for docs/security.md: each option's default, and what is fixed."""

from collections.abc import Iterator

from pydantic.fields import FieldInfo

from edge_phi3 import templates
from edge_phi3.api import body, connection, errors, service
from edge_phi3.api.openai import translate
from edge_phi3.engine.tokenizer import MOST_TOKENS
from edge_phi3.generation.config import LONGEST_STOP, MOST_PHRASES
from edge_phi3.generation.parameters import OPENAI_PARAMETERS
from edge_phi3.generation.values import LONGEST_SHOWN
from edge_phi3.options import flag_of
from edge_phi3.settings import Settings

_OPTIONS = (
    ("headers", "bytes of the request line and headers", "max_header_size"),
    ("headers", "seconds until they have arrived", "header_timeout"),
    ("body", "bytes", "max_body_size"),
    ("body", "seconds until it has arrived", "body_timeout"),
    ("counts", "prompts in one request", "max_queue"),
    ("counts", "`num_beams` x `num_return_sequences`", "max_sequences"),
    ("counts", "new tokens of a sequence", "max_new_tokens"),
    ("text", "characters of schemas and grammars", "max_schema_size"),
    ("depth", "schemas and grammars inside each other", "max_schema_depth"),
    ("text", "tokens of a prompt and its answer; 0: the model's context", "ctx_size"),
    ("time", "seconds of a request, until its body is prepared and again until its answer is whole", "request_timeout"),
    ("time", "seconds that an answer may stay unread", "send_timeout"),
    ("time", "seconds until the next request on a connection", "keep_alive"),
    ("time", "seconds that running requests have once the service is told to stop", "grace_period"),
    ("connections", "open at once", "max_connections"),
    ("connections", "waiting requests", "max_queue"),
    ("connections", "requests of a client", "rate_limit"),
)
"""What is limited, how it is counted, and the option that sets it."""


def markdown() -> str:
    """Return the table: those that an option sets, and those that are fixed, by what they limit."""
    rows = [
        (what, unit, f"`{flag_of(name)}`", default_of(Settings.model_fields[name]) or "none")
        for what, unit, name in _OPTIONS
    ]
    rows += [(what, unit, "fixed", f"`{value}`") for what, unit, value in _fixed()]
    rows.sort(key=lambda row: row[0])
    lines = [("limits of", "counted in", "set by", "default"), ("---",) * 4, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def default_of(field: FieldInfo) -> str:
    """Return an option's default as Markdown, empty where there is none."""
    if field.default in (None, ()):
        return ""
    shown = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return f"`{shown.removesuffix('.0')}`"


def _fixed() -> Iterator[tuple[str, str, int | str]]:
    yield "body", "chunks of any size; more must hold 16 bytes on average", connection.FREE_CHUNKS
    yield "body", "bytes, beyond which it is prepared by a thread, beside all other requests", service.LONG
    for lane, threads in service.THREADS.items():
        kind = {"long": "such bodies", "foreign": "of those, conversations for a template of strangers"}.get(lane)
        yield "body", f"{kind or f'of those, bodies of {service.LONGEST} bytes and more'} prepared at once", threads
    yield "body", f"numbers; a text, name, list, object, digit past {body.ORDINARY} is {body.COSTLY}", body.MOST_VALUES
    yield "names", "characters of one in an error", LONGEST_SHOWN
    yield "names", "ignored fields that the answer names", body.MOST_IGNORED
    yield "names", "characters of each", body.LONGEST_IGNORED
    yield "names", "characters of an error", errors.LONGEST_SENTENCE
    yield "depth", "lists and objects inside each other; Python's own limit, about", 1000
    yield "counts", "texts in `stop`", translate.MOST_STOPS
    yield "counts", "texts or phrases of several tokens that are banned, biased, or stop an answer", MOST_PHRASES
    yield "text", "characters of a text in `stop` or `stop_strings`", LONGEST_STOP
    yield "counts", "tokens of a text", MOST_TOKENS
    yield "counts", "`top_logprobs`", int(OPENAI_PARAMETERS["top_logprobs"].value.kind.limits["maximum"])
    yield "text", "characters, beyond which a prompt is not tokenised", "the context x the longest token"
    yield "template", "seconds of the processor, for one that is not the family's own", templates.MOST_SECONDS
    yield "template", "bytes of memory, likewise", templates.MOST_MEMORY
    yield "template", "characters that it makes", templates.MOST_CHARACTERS
