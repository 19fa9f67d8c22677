"""What the simulated users ask: sessions of one or more turns, the same ones for every server and every run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from edge_phi3.bench.answers import Answer
from edge_phi3.bench.errors import BenchError, ExchangeError
from edge_phi3.bench.targets import Ask, Sampling, Target

WORDS: tuple[str, ...] = tuple(Path(__file__).with_name("words.txt").read_text(encoding="ascii").split())
"""Frequent English words, most of which are one token in most vocabularies."""

_FEWEST_WORDS = 32

FORMS = "64, 16-128 (uniform), normal:MEAN,SD, lognormal:MEDIAN,SIGMA or exponential:MEAN"
"""The forms that `Lengths.parse` reads, for help texts and messages."""

_Draw = Callable[[np.random.Generator], float]
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens.

    Attributes:
        text: how it was written.
        draw_real: draws one value, before it is rounded and kept at 1 or above.
    """

    text: str
    draw_real: _Draw

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read one of the `FORMS`.

        Raises:
            BenchError: it is none of them.
        """
        kind, _, rest = text.strip().partition(":")
        if not rest:
            low, separator, high = kind.partition("-")
            if low.isdecimal() and int(low) > 0 and not separator:
                return cls(text, lambda _: int(low))
            if low.isdecimal() and high.isdecimal() and 0 < int(low) <= int(high):
                return cls(text, lambda random: int(random.integers(int(low), int(high) + 1)))
        else:
            numbers = [float(part) for part in rest.split(",") if _NUMBER.fullmatch(part.strip())]
            draw = _named(kind, numbers) if len(numbers) == len(rest.split(",")) else None
            if draw is not None:
                return cls(text, draw)
        raise BenchError(f"{text!r} is not a distribution of lengths; give {FORMS}.")

    def draw(self, random: np.random.Generator) -> int:
        """Draw one length, at least 1."""
        return max(1, round(self.draw_real(random)))


def _named(kind: str, numbers: Sequence[float]) -> _Draw | None:
    match kind, numbers:
        case "normal", [mean, deviation] if mean > 0:
            return lambda random: random.normal(mean, deviation)
        case "lognormal", [median, sigma] if median > 0:
            return lambda random: random.lognormal(np.log(median), sigma)
        case "exponential", [mean] if mean > 0:
            return lambda random: random.exponential(mean)
    return None


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a server.

    Attributes:
        prompt_tokens: length of each user turn, in one of the forms of `Lengths`.
        output_tokens: tokens to generate for each turn.
        turns: turns of a session; each continues the conversation so far.
        shared_prefix: tokens in front of the first turn that sessions have in common.
        prefixes: how many such prefixes there are, taken by chance.
        temperature: 0 is greedy.
        top_k: sampling from the best k; 0 for all.
        top_p: sampling from the best of this probability mass.
        ignore_eos: generate `output_tokens` whatever the model says.
        stream: ask for server-sent events. Without them there is no time to first token.
        send_seeds: give each sampled request a seed, so that its answer is the same in each run. A server may then
            take longer: edge-phi3 decodes seeded requests one by one when it was started with --exact-seeds.
        seed: of everything drawn here.
    """

    prompt_tokens: str = "64"
    output_tokens: str = "64"
    turns: str = "1"
    shared_prefix: int = 0
    prefixes: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    ignore_eos: bool = False
    stream: bool = True
    send_seeds: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Session:
    """One user's conversation.

    Attributes:
        number: which session of the run it is.
        users: what the user says in each turn.
        max_tokens: how many tokens are generated in each turn.
    """

    number: int
    users: Sequence[str]
    max_tokens: Sequence[int]

    def ask(self, said: Sequence[str], workload: Workload) -> Ask:
        """Return the request of the turn that follows `said`, the conversation so far (user and assistant in turn)."""
        turn = len(said) // 2
        seeded = workload.send_seeds and workload.temperature > 0
        return Ask(
            turns=[*said, self.users[turn]],
            max_tokens=self.max_tokens[turn],
            sampling=Sampling(workload.temperature, workload.top_k, workload.top_p),
            ignore_eos=workload.ignore_eos,
            seed=(workload.seed * 1_000_003 + self.number * 101 + turn) % 2**31 if seeded else None,
            stream=workload.stream,
        )


class Sessions(Protocol):
    """Return session number `number`, always the same one."""

    def __call__(self, number: int, /) -> Session:
        """Return a session."""


@dataclass(frozen=True, slots=True)
class Ruler:
    """How text becomes tokens on a server.

    Attributes:
        words: words to write with.
        tokens_per_word: tokens that each takes.
        overhead: tokens that the server puts around a text.
        exact: whether a text has as many tokens as asked for.
    """

    words: Sequence[str]
    tokens_per_word: float
    overhead: int
    exact: bool

    def text(self, tokens: int, random: np.random.Generator, *, first: bool) -> str:
        """Write a text of so many tokens; the first of a conversation counts the server's own in."""
        count = max(1, round((tokens - (self.overhead if first else 0)) / self.tokens_per_word))
        chosen = random.integers(0, len(self.words), count).tolist()
        return " ".join([self.words[i] for i in chosen])


