"""From a MODEL to its numbers, without its weights: what planning knows, reads, or downloads of it (one small file)."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from edge_phi3.catalog import PRESETS, Catalog, parse_reference
from edge_phi3.catalog.listing import UnreachableError, small_files
from edge_phi3.catalog.reference import KNOWN, HubCheckpoint, LocalCheckpoint, LocalGguf
from edge_phi3.conversion import ConversionError
from edge_phi3.conversion.checkpoint import open_checkpoint
from edge_phi3.conversion.json_files import read_json
from edge_phi3.conversion.phi3 import Phi3, read_phi3
from edge_phi3.conversion.plan import read_model
from edge_phi3.llama import PlanningError
from edge_phi3.planning.gguf_layout import Layout, read_layout, write_base
from edge_phi3.progress import ProgressReporter


def _config(rope_factors: int = 0, **stated: Any) -> dict[str, Any]:
    # The number of factors, one for each pair of a head's rotated elements, takes memory; their values do not matter.
    factors = dict.fromkeys(("short_factor", "long_factor"), [1.0] * rope_factors)
    return stated | ({"rope_scaling": {"type": "longrope", **factors}} if rope_factors else {})


PRESET_CONFIGS = {PRESETS[name]: _config(**KNOWN["all"] | stated) for name, stated in KNOWN["each"].items()}
"""What the ``config.json`` of the presets says, as far as it decides on memory, by repository."""


def find_base(reference: str, folder: Path, *, store: Path | None, progress: ProgressReporter) -> Layout:
    """Return a model's GGUF, or a skeleton of its checkpoint in F16, which lies in `folder` while it is used."""
    wanted = parse_reference(reference)
    if isinstance(wanted, LocalGguf):
        return read_layout(wanted.path)
    if isinstance(wanted, LocalCheckpoint):
        return write_base(folder / "base.gguf", _read_checkpoint(wanted.path))
    if isinstance(wanted, HubCheckpoint):
        known = PRESET_CONFIGS.get(wanted.repository) if wanted.revision == "main" else None
        model = read_phi3(known) if known else _download_config(wanted, progress)
        return write_base(folder / "base.gguf", model)
    if stored := Catalog(store).find(wanted):
        return read_layout(stored.path)
    raise PlanningError(
        f"{wanted.text} is not in the store, and what it takes stands in the file itself: `edge-phi3 pull"
        f" {wanted.text}` first, or plan for the checkpoint that it was made from."
    )


def _read_checkpoint(folder: Path) -> Phi3:
    # What it is, and whether its output matrix is one of its own, the weights tell; a plan does without where there are
    # none.
    with contextlib.suppress(ConversionError):
        return read_model(open_checkpoint(folder))
    return _read_config(folder)


def _read_config(folder: Path) -> Phi3:
    config = read_json(folder / "config.json")
    assert config is not None, "parse_reference asks for it"
    return read_phi3(config)


def _download_config(wanted: HubCheckpoint, progress: ProgressReporter) -> Phi3:
    # Takes longer to import than all the rest of a plan that needs no network.
    from edge_phi3.catalog.hub import Repository  # noqa: PLC0415 (see above)

    try:
        repository = Repository(wanted.repository, wanted.revision, progress)
        config = next(file for file in small_files(repository.snapshot) if file.name == "config.json")
        with tempfile.TemporaryDirectory(prefix="edge-phi3-fit-") as folder:
            repository.fetch([config], Path(folder))
            return _read_config(Path(folder))
    except UnreachableError as error:
        raise PlanningError(
            f"The config.json of {wanted.text} is needed, and {error}; name the folder of its checkpoint, or one of"
            f" {', '.join(PRESETS)}, which need no network."
        ) from error
