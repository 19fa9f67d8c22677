"""What ``config.json`` says on rotary positions, in whichever place and spelling.

transformers 4 reads ``rope_scaling``, with ``rope_theta`` beside it; transformers 5 writes ``rope_parameters`` with all
of it inside, and takes ``rope_scaling`` where a file has both. Files that went through several hands have both.
"""

import dataclasses
import math
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_phi3.conversion.errors import CheckpointError, UnsupportedModelError
from edge_phi3.conversion.json_files import LARGEST, PositiveNumber, typed

_FIELDS = ("rope_scaling", "rope_parameters")
_LONGROPE_SPELLINGS = ("longrope", "su", "yarn")
_FACTORS = ("short_factor", "long_factor")

# Entries that may stand beside the two as well, and what Phi3Config assumes when they stand nowhere.
_BESIDE = {"rope_theta": 10000.0, "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0}


class _Beside(msgspec.Struct, omit_defaults=True):
    rope_theta: PositiveNumber | None = None
    original_max_position_embeddings: Annotated[int, msgspec.Meta(ge=2, le=LARGEST)] | None = None
    partial_rotary_factor: PositiveNumber | None = None


class _Inside(_Beside, omit_defaults=True):
    rope_type: Any = None
    type: Any = None
    short_factor: list[PositiveNumber] | None = None
    long_factor: list[PositiveNumber] | None = None
    attention_factor: PositiveNumber | None = None


class _Places(_Beside, omit_defaults=True):
    rope_scaling: _Inside | None = None
    rope_parameters: _Inside | None = None


@dataclasses.dataclass(frozen=True)
class LongRope:
    """The rope scaling of the long-context models.

    The factors divide the rotary frequencies up to the original context length, and beyond it: float32, shape
    (rotated elements of a head / 2,). Cosines and sines are multiplied by `attention_factor`.
    """

    short_factor: NDArray[np.float32]
    long_factor: NDArray[np.float32]
    attention_factor: float


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: the base of the frequencies, the length up to which the short factors hold, the factors.

    `dimensions` are the elements of a head that are rotated, the first ones. `notes` are sentences on entries that
    contradict each other, for whoever converts.
    """

    theta: float
    dimensions: int
    original_context: int
    longrope: LongRope | None
    notes: tuple[str, ...]


def read_rope(config: dict[str, Any], head_size: int, context: int) -> Rope:
    """Check what the entries of ``config.json`` that are not null say on rotary positions.

    `context` is the ``max_position_embeddings``.
    """
    said: dict[str, Any] = msgspec.to_builtins(typed(config, _Places, "config.json"))
    stated = {name: entries for name in _FIELDS if (entries := said.pop(name, None))}
    kinds = {name: _kind(name, entries) for name, entries in stated.items()}
    if len(stated) == 2:
        _refuse_contradictions(said, *stated.values())
    # What stands in two places is the same there, but for the type.
    rope = _BESIDE | said
    for entries in stated.values():
        rope |= entries
    dimensions = int(head_size * rope["partial_rotary_factor"])
    if dimensions % 2 or not 2 <= dimensions <= head_size:
        raise CheckpointError(
            f"config.json: partial_rotary_factor {rope['partial_rotary_factor']} rotates {dimensions} of a head's "
            f"{head_size} elements; an even number, from 2 to all of them, can be rotated."
        )
    original = rope["original_max_position_embeddings"]
    longrope = "longrope" in kinds.values()
    return Rope(
        theta=float(rope["rope_theta"]),
        dimensions=dimensions,
        original_context=original,
        longrope=_longrope(rope, dimensions // 2, context / original, original) if longrope else None,
        notes=_notes(stated, kinds),
    )


def _kind(name: str, entries: dict[str, Any]) -> str:
    stated = [entries[entry] for entry in ("rope_type", "type") if entry in entries]
    for kind in stated:
        if kind != "default" and kind not in _LONGROPE_SPELLINGS:
            raise UnsupportedModelError(
                f"config.json: {name}: the rope scaling type is {kind!r}; "
                "Phi-3 has 'longrope' ('su' in older revisions) or none."
            )
    kinds = {"default" if kind == "default" else "longrope" for kind in stated} or {"default"}
    if len(kinds) > 1:
        raise CheckpointError(
            f"config.json: {name} has the rope_type {stated[0]!r} and the type {stated[1]!r}; "
            "give the one that the model was trained with."
        )
    return kinds.pop()


def _refuse_contradictions(config: dict[str, Any], scaling: dict[str, Any], parameters: dict[str, Any]) -> None:
    for entry in (*_BESIDE, *_FACTORS, "attention_factor"):
        # An object that does not have it leaves it to what stands beside, if anything does.
        beside = config.get(entry, scaling.get(entry, parameters.get(entry)))
        if scaling.get(entry, beside) != parameters.get(entry, beside):
            raise CheckpointError(
                f"config.json: rope_scaling and rope_parameters contradict each other on {entry}; "
                "remove the one that the model was not trained with."
            )


def _notes(stated: dict[str, dict[str, Any]], kinds: dict[str, str]) -> tuple[str, ...]:
    if len(set(kinds.values())) == 2:
        kept, other = sorted(kinds, key=lambda name: kinds[name] != "longrope")
        return (
            f"config.json: {kept} has the factors of longrope and {other} the type 'default'; the factors are kept.",
        )
    if "longrope" in kinds.values():
        return ()
    return tuple(
        f"config.json: {name} has a {entry}, but its type is not 'longrope'; as in transformers, it has no effect."
        for name, entries in stated.items()
        for entry in _FACTORS
        if entry in entries
    )


def _longrope(rope: dict[str, Any], pairs: int, scale: float, original: int) -> LongRope:
    short, long = (np.array(rope.get(name, []), np.float32) for name in _FACTORS)
    for name, factors in zip(_FACTORS, (short, long), strict=True):
        if factors.size != pairs:
            raise CheckpointError(
                f"config.json: the rope scaling's {name} has {factors.size} numbers; "
                f"half of the rotated elements of a head, {pairs}, are needed."
            )
    derived = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0
    return LongRope(short, long, rope.get("attention_factor", derived))
