"""What a person may write for MODEL, and what it means."""

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.files import NotGgufError, check_magic, shown

KNOWN = json.loads(Path(__file__).with_name("presets.json").read_text("utf-8"))
PRESETS: dict[str, str] = KNOWN["repositories"]
"""Short names of repositories on the Hub."""

DEMO = "phi-3-demo"
"""The name of the bundled model."""

_REPOSITORY = r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
_REVISION = r"(?:@(?P<revision>refs/pr/\d+|[^/@\s]+))?"
_FILE = r"(?:/(?P<file>[^@]+\.gguf))?"
_HUB = re.compile(_REPOSITORY + _REVISION + _FILE, re.ASCII)

_SPLIT_FILE = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class ModelReferenceError(EdgePhi3Error):
    """A MODEL that means nothing."""


@dataclass(frozen=True, slots=True)
class LocalGguf:
    """A GGUF file, served where it lies."""

    path: Path

    @property
    def name(self) -> str:
        """The name the model is served under."""
        return shown(self.path.stem)


@dataclass(frozen=True, slots=True)
class LocalCheckpoint:
    """A checkpoint folder, to be converted; `name` is what the model is served under."""

    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class HubCheckpoint:
    """A checkpoint on the Hub: repository ``owner/name`` at a branch, tag or commit."""

    repository: str
    revision: str
    name: str

    @property
    def text(self) -> str:
        """The reference as a person may write it."""
        return self.repository + ("" if self.revision == "main" else f"@{self.revision}")


@dataclass(frozen=True, slots=True)
class HubGguf:
    """Ready-made GGUF files on the Hub: `files` are paths in the repository, more than one when it is split."""

    repository: str
    revision: str
    files: tuple[str, ...]

    @property
    def text(self) -> str:
        """The reference as a person may write it."""
        return f"{self.repository}{'' if self.revision == 'main' else f'@{self.revision}'}/{self.files[0]}"

    @property
    def name(self) -> str:
        """The name the model is served under."""
        return _SPLIT_FILE.sub("", Path(self.files[0]).name).removesuffix(".gguf")


Reference = LocalGguf | LocalCheckpoint | HubCheckpoint | HubGguf


def parse_reference(text: str | None) -> Reference:
    """Return what a MODEL is; `ModelReferenceError` says what is allowed.

    It is ``demo``, ``phi-3-demo`` or None for the bundled model; a preset; ``owner/name[@revision]``;
    ``owner/name[@revision]/path/file.gguf``; a checkpoint folder; a GGUF file. What exists on this machine comes before
    a repository of the same name.
    """
    text = (text or DEMO).strip()
    if text in {DEMO, "demo"}:
        return LocalCheckpoint(DEMO_CHECKPOINT, DEMO)
    if text.lower() in PRESETS:
        return HubCheckpoint(PRESETS[text.lower()], "main", text.lower())
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return _file(path)
    if re.match(r"https?://", text):
        raise ModelReferenceError(
            f"{text} is a URL; name a Hub repository as owner/name or owner/name/file.gguf (HF_ENDPOINT chooses a"
            " mirror), or download the file and give its path."
        )
    if match := _HUB.fullmatch(text):
        return _hub(text, match)
    if path.is_absolute() or text.startswith((".", "~")):
        raise ModelReferenceError(f"{text} does not exist; give a checkpoint folder or a GGUF file.")
    close = difflib.get_close_matches(text.lower(), [DEMO, *PRESETS], n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    raise ModelReferenceError(
        f"{text!r} is neither a file nor a folder here, nor a model's name: give {', '.join([DEMO, *PRESETS])},"
        f" a Hub repository owner/name[@revision], or a file in it, owner/name/file.gguf.{meant}"
    )


def _folder(path: Path) -> LocalCheckpoint:
    if not (path / "config.json").exists():
        if inside := sorted(path.glob("*.gguf")):
            raise ModelReferenceError(f"{path} has no config.json; it holds {inside[0].name}, give that file.")
        # Takes longer to import than all that a reference needs.
        from edge_phi3.conversion.checkpoint import no_checkpoint  # noqa: PLC0415 (see above)

        raise ModelReferenceError(str(no_checkpoint(path)))
    return LocalCheckpoint(path, shown(path.resolve().name))


def _file(path: Path) -> LocalGguf:
    try:
        check_magic(path, "give a GGUF, or the folder of a checkpoint.")
    except NotGgufError as error:
        raise ModelReferenceError(str(error)) from error
    if (split := _SPLIT_FILE.search(path.name)) and split[1] != "00001":
        first = _SPLIT_FILE.sub(f"-00001-of-{split[2]}.gguf", path.name)
        raise ModelReferenceError(f"{path} is a later part of a split model; give its first part, {first}.")
    return LocalGguf(path)


def _hub(text: str, match: re.Match[str]) -> HubCheckpoint | HubGguf:
    repository, revision, file = match["repository"], match["revision"] or "main", match["file"]
    if ".." in repository or "--" in repository:
        raise ModelReferenceError(f"{text!r}: the name of a repository has neither '..' nor '--'.")
    if file is None:
        return HubCheckpoint(repository, revision, repository)
    if any(part in {"", ".", ".."} for part in file.split("/")) or "\\" in file:
        raise ModelReferenceError(f"{text!r}: {file!r} is not a path within a repository.")
    split = _SPLIT_FILE.search(file)
    count = int(split[2]) if split else 0
    if split is None or not 1 <= int(split[1]) <= count:
        return HubGguf(repository, revision, (file,))
    stem = file[: split.start()]
    return HubGguf(repository, revision, tuple(f"{stem}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)))
