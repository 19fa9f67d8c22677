"""Services to be tried: kinds of models, and the options that they are served with."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_phi3.conversion.convert import convert
from edge_phi3.settings import ENV_PREFIX, Settings
from tests.golden.checkpoints import long_context, longrope, write_checkpoint
from tests.golden.family import FAMILY

KINDS: dict[str, dict[str, Any]] = {
    "4k": {"sliding_window": 2047},
    "128k": long_context(),
    "window of 64": {"sliding_window": 64},
    "grouped": {"sliding_window": 2047, "kv_heads": 2},
    "window of 16": {"sliding_window": 16},
    "window of 8": {"sliding_window": 8},
    "phi-4-mini": FAMILY["phi-4-mini-instruct"] | {"hidden_size": 128, "rope_scaling": longrope(24)},
}
"""What `write_checkpoint` makes each kind of model with."""

USUAL_KINDS = ("4k", "128k", "window of 64", "grouped", "phi-4-mini")
ORIGINAL_CONTEXT = 4096
_CTX_SIZES = (8192, 1024, 2048, 4096, 768, 3000, 5000, 6144)
_EXACT = {"kv_cache_type": "f32", "threads": 1, "window_chunk": 1}
_LIMITS = {"request_timeout": 600.0, "max_body_size": 262144, "grace_period": 2.0, "log_format": "json"}


def make_model(folder: Path, kind: str, seed: int) -> Path:
    """Make a model of a kind from a seed, with F32 weights; return its GGUF."""
    checkpoint = write_checkpoint(folder / f"{kind} checkpoint", **{"seed": seed, "gain": 2.0} | KINDS[kind])
    return convert(checkpoint, folder / f"{kind}.gguf", outtype="f32").path


@dataclass(frozen=True)
class Setup:
    """A kind of model, a key of `KINDS`, options by the names of `Settings`, and how many adapters are served."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    adapters: int = 0

    @property
    def settings(self) -> Settings:
        return Settings.model_validate(_EXACT | _LIMITS | self.options)

    @property
    def cells(self) -> int:
        return self.settings.ctx_size or min(self.context_length, 8192)

    @property
    def context_length(self) -> int:
        return KINDS[self.kind].get("max_position_embeddings", ORIGINAL_CONTEXT)

    @property
    def window(self) -> int:
        return KINDS[self.kind]["sliding_window"]

    @property
    def is_exact(self) -> bool:
        """Whether a request that can be repeated has the same answer whatever else runs."""
        return self.settings.window_chunk == 1 or self.window > self.context_length

    def environment(self, **more: Any) -> dict[str, str]:
        """Return the environment of ``edge-phi3 serve`` that gives it these options and more."""
        options = _EXACT | _LIMITS | self.options | more
        return {ENV_PREFIX + name.upper(): str(value).lower() for name, value in options.items()}


def make_setups(seed: int, count: int) -> list[Setup]:
    """Return so many setups from a seed, kinds in turn: each at its defaults, with 8,000 cells, 512, and others."""
    chance = random.Random(seed)
    sizes = {kind: [0, 8000, 512, *chance.sample(_CTX_SIZES, len(_CTX_SIZES))] for kind in USUAL_KINDS}
    sizes["128k"].insert(3, 20_000)  # several sequences outgrow the original context in this one
    setups = []
    for number in range(count):
        turn, kind = number // len(USUAL_KINDS), USUAL_KINDS[number % len(USUAL_KINDS)]
        options: dict[str, Any] = {}
        if turn > 0:
            options = {
                "ctx_size": sizes[kind][turn % len(sizes[kind])],
                "parallel": chance.choice((16, 4)),
                "batch_size": chance.choice((512, 64, 16, 1)),
                "exact_seeds": turn == 1 or chance.random() < 0.5,
                # Above 1, answers beyond the window depend on what else runs.
                "window_chunk": 32 if turn > 1 and chance.random() < 0.3 else 1,
                "speculation": chance.choice(("auto", "off", 3)),
                "max_queue": 4 if chance.random() < 0.2 else 256,
                **chance.choice(({}, {"prefix_cache_mib": 1}, {"prefix_cache": False})),
            }
        setups.append(Setup(kind, options, chance.choice((0, 0, 2)) if turn else 0))
    return setups
