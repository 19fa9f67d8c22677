"""What the simulated users send: sessions of one or more turns, the same ones for every server and every run."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import rich_click as click

from edge_phi3.bench import BenchError
from edge_phi3.bench.options import ONE_OR_MORE, ZERO_OR_MORE, Option
from edge_phi3.files import read_bounded

WORDS: tuple[str, ...] = tuple(Path(__file__).with_name("words.txt").read_text(encoding="ascii").split())
"""Frequent English words, most of which are one token in most vocabularies."""

FORMS = "64, 16-128 (uniform), normal:MEAN,SD, lognormal:MEDIAN,SIGMA or exponential:MEAN"
"""The forms that `parse_lengths` reads, for help texts and messages."""


def parse_lengths(text: str) -> Callable[[np.random.Generator], int]:
    """Return what draws lengths in tokens, at least 1, from a distribution in one of the `FORMS`."""
    draw: Callable[[np.random.Generator], float] | None = None
    if uniform := re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip()):
        low, high = int(uniform[1]), int(uniform[2] or uniform[1])
        draw = (lambda random: float(random.integers(low, high + 1))) if 0 < low <= high else None
    elif named := re.fullmatch(r"(\w+):([\d.]+)(?:,\s*([\d.]+))?", text.strip()):
        try:
            draw = _named(named[1], [float(number) for number in named.groups()[1:] if number])
        except ValueError:
            draw = None
    if draw is None:
        raise BenchError(f"{text!r} is not a distribution of lengths; give {FORMS}.")
    return lambda random: max(1, round(draw(random)))


def _named(kind: str, numbers: Sequence[float]) -> Callable[[np.random.Generator], float] | None:
    match kind, numbers:
        case "normal", [mean, deviation] if mean > 0:
            return lambda random: random.normal(mean, deviation)
        case "lognormal", [median, sigma] if median > 0:
            return lambda random: random.lognormal(np.log(median), sigma)
        case "exponential", [mean] if mean > 0:
            return lambda random: random.exponential(mean)
    return None


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """The requests to a server: options of `edge-phi3 bench serve`."""

    prompt_tokens: Annotated[str, Option(f"Length of each user turn in tokens: {FORMS}.", metavar="LENGTHS")] = "64"
    output_tokens: Annotated[str, Option("Length of each answer in tokens, in the same forms.", metavar="LENGTHS")] = (
        "64"
    )
    turns: Annotated[str, Option("Number of turns of a session, in the same forms.", metavar="LENGTHS")] = "1"
    shared_prefix: Annotated[
        int, Option("Number of tokens that sessions have in common at their beginning.", ZERO_OR_MORE)
    ] = 0
    prefixes: Annotated[int, Option("Number of different shared prefixes.", ONE_OR_MORE)] = 1
    temperature: Annotated[
        float, Option("Sampling temperature; 0 always takes the most likely token.", click.FloatRange(min=0))
    ] = 0.0
    top_k: Annotated[int, Option("Sample from the K most likely tokens. [default: all]", ZERO_OR_MORE)] = 0
    top_p: Annotated[
        float,
        Option(
            "Sample from the most likely tokens of this probability mass together. [default: 1]",
            click.FloatRange(0, 1, min_open=True),
        ),
    ] = 1.0
    ignore_eos: Annotated[bool, Option("Generate answers of the full length, past end tokens.")] = False
    stream: Annotated[bool, Option("Stream answers as server-sent events.")] = True
    seed: Annotated[int, Option("Random seed; the same seed sends the same prompts.", ZERO_OR_MORE)] = 0


class Ask(NamedTuple):
    """One request, in no server's language; `turns` begin and end with the user's, the assistant's between them."""

    turns: Sequence[str]
    max_tokens: int
    how: Workload


class Session(NamedTuple):
    """One user's conversation: what the user says, and how many tokens are generated, in each turn."""

    number: int
    users: Sequence[str]
    max_tokens: Sequence[int]
    workload: Workload

    def ask(self, said: Sequence[str]) -> Ask:
        """Return the request of the turn that follows `said`, the conversation so far (user and assistant in turn)."""
        turn = len(said) // 2
        return Ask([*said, self.users[turn]], self.max_tokens[turn], self.workload)


class Ruler(NamedTuple):
    """How text becomes tokens on a server: words of `tokens_per_word` each, and `overhead` that it puts around a text.

    `exact` is whether a text has exactly the requested number of tokens.
    """

    words: Sequence[str]
    tokens_per_word: float
    overhead: int
    exact: bool

    def text(self, tokens: int, random: np.random.Generator, *, first: bool) -> str:
        """Return a text of so many tokens; in the first of a conversation the server's own are counted."""
        count = max(1, round((tokens - (self.overhead if first else 0)) / self.tokens_per_word))
        return " ".join([self.words[i] for i in random.integers(0, len(self.words), count).tolist()])


class RandomSessions:
    """Sessions of random words, of a workload's lengths, prefixes and turns; always the same one of a number."""

    def __init__(self, workload: Workload, ruler: Ruler) -> None:
        self.workload = workload
        self._ruler = ruler
        self._prompt = parse_lengths(workload.prompt_tokens)
        self._output = parse_lengths(workload.output_tokens)
        self._turns = parse_lengths(workload.turns)
        random = np.random.default_rng([workload.seed, 0])
        self._prefixes = [
            ruler.text(workload.shared_prefix, random, first=True) + " "
            for _ in range(workload.prefixes if workload.shared_prefix else 0)
        ]

    def __call__(self, number: int) -> Session:
        """Return session `number`."""
        random = np.random.default_rng([self.workload.seed, number + 1])
        prefix = self._prefixes[int(random.integers(len(self._prefixes)))] if self._prefixes else ""
        users, outputs = [], []
        for turn in range(self._turns(random)):
            text = self._ruler.text(self._prompt(random), random, first=turn == 0 and not prefix)
            users.append(prefix + text if turn == 0 else f" {text}")
            outputs.append(self._output(random))
        return Session(number, users, outputs, self.workload)


class _Line(msgspec.Struct):
    prompt: str
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None


class FileSessions:
    """Sessions of one turn from a file of prompts, in a shuffled order; they begin anew after the last one.

    A line is plain text, or JSON as ``{"prompt": "...", "max_tokens": 64}``; else the workload gives output lengths.
    """

    def __init__(self, path: Path, workload: Workload) -> None:
        try:
            text = read_bounded(path, 256 << 20, regular=False).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise BenchError(f"The prompts in {path} cannot be read: {error}.") from None
        if not (lines := [line for line in text.splitlines() if line.strip()]):
            raise BenchError(f"{path} holds no prompt; write one a line.")
        self.workload = workload
        self._prompts = [_read_line(path, number, line) for number, line in enumerate(lines, 1)]
        self._order = np.random.default_rng(workload.seed).permutation(len(lines))
        self._output = parse_lengths(workload.output_tokens)

    def __call__(self, number: int) -> Session:
        """Return session `number`."""
        line = self._prompts[int(self._order[number % len(self._order)])]
        random = np.random.default_rng([self.workload.seed, number + 1])
        return Session(number, [line.prompt], [line.max_tokens or self._output(random)], self.workload)


def _read_line(path: Path, number: int, line: str) -> _Line:
    if not line.lstrip().startswith("{"):
        return _Line(line)
    try:
        return msgspec.json.decode(line, type=_Line)
    except msgspec.MsgspecError as error:
        raise BenchError(f'{path}, line {number}: {error}; give {{"prompt": "...", "max_tokens": 64}}.') from None


Sessions = RandomSessions | FileSessions
