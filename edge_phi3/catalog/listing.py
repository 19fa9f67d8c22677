"""What a repository lists, and which of it a conversion needs. Its names come from strangers: none may lead astray."""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from edge_phi3.errors import EdgePhi3Error

INDEX = "model.safetensors.index.json"

CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
)
"""What a checkpoint may have beside its weights; the README holds the licence."""

_SMALL_LIMIT = 256 << 20
"""Bytes: the tokenizer of no model comes near, and a hostile one must not fill the disk."""

_SHARD = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors", re.ASCII)


class HubError(EdgePhi3Error):
    """The Hub refuses, or does not have, what was requested, or a download arrived damaged."""


class UnreachableError(HubError):
    """There is no network, no answer, or `HF_HUB_OFFLINE` is set."""


class RemoteFile(NamedTuple):
    """A file of a repository. `sha256` is known of large files, `blob_id` (git's SHA-1) of small ones."""

    name: str
    size: int | None
    sha256: str | None
    blob_id: str | None


class Snapshot(NamedTuple):
    """A repository at one commit, with its files by name."""

    repository: str
    commit: str
    files: dict[str, RemoteFile]


def small_files(snapshot: Snapshot) -> list[RemoteFile]:
    """Return the files of a checkpoint without its weights, the index of its shards included."""
    if "config.json" not in snapshot.files or not _weights(snapshot, []):
        raise HubError(_what_it_holds(snapshot))
    found = [snapshot.files[name] for name in (*CHECKPOINT_FILES, INDEX) if name in snapshot.files]
    for file in found:
        if file.size is not None and file.size > _SMALL_LIMIT:
            raise HubError(f"{file.name} of {snapshot.repository} has {file.size:,} bytes, which it never should.")
    return found


def weight_files(snapshot: Snapshot, folder: Path) -> list[RemoteFile]:
    """Return the files of the weights, once the index lies in `folder`, if there is one; the converter takes them."""
    from edge_phi3.conversion.checkpoint import WEIGHTS_NAME, set_of  # noqa: PLC0415 (see `_weights`)

    asked = INDEX in snapshot.files and WEIGHTS_NAME not in snapshot.files
    named = set(_shards(snapshot, folder / INDEX)) if asked else set()
    chosen = _weights(snapshot, named)
    sets = {set_of(name) for name in chosen} - {None}
    for name in sorted(named - snapshot.files.keys()):
        if set_of(name) in sets:
            raise HubError(f"{snapshot.repository} lacks the file {name} that its {INDEX} names.")
    return [snapshot.files[name] for name in chosen]


def _weights(snapshot: Snapshot, named: Collection[str]) -> list[str]:
    # Takes longer to import than all the rest of a start that finds its model in the store.
    from edge_phi3.conversion.checkpoint import choose_weights  # noqa: PLC0415 (see above)

    return choose_weights(filter(_SHARD.fullmatch, snapshot.files), named)


def gguf_files(snapshot: Snapshot, names: tuple[str, ...]) -> list[RemoteFile]:
    """Return ready-made GGUF files by their names."""
    for name in names:
        if name not in snapshot.files:
            others = _ggufs(snapshot)
            holds = f"it holds {', '.join(others)}" if others else "it holds no GGUF at all"
            raise HubError(f"{snapshot.repository} has no file {name} at {snapshot.commit[:12]}; {holds}.")
    return [snapshot.files[name] for name in names]


def _shards(snapshot: Snapshot, index: Path) -> Iterator[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HubError(f"{INDEX} of {snapshot.repository} is not an index of shards ({error}).") from error
    for name in names:
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise HubError(
                f"{INDEX} of {snapshot.repository} names {name!r}, which is not the name of a file beside it;"
                " the repository is damaged, or hostile."
            )
        yield name


def _what_it_holds(snapshot: Snapshot) -> str:
    from edge_phi3.conversion.checkpoint import ADAPTER_CONFIG, adapter_error  # noqa: PLC0415 (see `_weights`)

    ggufs = _ggufs(snapshot)
    if ggufs:
        example = f"{snapshot.repository}/{ggufs[0]}"
        return (
            f"{snapshot.repository} holds no safetensors checkpoint but GGUF files ({', '.join(ggufs)});"
            f" name one of them, such as {example}."
        )
    if ADAPTER_CONFIG in snapshot.files:
        return str(adapter_error(snapshot.repository))
    if any(name.endswith((".bin", ".pt", ".pth")) for name in snapshot.files):
        return (
            f"{snapshot.repository} holds only pickled weights (.bin), which can run code and are never loaded;"
            " use a repository with safetensors."
        )
    return f"{snapshot.repository} holds no config.json with safetensors beside it: it is not a checkpoint."


def _ggufs(snapshot: Snapshot) -> list[str]:
    return sorted(name for name in snapshot.files if name.endswith(".gguf"))
