"""Log lines on stderr: for people (text) or for machines (JSON), from structlog and the standard library alike."""

import io
import logging
import sys
from typing import Any, Literal, TextIO

import msgspec
import structlog
from structlog.types import EventDict, ExcInfo, Processor

from edge_phi3.api.exchange import Exchange

access_logger = structlog.get_logger("edge_phi3.access")


def configure_logging(log_format: Literal["text", "json"], level: str) -> None:
    """Send all log lines of the process, from `level` up, to stderr: text for people, or JSON, one object a line."""
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if log_format == "json":
        shared.append(structlog.processors.format_exc_info)
        renderer: Processor = structlog.processors.JSONRenderer(
            serializer=lambda value, **_: msgspec.json.encode(value, enc_hook=str).decode()
        )
    else:
        # The plain traceback: others show local variables, and with them prompts and keys.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=_indented_traceback
        )
    least = logging.getLevelNamesMapping()[level.upper()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _escape, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=least, force=True)
    # uvicorn logs each start, stop and refusal, which the service itself does better.
    logging.getLogger("uvicorn.error").setLevel(max(least, logging.ERROR))
    for chatty in ("httpx", "gguf"):
        logging.getLogger(chatty).setLevel(max(least, logging.WARNING))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def _escape(_: Any, __: str, event: EventDict) -> EventDict:
    """Keep an entry on its line, whatever texts of strangers are in it, and the terminal as it is."""
    return {name: _printable(value) if isinstance(value, str) else value for name, value in event.items()}


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _indented_traceback(stream: TextIO, error: ExcInfo) -> None:
    """Write a traceback of which no line can be taken for an entry of its own."""
    written = io.StringIO()
    structlog.dev.plain_traceback(written, error)
    stream.writelines(f"    {_printable(line)}\n" for line in written.getvalue().split("\n"))


def log_exchange(exchange: Exchange) -> None:
    """Log the end of a request in one line."""
    log = access_logger.debug if exchange.is_probe else access_logger.info
    facts: dict[str, Any] = {"status": exchange.status, "ms": round(exchange.seconds * 1e3, 1)}
    output = exchange.output
    facts |= {name: value for name in ("key", "error") if (value := getattr(exchange, name)) is not None}
    if output is not None:
        decoding = output.timing.total - output.timing.first_token
        facts |= {
            "prompt_tokens": output.prompt_tokens,
            "cached_tokens": output.cached_tokens,
            "completion_tokens": output.completion_tokens,
            "finish": ",".join(output.finish_reasons),
            "queue_ms": round(output.timing.queue * 1e3, 1),
            "ttft_ms": round(output.timing.first_token * 1e3, 1),
            "tokens_per_second": round((output.completion_tokens - 1) / decoding, 1) if decoding > 0 else None,
        }
    if exchange.prompt is not None:
        facts |= {"prompt": exchange.prompt, "answer": output.text if output else None}
    log(f"{exchange.scope['method']} {exchange.path[:300]}", request_id=exchange.request_id, **facts)
