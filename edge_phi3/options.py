"""Every option of the service, once: its default, its meaning, its range, and what it is called.

The flag ``--ctx-size``, the environment variable ``EDGE_PHI3_CTX_SIZE`` and the key ``ctx-size`` of a TOML file are one
option, a field of `Options`.
"""

import functools
import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, PlainSerializer, SecretStr
from pydantic.fields import FieldInfo
from pydantic.types import JsonValue

from edge_phi3.llama.options import Lora


def _option(group: str, default: Any, description: str, *, metavar: str = "", **constraints: Any) -> Any:
    """Declare one option: a pydantic field that also knows its group and metavar in ``--help``."""
    extra: dict[str, JsonValue] = {"group": group, "metavar": "SIZE" if isinstance(default, ByteSize) else metavar}
    return Field(default, description=description, json_schema_extra=extra, **constraints)


_model, _engine, _server, _access, _limit, _log = (
    functools.partial(_option, group) for group in ("Model", "Engine", "Server", "Access", "Limits", "Logs")
)

_NUMBER = r"(?P<scale>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)"
_SCALED = re.compile(rf"(?P<file>.+)={_NUMBER}")
_NAMED = re.compile(rf"(?P<name>[A-Za-z0-9][\w.-]*)(?<!\.gguf)=(?P<file>.+?)(:{_NUMBER})?")


def read_lora(text: object) -> object:
    """Return the file, scale and name of a value of ``--lora``: what has a slash before its ``=`` is no name."""
    if not isinstance(text, str):
        return text
    if scaled := _SCALED.fullmatch(text):
        return scaled["file"], scaled["scale"], ""
    if named := _NAMED.fullmatch(text):
        return named["file"], named["scale"] or 1.0, named["name"]
    file, _, scale = text.partition(".gguf=")
    return (text, 1.0, "") if "/" in scale or not scale else (f"{file}.gguf", scale, "")


def write_lora(lora: Lora) -> str:
    """Return an adapter as `read_lora` reads it."""
    return f"{lora.name}={lora.path}:{lora.scale:g}" if lora.name else f"{lora.path}={lora.scale:g}"


_Seconds = Annotated[float, Field(ge=0, le=86400)]
_Moments = Annotated[float, Field(ge=0.01, le=86400)]


