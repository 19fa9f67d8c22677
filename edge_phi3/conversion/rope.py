"""What ``config.json`` says on rotary positions, in whichever place and spelling.

transformers 4 reads ``rope_scaling``, with ``rope_theta`` beside it; transformers 5 writes ``rope_parameters`` with all
of it inside, and takes ``rope_scaling`` where a file has both. Files that went through several hands have both.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_phi3.conversion.checkpoint import integer, is_number, number, shown
from edge_phi3.conversion.errors import CheckpointError, UnsupportedModelError

_FIELDS = ("rope_scaling", "rope_parameters")
_LONGROPE_SPELLINGS = ("longrope", "su", "yarn")
_FACTORS = ("short_factor", "long_factor")

# Entries that may stand beside the two as well, and what Phi3Config assumes when they stand nowhere.
_BESIDE = {"rope_theta": 10000.0, "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0}


@dataclasses.dataclass(frozen=True)
class LongRope:
    """The rope scaling of the long-context models.

    Attributes:
        short_factor: divisors of the rotary frequencies up to the original context length, float32, (head size / 2,).
        long_factor: the same beyond it.
        attention_factor: by which cosines and sines are multiplied.
    """

    short_factor: NDArray[np.float32]
    long_factor: NDArray[np.float32]
    attention_factor: float


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Attributes:
        theta: the base of the frequencies.
        original_context: the length up to which the short factors hold.
        longrope: the factors of a long-context model.
        notes: sentences on entries that contradict each other, for whoever converts.
    """

    theta: float
    original_context: int
    longrope: LongRope | None
    notes: tuple[str, ...]


def read_rope(config: dict[str, Any], pairs: int, context: int) -> Rope:
    """Check what a ``config.json`` says on rotary positions.

    Args:
        config: its entries that are not null.
        pairs: half of the head size.
        context: ``max_position_embeddings``.

    Raises:
        UnsupportedModelError: the positions are of a kind that cannot be converted.
        CheckpointError: an entry is impossible, or two contradict each other.
    """
    stated = {name: entries for name in _FIELDS if (entries := _entries(config, name))}
    kinds = {name: _kind(name, entries) for name, entries in stated.items()}
    if len(stated) == 2:
        _refuse_contradictions(config, *stated.values())
    # What stands in two places is the same there, but for the type.
    rope = _BESIDE | {name: config[name] for name in _BESIDE if name in config}
    for entries in stated.values():
        rope |= entries
    partial = number(rope, "partial_rotary_factor")
    if partial != 1.0:
        raise UnsupportedModelError(
            f"config.json: partial_rotary_factor is {partial}, as in Phi-4-mini; only models that rotate "
            "whole heads can be converted."
        )
    original = integer(rope, "original_max_position_embeddings", minimum=2)
    return Rope(
        theta=number(rope, "rope_theta"),
        original_context=original,
        longrope=_longrope(rope, pairs, context / original, original) if "longrope" in kinds.values() else None,
        notes=_notes(stated, kinds),
    )


def _entries(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json: {name} must be an object or null.")
    return {entry: content for entry, content in value.items() if content is not None}


def _kind(name: str, entries: dict[str, Any]) -> str:
    stated = [entries[entry] for entry in ("rope_type", "type") if entry in entries]
    for kind in stated:
        if kind != "default" and kind not in _LONGROPE_SPELLINGS:
            raise UnsupportedModelError(
                f"config.json: {name}: the rope scaling type is {shown(kind)}; "
                "Phi-3 has 'longrope' ('su' in older revisions) or none."
            )
    kinds = {"default" if kind == "default" else "longrope" for kind in stated} or {"default"}
    if len(kinds) > 1:
        raise CheckpointError(
            f"config.json: {name} has the rope_type {shown(stated[0])} and the type {shown(stated[1])}; "
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
    factors = {}
    for name in _FACTORS:
        values = rope.get(name)
        if not isinstance(values, list) or not all(is_number(value) and value > 0 for value in values):
            raise CheckpointError(f"config.json: the rope scaling's {name} must be a list of positive numbers.")
        if len(values) != pairs:
            raise CheckpointError(
                f"config.json: the rope scaling's {name} has {len(values)} numbers; "
                f"half of the head size, {pairs}, are needed."
            )
        factors[name] = np.array(values, np.float32)
    attention_factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0
    if "attention_factor" in rope:
        attention_factor = number(rope, "attention_factor")
    return LongRope(factors["short_factor"], factors["long_factor"], attention_factor)
