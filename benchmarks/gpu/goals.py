"""What is wanted of a GPU, in one table, and whether the measurements reach it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from benchmarks.gpu.figures import throughput
from benchmarks.gpu.steps import Record

Found = tuple[float, str] | str
"""A value and what it was found in, or why there is none."""


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """One goal.

    Attributes:
        name: what is measured.
        sense: which side of the limit is wanted.
        limit: where it lies.
        unit: of the limit.
        find: finds the value among the records: the worst one, where there are several.
        gpu_only: whether a value from a CPU says nothing about it.
    """

    name: str
    sense: Literal["at least", "under", "at most"]
    limit: float
    unit: str
    find: Callable[[Mapping[str, Record]], Found]
    gpu_only: bool = True


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A goal, and what came of it.

    Attributes:
        goal: its name.
        wanted: the limit in words.
        found: the value, or None.
        met: "met", "not met" or "not measured".
        note: where the value comes from, or why there is none.
    """

    goal: str
    wanted: str
    found: float | None
    met: Literal["met", "not met", "not measured"]
    note: str


def judge(records: Mapping[str, Record], *, gpu: bool) -> list[Verdict]:
    """Compare the records with all goals.

    Args:
        records: by the steps' names.
        gpu: whether they were made on a GPU; where not, a goal that is about GPUs stays not measured.
    """
    return [_judge(goal, records, gpu=gpu) for goal in GOALS]


def _judge(goal: Goal, records: Mapping[str, Record], *, gpu: bool) -> Verdict:
    wanted = f"{goal.sense} {goal.limit:g} {goal.unit}".strip()
    found = goal.find(records)
    if isinstance(found, str):
        return Verdict(goal=goal.name, wanted=wanted, found=None, met="not measured", note=found)
    value, note = found
    if goal.gpu_only and not gpu:
        return Verdict(
            goal=goal.name, wanted=wanted, found=value, met="not measured", note=f"{note}; on a CPU, not a GPU"
        )
    reached = {"at least": value >= goal.limit, "under": value < goal.limit, "at most": value <= goal.limit}
    return Verdict(
        goal=goal.name, wanted=wanted, found=value, met="met" if reached[goal.sense] else "not met", note=note
    )


def _reason(records: Mapping[str, Record], names: Sequence[str]) -> str:
    for name in names:
        record = records.get(name)
        if record is not None and not record.done:
            return f"{name}: {record.missing or record.failure}"
    return f"{names[0]} has not been run" if names else "nothing of it has been run"


def _results(records: Mapping[str, Record], prefix: str) -> dict[str, Any] | str:
    """Give the results of the steps of a prefix; why there are none, when one of them is missing."""
    names = [name for name in records if name.startswith(prefix)]
    found = {name: records[name].result for name in names if records[name].done}
    return found if names and len(found) == len(names) else _reason(records, names or [f"{prefix}*"])


def _one_stream(records: Mapping[str, Record]) -> Found:
    found = _results(records, "speed.stream.")
    if isinstance(found, str):
        return found
    return min((result["ratio"], name) for name, result in found.items())


def _against_llama_server(records: Mapping[str, Record]) -> Found:
    many = [row for row in throughput(records) if row.clients >= 8]
    ratios = [(row.ratio, f"{row.kind}, {row.clients} clients, {row.mode}") for row in many if row.ratio is not None]
    if len(ratios) == len(many) > 0:
        return min(ratios)
    found = _results(records, "speed.throughput.")
    if isinstance(found, str):
        return found
    return next((r["peer_missing"] for r in found.values() if r["peer_missing"]), "not at 8 clients or more")


def _against_transformers(records: Mapping[str, Record]) -> Found:
    record = records.get("speed.transformers")
    if record is None or not record.done:
        return _reason(records, ["speed.transformers"])
    for row in record.result["levels"]:
        if row["clients"] == 32:
            return row["ratio"], f"{record.result['kind']} against bfloat16"
    return "transformers was not asked by 32 clients"


def _memory(step: str) -> Callable[[Mapping[str, Record]], Found]:
    def find(records: Mapping[str, Record]) -> Found:
        record = records.get(step)
        if record is None or not record.done:
            return _reason(records, [step])
        return record.result["ours"] / 1e9, step

    return find


def _differing(step: str) -> Callable[[Mapping[str, Record]], Found]:
    def find(records: Mapping[str, Record]) -> Found:
        record = records.get(step)
        if record is None or not record.done:
            return _reason(records, [step])
        return float(len(record.result["different"])), f"of {record.result['asked']} answers"

    return find


GOALS = (
    Goal(
        name="F32 weights and KV cache: answers with other tokens than transformers'",
        sense="at most", limit=0, unit="", find=_differing("exactness.f32"), gpu_only=False,
    ),
    Goal(name="one stream, over llama-bench", sense="at least", limit=0.97, unit="", find=_one_stream),
    Goal(
        name="8 clients or more, over llama-server", sense="at least", limit=1.1, unit="", find=_against_llama_server
    ),
    Goal(name="32 clients, over transformers", sense="at least", limit=5, unit="", find=_against_transformers),
    Goal(
        name="GPU memory: Q4_K_M, four 4k contexts, F16 KV", sense="under", limit=10, unit="GB",
        find=_memory("speed.memory.four-f16"),
    ),
    Goal(
        name="GPU memory: Q4_K_M, one 4k context, q8_0 KV", sense="under", limit=4.2, unit="GB",
        find=_memory("speed.memory.one-q8_0"),
    ),
)  # fmt: skip
"""The goals of the project for a GPU; of several values the worst one counts. GB are 10^9 bytes."""