class Options(BaseModel):
    """The options and their ranges; `edge_phi3.settings.Settings` checks the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = _model(
        "demo", "Model to serve: a preset's name, a Hub repository, a checkpoint folder or a GGUF file."
    )
    quant: str = _model("Q4_K_M", "Type that a checkpoint is quantised to.", metavar="TYPE")
    store: Path | None = _model(
        None, "Folder where converted models are stored; the user's cache folder by default.", metavar="DIR"
    )
    lora: tuple[Annotated[Lora, BeforeValidator(read_lora), PlainSerializer(write_lora)], ...] = _model(
        (),
        "LoRA adapter (GGUF), with its scale (1 by default); repeatable. With a name, requests choose it by that;"
        " without, all requests have it.",
        metavar="NAME=FILE[:SCALE] or FILE[=SCALE]",
    )
    encode_user_tokens_as_text: bool = _model(
        False,
        "Take control tokens that the text of messages spells for text; only those of the chat template itself count.",
    )

    ctx_size: int = _engine(
        0,
        "Size of the KV cache in tokens, shared by all sequences; 0 takes the model's context length, at most 8192. A"
        " model with long and short rotary factors (Phi-3-128k) has a second one, half as large, for short sequences.",
        ge=0,
        le=1 << 20,
    )
    parallel: int = _engine(16, "Maximum number of sequences that are decoded together.", ge=1, le=255)
    batch_size: int = _engine(512, "Maximum number of tokens in one decoding step.", ge=1, le=65536)
    threads: int = _engine(
        0,
        "Number of CPU threads for the model; 0 takes one for each physical core that the process may use.",
        ge=0,
        le=1024,
    )
    n_gpu_layers: int = _engine(
        -1, "Number of layers on the GPU; -1 puts all of them there when there is a GPU.", ge=-1, le=1000
    )
    mmap: bool = _engine(
        True, "Map the model file, which must not change meanwhile; --no-mmap reads it whole at the start."
    )
    require_gpu: bool = _engine(
        False, "Exit with code 1 when no layer can be put on a GPU, instead of serving from the CPU."
    )
    kv_cache_type: Literal["f32", "f16", "q8_0"] = _engine(
        "f16", "Element type of the KV cache: f32 is exact, q8_0 takes half the memory of f16."
    )
    flash_attn: Literal["auto", "on", "off"] = _engine(
        "auto", "Whether flash attention is used; auto leaves the choice to llama.cpp."
    )
    window_chunk: int = _engine(
        32, "Number of prompt tokens that are computed at a time beyond the sliding window; 1 is exact.", ge=1, le=2047
    )
    prefix_cache: bool = _engine(
        True, "Keep finished sequences in main memory, so that later prompts with the same beginning start sooner."
    )
    prefix_cache_mib: int = _engine(
        0, "Main memory for the prefix cache in MiB; 0 takes an eighth of what is free at the start.", ge=0
    )
    exact_seeds: bool = _engine(
        False,
        "Run each request with a seed alone, in a cleared cache, so that its answer repeats to the bit; others wait.",
    )
    speculation: str = _engine(
        "auto",
        "Number of tokens drafted for each sequence from its own text and checked in one step; auto drafts what pays.",
        pattern=r"^(auto|off|[1-9]|[1-5][0-9]|6[0-4])$",
        coerce_numbers_to_str=True,
        metavar="auto|off|N",
    )
    stall_timeout: _Seconds = _engine(
        60.0,
        "Seconds without a completed step, while requests run, after which the engine counts as stalled: its requests"
        " fail, and /livez answers 500. Never less than ten times the longest step so far; 0 switches this off.",
    )
    exit_on_stall: bool = _engine(True, "Exit with code 1 when the engine stays stalled for --stall-timeout once more.")

    stream_interval: float = _engine(
        0.1,
        "Seconds that a streamed token may wait to be sent together with the next ones; the first token never waits,"
        " and 0 sends each token by itself.",
        ge=0,
        le=10,
    )

    host: str = _server("127.0.0.1", "Address to listen on; 0.0.0.0 listens on all of IPv4, :: on all.", min_length=1)
    port: int = _server(8080, "TCP port to listen on; 0 takes a free one.", ge=0, le=65535)
    grace_period: _Seconds = _server(25.0, "Seconds that running requests have to finish after SIGTERM or Ctrl-C.")
    cors_origin: tuple[str, ...] = _server(
        (), "Web origin whose pages may call the service, * for any; repeatable.", metavar="ORIGIN"
    )
    keep_alive: _Seconds = _server(
        120.0, "Seconds that a connection stays open for another request: longer than proxies and clients keep theirs."
    )
    metrics_prefix: str = _server(
        "edge_phi3_",
        "Prefix of the names of Prometheus metrics; vllm: makes them fit vLLM's dashboards.",
        metavar="PREFIX",
        pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]*$",
    )

    api_key: tuple[SecretStr, ...] = _access(
        (),
        "API key that clients may send; repeatable. Other processes can see it: prefer --api-key-file. Without any key"
        " the service is open to all.",
        metavar="KEY",
    )
    api_key_file: Path | None = _access(
        None,
        "File of API keys, one per line, each with its client's name before it or alone; read again when it changes.",
        metavar="FILE",
    )
    rate_limit: str | None = _access(
        None,
        "Maximum rate of requests for each API key, or for each address without keys: 60/minute, 5/second, 1000/hour.",
        metavar="N/UNIT",
        pattern=r"^[1-9][0-9]{0,8}/(second|minute|hour|day)$",
    )
    allowed_host: tuple[str, ...] = _access(
        (),
        "Name by which the service may be called (the header Host), * in it for any text; repeatable. Addresses always"
        " may. By default any name may, but on loopback only localhost.",
        metavar="NAME",
    )
    trusted_proxies: tuple[str, ...] = _access(
        (), "Address or network of a proxy whose X-Forwarded-For is believed, * for any; repeatable.", metavar="ADDRESS"
    )

    max_queue: int = _limit(
        256, "Maximum number of waiting requests; any more are answered 429 with Retry-After.", ge=1, le=100_000
    )
    request_timeout: _Seconds = _limit(
        600.0, "Maximum time of a request in seconds, waiting included; 0 sets no limit."
    )
    max_new_tokens: int = _limit(
        4096, "Maximum number of new tokens per sequence that a request may set; 0 sets no limit.", ge=0
    )
    max_sequences: int = _limit(64, "Maximum of num_beams x num_return_sequences in a request.", ge=1, le=65536)
    max_body_size: ByteSize = _limit(
        ByteSize(4 << 20), "Maximum size of a request's body in bytes.", ge=1024, le=1 << 30
    )
    max_schema_size: ByteSize = _limit(
        ByteSize(64 << 10), "Maximum size of the schemas and grammars of a request, in characters.", ge=1024, le=1 << 20
    )
    max_schema_depth: int = _limit(
        100, "Maximum number of objects and lists inside each other in a schema.", ge=1, le=500
    )
    max_header_size: ByteSize = _limit(
        ByteSize(64 << 10), "Maximum size of a request's line and headers in bytes.", ge=1024, le=1 << 20
    )
    max_connections: int = _limit(
        512,
        "Maximum number of open connections; for one more, the one that has waited for its client longest is closed.",
        ge=1,
        le=100_000,
    )
    header_timeout: _Moments = _limit(20.0, "Maximum time in which a request's headers arrive, in seconds.")
    body_timeout: _Moments = _limit(120.0, "Maximum time in which a request's body arrives, in seconds.")
    send_timeout: _Moments = _limit(60.0, "Maximum time that a client may leave its answer unread, in seconds.")

    otel_endpoint: str | None = _log(
        None,
        "URL of an OpenTelemetry collector that receives traces over OTLP/HTTP, such as http://127.0.0.1:4318;"
        " OTEL_EXPORTER_OTLP_ENDPOINT by default.",
        metavar="URL",
        pattern=r"^https?://[^\s]+$",
    )
    log_format: Literal["text", "json"] = _log("text", "Format of log lines: text for people, json for machines.")
    log_level: Literal["debug", "info", "warning", "error"] = _log("info", "Lowest level that is logged.")
    log_prompts: bool = _log(False, "Log prompts and answers too.")


def flag_of(name: str) -> str:
    """Return what a field is called on the command line: ``--ctx-size``, but ``MODEL`` for the argument."""
    return "MODEL" if name == "model" else f"--{key_of(name)}"


def key_of(name: str) -> str:
    """Return what a field is called in a TOML file: ``ctx_size`` -> ``ctx-size``."""
    return name.replace("_", "-")


def group_of(field: FieldInfo) -> str:
    """Return the heading under which ``--help`` shows a field."""
    return _extra(field)["group"]


def metavar_of(field: FieldInfo) -> str:
    """Return the placeholder of a field's value in ``--help``, empty to show its type."""
    return _extra(field)["metavar"]


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """Return the words that a field may be, empty when it is not a choice of words."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def allowed_values(field: FieldInfo) -> str:
    """Say what a field may be: "a whole number from 0 to 65535", "one of f32, f16, q8_0"."""
    if choices := choices_of(field):
        return f"one of {', '.join(choices)}"
    if field.annotation is bool:
        return "true or false"
    numbers: dict[Any, str] = {ByteSize: "a size such as 4MiB or 65536,", int: "a whole number", float: "a number"}
    if (kind := numbers.get(field.annotation)) is not None:
        return f"{kind} {_range(field)}"
    explained = {
        "auto|off|N": "auto, off, or a whole number from 1 to 64",
        "PREFIX": "letters, digits, _ and :, of which the first is no digit",
        "N/UNIT": "a count and a unit such as 60/minute (second, minute, hour, day)",
    }
    return explained.get(metavar := metavar_of(field), metavar or "a text that is not empty")


def _extra(field: FieldInfo) -> dict[str, str]:
    return cast("dict[str, str]", field.json_schema_extra)


def _range(field: FieldInfo) -> str:
    low = next((item.ge for item in field.metadata if getattr(item, "ge", None) is not None), None)
    high = next((item.le for item in field.metadata if getattr(item, "le", None) is not None), None)
    return f"of at least {low}" if high is None else f"from {low} to {high}"