async def measure_ruler(target: Target) -> Ruler:
    """Find out how a server counts tokens.

    With a ``/tokenize`` endpoint only words of one token each are used, and lengths are exact. Otherwise one request
    over all words gives their mean length; a server that does not report it is taken to have one token a word.

    Raises:
        BenchError: the server does not generate.
    """
    overhead = await target.count_tokens("")
    if overhead is not None:
        words = await _single_token_words(target, WORDS, overhead)
        if len(words) >= _FEWEST_WORDS:
            return Ruler(words, 1.0, overhead, exact=True)
        total = await target.count_tokens(" ".join(WORDS)) or len(WORDS)
        return Ruler(WORDS, (total - overhead) / len(WORDS), overhead, exact=False)
    answer = Answer()
    ask = Ask([" ".join(WORDS)], 1, Sampling(), ignore_eos=False, seed=None, stream=True)
    try:
        await target.generate(ask, answer)
    except ExchangeError as error:
        raise BenchError(f"{target.client.url}{target.path} does not generate: {error}") from None
    return Ruler(WORDS, (answer.prompt_tokens or len(WORDS)) / len(WORDS), 0, exact=False)


async def _single_token_words(target: Target, words: Sequence[str], overhead: int) -> list[str]:
    """Find the words of one token each by halving: texts of such words have as many tokens as words."""
    if await target.count_tokens(" ".join(words)) == overhead + len(words):
        return list(words)
    if len(words) == 1:
        return []
    half = len(words) // 2
    return [
        *await _single_token_words(target, words[:half], overhead),
        *await _single_token_words(target, words[half:], overhead),
    ]


class RandomSessions:
    """Sessions of random words.

    Args:
        workload: lengths, prefixes, turns.
        ruler: how text becomes tokens.

    Raises:
        BenchError: a distribution of the workload cannot be read.
    """

    def __init__(self, workload: Workload, ruler: Ruler) -> None:
        self._workload = workload
        self._ruler = ruler
        self._prompt = Lengths.parse(workload.prompt_tokens)
        self._output = Lengths.parse(workload.output_tokens)
        self._turns = Lengths.parse(workload.turns)
        random = np.random.default_rng([workload.seed, 0])
        self._prefixes = [
            ruler.text(workload.shared_prefix, random, first=True) + " "
            for _ in range(workload.prefixes if workload.shared_prefix else 0)
        ]

    def __call__(self, number: int) -> Session:
        """Return session `number`."""
        random = np.random.default_rng([self._workload.seed, number + 1])
        prefix = self._prefixes[int(random.integers(len(self._prefixes)))] if self._prefixes else ""
        users, outputs = [], []
        for turn in range(self._turns.draw(random)):
            text = self._ruler.text(self._prompt.draw(random), random, first=turn == 0 and not prefix)
            users.append(prefix + text if turn == 0 else f" {text}")
            outputs.append(self._output.draw(random))
        return Session(number, users, outputs)


class FileSessions:
    """Sessions of one turn from a file of prompts, in a shuffled order.

    Args:
        path: one prompt a line: plain text, or JSON as ``{"prompt": "...", "max_tokens": 64}``.
        workload: gives the output lengths where a line does not.

    Raises:
        BenchError: the file cannot be read, or a line is not one of these.
    """

    def __init__(self, path: Path, workload: Workload) -> None:
        try:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise BenchError(f"The prompts in {path} cannot be read: {error}.") from None
        if not lines:
            raise BenchError(f"{path} holds no prompt; write one a line.")
        self._prompts = [_prompt_of(path, number, line) for number, line in enumerate(lines, 1)]
        self._order = np.random.default_rng(workload.seed).permutation(len(lines))
        self._output = Lengths.parse(workload.output_tokens)
        self._seed = workload.seed

    def __call__(self, number: int) -> Session:
        """Return session `number`; they begin anew after the last one."""
        prompt, max_tokens = self._prompts[int(self._order[number % len(self._order)])]
        random = np.random.default_rng([self._seed, number + 1])
        return Session(number, [prompt], [max_tokens or self._output.draw(random)])


def _prompt_of(path: Path, number: int, line: str) -> tuple[str, int | None]:
    if not line.lstrip().startswith("{"):
        return line, None
    try:
        entry: dict[str, Any] = json.loads(line)
        prompt, max_tokens = entry["prompt"], entry.get("max_tokens")
    except (json.JSONDecodeError, KeyError) as error:
        raise BenchError(f'{path}, line {number}: {error}; give {{"prompt": "...", "max_tokens": 64}}.') from None
    if not isinstance(prompt, str) or not (max_tokens is None or (isinstance(max_tokens, int) and max_tokens > 0)):
        raise BenchError(f"{path}, line {number}: prompt must be a text and max_tokens a positive integer.")
    return prompt, max_tokens
