"""Services to be tried: small random models of four kinds, and the options that each is served with."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edge_phi3.conversion.convert import convert
from tests.golden.checkpoints import longrope, write_checkpoint

LONG_ROPE: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "sliding_window": 262144,
    "rope_scaling": longrope(16),
}
KINDS: dict[str, dict[str, Any]] = {
    "4k": {"sliding_window": 2047},
    "128k": LONG_ROPE,
    "window of 64": {"sliding_window": 64},
    "grouped": {"kv_heads": 2},
    "window of 16": {"sliding_window": 16},
    "window of 3": {"sliding_window": 3},
}
"""What `write_checkpoint` makes each kind of model with."""

USUAL_KINDS = ("4k", "128k", "window of 64", "grouped")

ORIGINAL_CONTEXT = 4096
_DEFAULT_CTX_SIZE = 8192
_CTX_SIZES = (8192, 1024, 2048, 4096, 768, 3000, 5000, 6144)


def make_model(folder: Path, kind: str, seed: int) -> Path:
    """Make a model of a kind from a seed, with F32 weights; return its GGUF."""
    checkpoint = write_checkpoint(folder / f"{kind} checkpoint", seed=seed, gain=2.0, **KINDS[kind])
    return convert(checkpoint, folder / f"{kind}.gguf", outtype="f32").path


@dataclass(frozen=True, slots=True)
class Setup:
    """A kind of model and the options that it is served with.

    Attributes:
        kind: a key of `KINDS`.
        ctx_size: as in ``--ctx-size``, 0 for the default.
        parallel: as in ``--parallel``.
        batch_size: as in ``--batch-size``.
        prefix_cache: whether finished prefixes are kept, or only one MiB of them.
        exact_seeds: whether a request with a seed repeats to the last bit.
        max_queue: as in ``--max-queue``.
        window_chunk: as in ``--window-chunk``; above 1 answers beyond the window depend on what else runs.
        request_timeout: seconds that a request may take.
    """

    kind: str
    ctx_size: int = 0
    parallel: int = 16
    batch_size: int = 512
    prefix_cache: Literal["on", "off", "tiny"] = "on"
    exact_seeds: bool = False
    max_queue: int = 256
    window_chunk: int = 1
    request_timeout: float = 120.0

    @property
    def cells(self) -> int:
        """KV cells that are asked for."""
        return self.ctx_size or min(self.context_length, _DEFAULT_CTX_SIZE)

    @property
    def is_exact(self) -> bool:
        """Whether a request that can be repeated has the same answer whatever else runs."""
        return self.window_chunk == 1 or self.window > self.context_length

    @property
    def context_length(self) -> int:
        """Tokens that the model says it was trained for."""
        length: int = KINDS[self.kind].get("max_position_embeddings", ORIGINAL_CONTEXT)
        return length

    @property
    def window(self) -> int:
        """Tokens that attention reaches back."""
        window: int = KINDS[self.kind].get("sliding_window", 2047)
        return window

    def arguments(self, *, prefix_cache: bool = True) -> list[str]:
        """Return the arguments of ``edge-phi3 serve`` after the model's path.

        Args:
            prefix_cache: False to have none, whatever the setup says.
        """
        exact = ["--kv-cache-type", "f32", "--window-chunk", str(self.window_chunk), "--threads", "1"]
        limits = ["--request-timeout", f"{self.request_timeout:g}", "--max-body-size", "262144", "--grace-period", "2"]
        options = [*exact, *limits, "--log-format", "json", "--parallel", str(self.parallel)]
        options += ["--max-queue", str(self.max_queue), "--batch-size", str(self.batch_size)]
        options += ["--exact-seeds"] * self.exact_seeds + ["--ctx-size", str(self.ctx_size)] * bool(self.ctx_size)
        if self.prefix_cache == "off" or not prefix_cache:
            options.append("--no-prefix-cache")
        elif self.prefix_cache == "tiny":
            options += ["--prefix-cache-mib", "1"]
        return options


def make_setups(seed: int, count: int) -> list[Setup]:
    """Return so many setups from a seed, kinds in turn: each at its defaults, with 8,000 cells, 512, and others."""
    chance, kinds = random.Random(seed), USUAL_KINDS
    sizes = {kind: [0, 8000, 512, *chance.sample(_CTX_SIZES, len(_CTX_SIZES))] for kind in kinds}
    sizes["128k"].insert(3, 20_000)  # several sequences outgrow the original context in this one
    parallels, batches, caches = ([16, 4], [512, 64, 16, 1], ["on", "tiny", "off"])
    setups = []
    for number in range(count):
        turn, kind = number // len(kinds), kinds[number % len(kinds)]
        default = turn == 0
        setups.append(
            Setup(
                kind,
                ctx_size=sizes[kind][turn % len(sizes[kind])],
                parallel=16 if default else chance.choice(parallels),
                batch_size=512 if default else chance.choice(batches),
                prefix_cache="on" if default else chance.choice(caches),  # type: ignore[arg-type]
                exact_seeds=turn == 1 or (turn > 1 and chance.random() < 0.5),
                window_chunk=32 if turn > 1 and chance.random() < 0.3 else 1,
                max_queue=4 if not default and chance.random() < 0.2 else 256,
            )
        )
    return setups
