"""Log lines on stderr: for people (text) or for machines (JSON), from structlog and the standard library alike."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import msgspec
import structlog
from structlog.types import Processor


def configure_logging(log_format: Literal["text", "json"], level: str) -> None:
    """Send every log line of the process to stderr in one format.

    Args:
        log_format: "text" for people, "json" for one object a line.
        level: the least that is logged: "debug", "info", "warning" or "error".
    """
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if log_format == "json":
        shared.append(structlog.processors.format_exc_info)
        renderer: Processor = structlog.processors.JSONRenderer(serializer=_to_json)
    else:
        # The plain traceback: others show local variables, and with them prompts and keys.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
        )
    least = logging.getLevelNamesMapping()[level.upper()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=least, force=True)
    # uvicorn logs each start and stop, which the service itself does better.
    logging.getLogger("uvicorn.error").setLevel(max(least, logging.WARNING))
    for chatty in ("httpx", "gguf"):
        logging.getLogger(chatty).setLevel(max(least, logging.WARNING))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def _to_json(value: object, **_: object) -> str:
    return msgspec.json.encode(value, enc_hook=str).decode()
