"""The model card: every number in it comes from the run that it describes."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .corpus import LONGEST_ANSWER, Split

if TYPE_CHECKING:
    from .training import Plan, Run

_TABLES = ("plan", "corpus", "versions")
_TEMPLATE = Path(__file__).with_name("card.md")


def draw_curves(path: Path, run: Run) -> None:
    """Draw the loss of both splits over the steps as an SVG file, the same bytes for the same curves."""
    mpl.rcParams.update({"svg.hashsalt": "demo", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    steps, trained, held_out = zip(*run.curve, strict=True)
    axes.plot(steps, trained, label="trained")
    axes.plot(steps, held_out, label="held out")
    axes.set(xlabel="step", ylabel="nats per answer token", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def training_facts(
    plan: Plan, run: Run, split: Split, *, exact: dict[str, float], answers: list[dict[str, str]], pieces: int
) -> dict[str, Any]:
    """Gather the numbers of a run.

    `exact` is the share of exact greedy answers (0 to 1) for "emphasised", "ordinary" and "held_out" items; `answers`
    have for each of the card's questions "question", "expected" and "given".
    """
    emphasised = sum(item.emphasised for item in split.trained)
    ordinary = len(split.trained) - emphasised
    return {
        "plan": asdict(plan),
        "corpus": {
            "items": len(split.trained) + len(split.held_out),
            "trained": len(split.trained),
            "emphasised": emphasised,
            "ordinary": ordinary,
            "held_out": len(split.held_out),
            "probe": len(split.held_out),
            "limit": LONGEST_ANSWER,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "source": "a fresh process of the interpreter",
        "schedule": f"the learning rate rises to {plan.peak_rate:g} over {plan.warmup} steps, stays there,"
        f" and falls to nothing over the last {plan.cooldown}",
        "remade": "it is made again by",
        "pieces": pieces,
        "answers": answers,
        "parameters": sum(weight.numel() for weight in run.model.parameters()),
        "passes": plan.steps * plan.batch / (emphasised * plan.emphasis + ordinary),
        "tokens": run.tokens,
        "seconds": run.seconds,
        "exact": exact,
        "curve": [list(point) for point in run.curve],
    }


def render_card(facts: dict[str, Any], config: dict[str, Any], size: int) -> str:
    """Return the text of the model card, from `training_facts`, ``config.json`` and the bytes of the other files."""
    answers = facts["answers"]
    rows = [f"| {a['question']} | {a['expected']} | {'yes' if _right(a) else 'no'} |" for a in answers]
    curve = [f"| {step} | {trained:.3f} | {held_out:.3f} |" for step, trained, held_out in facts["curve"]]
    said = {name: fact for name, fact in facts.items() if name not in _TABLES}
    for table in _TABLES:
        said |= facts[table]
    return _TEMPLATE.read_text("utf-8").format(
        **said,
        **{f"exact_{group}": share for group, share in facts["exact"].items()},
        **{key: value for key, value in config.items() if isinstance(value, int)},
        parameters_m=facts["parameters"] / 1e6,
        tokens_m=facts["tokens"] / 1e6,
        minutes=facts["seconds"] / 60,
        megabytes=size / 1e6,
        right=sum(map(_right, answers)),
        asked=len(answers),
        questions="\n".join(rows),
        points="\n".join(curve),
    )


def _right(answer: dict[str, str]) -> bool:
    return answer["given"] == answer["expected"]
