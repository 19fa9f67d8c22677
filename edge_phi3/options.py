"""Every option of the service, once: its default, its meaning, and its range.

The flag ``--ctx-size``, the environment variable ``EDGE_PHI3_CTX_SIZE`` and the key ``ctx-size`` of a TOML file are one
option, a field of `Options`.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict, SecretStr

from edge_phi3.llama.options import Lora
from edge_phi3.settings_text import option


class Options(BaseModel):
    """The options and their ranges; `edge_phi3.settings.Settings` checks the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = option(
        "demo",
        "Model",
        "Model to serve: a preset's name, a Hub repository, a checkpoint folder or a GGUF file.",
    )
    quant: str = option("Q4_K_M", "Model", "Type that a checkpoint is quantised to.", metavar="TYPE")
    store: Path | None = option(
        None,
        "Model",
        "Folder where converted models are stored; the user's cache folder by default.",
        metavar="DIR",
    )
    lora: tuple[Lora, ...] = option(
        (),
        "Model",
        "LoRA adapter (GGUF), with its scale (1 by default); repeatable. With a name, requests choose it by that;"
        " without, all requests have it.",
        metavar="NAME=FILE[:SCALE] or FILE[=SCALE]",
    )
    encode_user_tokens_as_text: bool = option(
        False,
        "Model",
        "Take control tokens that the text of messages spells for text; only those of the chat template itself count.",
    )

    ctx_size: int = option(
        0,
        "Engine",
        "Size of the KV cache in tokens, shared by all sequences; 0 takes the model's context length, at most 8192. A"
        " model with long and short rotary factors (Phi-3-128k) has a second one, half as large, for short sequences.",
        ge=0,
        le=1 << 20,
    )
    parallel: int = option(16, "Engine", "Maximum number of sequences that are decoded together.", ge=1, le=255)
    batch_size: int = option(512, "Engine", "Maximum number of tokens in one decoding step.", ge=1, le=65536)
    threads: int = option(
        0,
        "Engine",
        "Number of CPU threads for the model; 0 takes one for each physical core that the process may use.",
        ge=0,
        le=1024,
    )
    n_gpu_layers: int = option(
        -1, "Engine", "Number of layers on the GPU; -1 puts all of them there when there is a GPU.", ge=-1, le=1000
    )
    mmap: bool = option(
        True, "Engine", "Map the model file, which must not change meanwhile; --no-mmap reads it whole at the start."
    )
    require_gpu: bool = option(
        False, "Engine", "Exit with code 1 when no layer can be put on a GPU, instead of serving from the CPU."
    )
    kv_cache_type: Literal["f32", "f16", "q8_0"] = option(
        "f16", "Engine", "Element type of the KV cache: f32 is exact, q8_0 takes half the memory of f16."
    )
    flash_attn: Literal["auto", "on", "off"] = option(
        "auto", "Engine", "Whether flash attention is used; auto leaves the choice to llama.cpp."
    )
    window_chunk: int = option(
        32,
        "Engine",
        "Number of prompt tokens that are computed at a time beyond the sliding window; 1 is exact.",
        ge=1,
        le=2047,
    )
    prefix_cache: bool = option(
        True,
        "Engine",
        "Keep finished sequences in main memory, so that later prompts with the same beginning start sooner.",
    )
    prefix_cache_mib: int = option(
        0, "Engine", "Main memory for the prefix cache in MiB; 0 takes an eighth of what is free at the start.", ge=0
    )
    exact_seeds: bool = option(
        False,
        "Engine",
        "Run each request with a seed alone, in a cleared cache, so that its answer repeats to the bit; others wait.",
    )
    speculation: str = option(
        "auto",
        "Engine",
        "Number of tokens drafted for each sequence from its own text and checked in one step; auto drafts what pays.",
        pattern=r"^(auto|off|[1-9]|[1-5][0-9]|6[0-4])$",
        metavar="auto|off|N",
    )
    stall_timeout: float = option(
        60.0,
        "Engine",
        "Seconds without a completed step, while requests run, after which the engine counts as stalled: its requests"
        " fail, and /livez answers 500. Never less than ten times the longest step so far; 0 switches this off.",
        ge=0,
        le=86400,
    )
    exit_on_stall: bool = option(
        True, "Engine", "Exit with code 1 when the engine stays stalled for --stall-timeout once more."
    )

    stream_interval: float = option(
        0.1,
        "Engine",
        "Seconds that a streamed token may wait to be sent together with the next ones; the first token never waits,"
        " and 0 sends each token by itself.",
        ge=0,
        le=10,
    )

    host: str = option(
        "127.0.0.1", "Server", "Address to listen on; 0.0.0.0 listens on all of IPv4, :: on all.", min_length=1
    )
    port: int = option(8080, "Server", "TCP port to listen on; 0 takes a free one.", ge=0, le=65535)
    grace_period: float = option(
        25.0, "Server", "Seconds that running requests have to finish after SIGTERM or Ctrl-C.", ge=0, le=86400
    )
    cors_origin: tuple[str, ...] = option(
        (),
        "Server",
        "Web origin whose pages may call the service, * for any; repeatable.",
        metavar="ORIGIN",
    )
    keep_alive: float = option(
        120.0,
        "Server",
        "Seconds that a connection stays open for another request: longer than proxies and clients keep theirs.",
        ge=0,
        le=86400,
    )
    metrics_prefix: str = option(
        "edge_phi3_",
        "Server",
        "Prefix of the names of Prometheus metrics; vllm: makes them fit vLLM's dashboards.",
        pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]*$",
    )

    api_key: tuple[SecretStr, ...] = option(
        (),
        "Access",
        "API key that clients may send; repeatable. Other processes can see it: prefer --api-key-file. Without any key"
        " the service is open to all.",
        metavar="KEY",
    )
    api_key_file: Path | None = option(
        None,
        "Access",
        "File of API keys, one per line, each with its client's name before it or alone; read again when it changes.",
        metavar="FILE",
    )
    rate_limit: str | None = option(
        None,
        "Access",
        "Maximum rate of requests for each API key, or for each address without keys: 60/minute, 5/second, 1000/hour.",
        metavar="N/UNIT",
        pattern=r"^[1-9][0-9]{0,8}/(second|minute|hour|day)$",
    )
    allowed_host: tuple[str, ...] = option(
        (),
        "Access",
        "Name by which the service may be called (the header Host), * in it for any text; repeatable. Addresses always"
        " may. By default any name may, but on loopback only localhost.",
        metavar="NAME",
    )
    trusted_proxies: tuple[str, ...] = option(
        (),
        "Access",
        "Address or network of a proxy whose X-Forwarded-For is believed, * for any; repeatable.",
        metavar="ADDRESS",
    )

    max_queue: int = option(
        256,
        "Limits",
        "Maximum number of waiting requests; any more are answered 429 with Retry-After.",
        ge=1,
        le=100_000,
    )
    request_timeout: float = option(
        600.0, "Limits", "Maximum time of a request in seconds, waiting included; 0 sets no limit.", ge=0, le=86400
    )
    max_new_tokens: int = option(
        4096, "Limits", "Maximum number of new tokens per sequence that a request may set; 0 sets no limit.", ge=0
    )
    max_sequences: int = option(
        64, "Limits", "Maximum of num_beams x num_return_sequences in a request.", ge=1, le=65536
    )
    max_body_size: ByteSize = option(
        ByteSize(4 << 20),
        "Limits",
        "Maximum size of a request's body in bytes.",
        metavar="SIZE",
        ge=1024,
        le=1 << 30,
    )
    max_schema_size: ByteSize = option(
        ByteSize(64 << 10),
        "Limits",
        "Maximum size of the schemas and grammars of a request, in characters.",
        metavar="SIZE",
        ge=1024,
        le=1 << 24,
    )
    max_schema_depth: int = option(
        100, "Limits", "Maximum number of objects and lists inside each other in a schema.", ge=1, le=500
    )
    max_header_size: ByteSize = option(
        ByteSize(64 << 10),
        "Limits",
        "Maximum size of a request's line and headers in bytes.",
        metavar="SIZE",
        ge=1024,
        le=1 << 20,
    )
    max_connections: int = option(
        512,
        "Limits",
        "Maximum number of open connections; for one more, the one that has waited for its client longest is closed.",
        ge=1,
        le=100_000,
    )
    header_timeout: float = option(
        20.0, "Limits", "Maximum time in which a request's headers arrive, in seconds.", ge=0.01, le=86400
    )
    body_timeout: float = option(
        120.0, "Limits", "Maximum time in which a request's body arrives, in seconds.", ge=0.01, le=86400
    )
    send_timeout: float = option(
        60.0, "Limits", "Maximum time that a client may leave its answer unread, in seconds.", ge=0.01, le=86400
    )

    otel_endpoint: str | None = option(
        None,
        "Logs",
        "URL of an OpenTelemetry collector that receives traces over OTLP/HTTP, such as http://127.0.0.1:4318;"
        " OTEL_EXPORTER_OTLP_ENDPOINT by default.",
        metavar="URL",
        pattern=r"^https?://[^\s]+$",
    )
    log_format: Literal["text", "json"] = option(
        "text", "Logs", "Format of log lines: text for people, json for machines."
    )
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "Logs", "Lowest level that is logged.")
    log_prompts: bool = option(False, "Logs", "Log prompts and answers too.")
