"""The JSON files of a checkpoint, whose entries are checked."""

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from edge_phi3.conversion import CheckpointError
from edge_phi3.files import read_bounded

MAX_BYTES = 256 << 20
"""Largest file of text that is read; the tokenizer.json of Phi-4-mini has 15 MiB."""

LARGEST = (1 << 31) - 1
Size = Annotated[int, msgspec.Meta(ge=1, le=LARGEST)]
PositiveNumber = Annotated[float, msgspec.Meta(ge=1.2e-38, le=3.4e38)]
"""What float32 holds as a normal number, as a GGUF does."""

_T = TypeVar("_T")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a file that holds a JSON object, as `read_text` does; return None when there is no such file."""
    text = read_text(path)
    if text is None:
        return None
    try:
        content = json.loads(text)
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()  # refuses half a character
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return content


def read_text(path: Path) -> str | None:
    """Read a file in UTF-8, with or without its byte-order mark; return None when there is no such file."""
    try:
        return read_bounded(path, MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from error


def typed(content: object, kind: type[_T], source: str) -> _T:
    """Return what a JSON file holds as the type that it should have."""
    try:
        return msgspec.convert(content, kind, str_keys=True)
    except RecursionError:
        raise CheckpointError(f"{source}: it is nested too deeply.") from None
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        entry = where.strip("`").removeprefix("$").removeprefix(".")
        raise CheckpointError(f"{source}: {entry and f'{entry}: '}{what[0].lower()}{what[1:]}.") from error
