"""Random scenarios, each from one number."""

import random
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from tests.golden.requests import RequestMaker
from tests.support.hash_context import TOKEN_BYTES
from tests.support.scenarios import FAULTS, INFINITE, NAN, TEXTS, Ask, Failure, Scenario
from tests.support.schemas import GRAMMARS

USUAL = range(1, NAN)
_LENGTHS = ("max_new_tokens", "max_length", "min_length", "min_new_tokens")
_BEAMS = ("num_beams", "num_beam_groups", "diversity_penalty", "num_return_sequences")
PLAIN = {*_LENGTHS, *_BEAMS, "do_sample", "seed", "temperature", "top_k"}
"""The parameters of most requests."""
_MODES = ("greedy", "sample", "beam", "beam_sample", "group_beam")


def random_scenario(seed: int) -> Scenario:
    return _Maker(seed).make()


class _Maker:
    """Makes one scenario.

    Most are crowded: requests that come together, go on for long, and want more cells than there are.
    """

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.crowded = self.often(0.6)
        self.requests = RequestMaker(seed, USUAL, texts=TEXTS, most_beams=self.chance.choice((4, 4, 6, 8)))
        self.scenario = self._engine()
        stem = self.between(8, 24) if self.crowded else self._length()
        self.stems = [self.some(stem), self.some(self._length())]
        self.asks: list[Ask] = []
        self.adapters = self.chance.choice((1, 1, 2)) if self.often(0.3) else 0

    def often(self, probability: float) -> bool:
        return self.chance.random() < probability

    def maybe(self, probability: float, make: Callable[[], Any]) -> Any:
        return make() if self.often(probability) else None

    def between(self, low: int, high: int) -> int:
        return self.chance.randint(low, max(low, high))

    def some(self, count: int) -> tuple[int, ...]:
        return tuple(self.chance.choices(USUAL, k=count))

    def make(self) -> Scenario:
        chance = self.chance
        count = self.between(1, 3) if self.often(0.2) else self.between(3, 8)
        rush = chance.choice((0, 1, 2, 4)) if self.crowded else chance.choice((0, 2, 8, 30))
        for number in range(count):
            self.asks.append(self._ask(rush * number // 2))
        scenario, steps = self.scenario, 8 * count
        if self.crowded or self.often(0.3):
            scenario = self._tightened()
        failures = [self._failure(steps) for _ in range(chance.choice((1, 1, 2))) if self.often(0.2)]
        stop_at = self.maybe(0.1, lambda: self.between(0, steps))
        return replace(scenario, asks=tuple(self.asks), failures=tuple(failures), stop_at=stop_at)

    def _engine(self) -> Scenario:
        chance = self.chance
        small = self.between(16, 100) if self.often(0.75) else self.between(100, 280)
        two = self.often(0.4)
        window = self.maybe(0.45, lambda: self.between(3, 12) if self.often(0.5) else self.between(3, 40))
        return Scenario(
            (),
            cells=(small, small + self.between(1, 60)) if two else (small,),
            max_tokens=self.between(12, min(60, small)) if two or self.often(0.1) else None,
            window=window,
            window_chunk=1 if self.often(0.6) else self.between(2, 8),
            parallel=self.between(1, 8) if self.often(0.1 if self.crowded else 0.5) else self.between(5, 8),
            batch_size=chance.choice((self.between(4 if self.crowded else 1, 8), self.between(8, 64), 64)),
            scored=chance.choice((self.between(1, 8), 64)),
            share_prefixes=self.often(0.8),
            host_cache=self.maybe(0.6, lambda: TOKEN_BYTES * (self.between(1, 60) if self.often(0.4) else 2000)),
            block_size=chance.choice((1, 2, 4, 8, 16)),
            per_step=TOKEN_BYTES * chance.choice((1, 10, 2000)),
            kept_sequences=chance.choice((0, 0, 1, 3, 20)),
            exact_seeds=self.often(0.2),
            drafts=chance.choice((1, 2, 5)) if self.often(0.4) else 0,
            max_queue=self.between(1, 4) if self.often(0.1) else 256,
            offloaded=self.often(0.5),
            sizes=tuple(chance.choices((1, 2, 3, 5, 8), k=8)) if self.often(0.4) else (),
            turn=chance.choice((2, 5, 16)),
        )

    def _tightened(self) -> Scenario:
        """Return the scenario with few more cells in each context than its largest request needs, or some too few."""
        scenario = self.scenario
        cells: list[int] = []
        for number in range(len(scenario.cells)):
            longest = scenario.max_tokens if number == 0 else None
            needs = [_most_cells(scenario, ask, longest) for ask in self.asks if ask.after is None]
            most = sorted(need for need in needs if need <= 280)[-1 - self.often(0.2) :]
            least = max((max(most[:1], default=16), 3, *cells))
            more = self.chance.choices((1, self.between(1, 13), self.between(-8, 1)), weights=(6, 13, 1))[0]
            cells.append(max(3, *cells, least + more))
        return replace(scenario, cells=tuple(cells))

    def _failure(self, steps: int) -> Failure:
        status, lasting = self.chance.choice((-3, -2, 2, 1)), self.often(0.06)
        context = self.between(0, len(self.scenario.cells) - 1)
        return Failure(self.between(0, steps), status, self.between(0, 6), lasting, context)

    def _length(self) -> int:
        """Return a length of a prompt: any that may matter."""
        scenario, most = self.scenario, min(120, self.scenario.cells[-1])
        marks = [self.between(1, 12), self.between(1, 12), self.between(1, most // 2), self.between(1, most)]
        if scenario.window is not None:
            marks += [scenario.window + self.between(-1, 1 + scenario.window_chunk)] * 2
        if scenario.max_tokens is not None:
            marks += [scenario.max_tokens + self.between(-6, 2)] * 2
        return max(1, min(most, self.chance.choice(marks)))

    def _prompt(self) -> tuple[int, ...]:
        kind = self.chance.random()
        if self.asks and kind < 0.1:
            return self.chance.choice(self.asks).prompt
        if kind < 0.65:
            stem = self.chance.choice(self.stems)
            stem = stem[: self.between(1, len(stem))] if self.often(0.4) else stem
            return stem + self.some(self.between(0, 5) if self.often(0.6) else max(0, self._length() - len(stem)))
        return self.some(self._length())

    def _ask(self, latest: int) -> Ask:
        chance, scenario = self.chance, self.scenario
        prompt = self._prompt()
        after = self.between(0, len(self.asks) - 1) if self.asks and self.often(0.15) else None
        if after is not None:
            prompt = self.some(self.between(1, 4))
        if self.often(0.03):
            place = self.between(0, len(prompt) - 1) if self.often(0.3) else len(prompt) - 1
            prompt = (*prompt[:place], chance.choice((NAN, INFINITE)), *prompt[place + 1 :])
        together = min(scenario.parallel, scenario.batch_size) > 1 or self.often(0.1)
        weights = (8, 5, 1, 1, 1) if self.crowded else (5, 6, 2, 2, 2)
        mode = chance.choices(_MODES, weights=weights if together else (*weights[:2], 0, 0, 0))[0]
        kwargs = self._kwargs(mode, len(prompt), extended=after is not None)
        beams = "num_beams" in kwargs
        several = not beams and kwargs.get("num_return_sequences", 1) > 1
        fault = self.maybe(0.2 if several else 0.06, lambda: chance.choice(FAULTS))
        return Ask(
            prompt,
            kwargs,
            arrives=self.between(latest // 2, latest) if self.often(0.8) else 0,
            after=after,
            stream=self.often(0.7),
            timeout=self.maybe(0.08, lambda: float(self.between(1, 40))),
            leaves=self.maybe(0.1, lambda: self.between(0, 20)),
            constrained=fault == "masking" or self.often(0.03),
            schema=self.maybe(0.06, lambda: self.between(0, len(GRAMMARS) - 1)) if not fault else None,
            logprobs=self.maybe(0.08, lambda: self.between(0, 3)) if not beams else None,
            scored=self.maybe(0.1, lambda: self.between(0, 3)),
            stops=self.maybe(0.08, lambda: (chance.choice("abcdefgh"), "ij")) or (),
            openai=self.maybe(0.12, self._openai) or {},
            fault=fault,
            fault_at=self.between(0, self.chance.choice((2, 12))) if fault else 0,
            entropy=chance.getrandbits(63),
            adapter=self.between(0, self.adapters),
        )

    def _openai(self) -> dict[str, Any]:
        penalty = {
            "repeat_penalty": self.chance.choice((0.8, 1.3)),
            "repeat_last_n": self.chance.choice((-1, 0, 3, 64)),
        }
        return self.chance.choice(({"cache_prompt": False}, penalty))

    def _kwargs(self, mode: str, length: int, *, extended: bool) -> dict[str, Any]:
        """Return the parameters of a request with a prompt of a length."""
        kwargs, scenario = self.requests.make(mode).kwargs, self.scenario
        if self.crowded and self.often(0.7):
            kwargs = {name: value for name, value in kwargs.items() if name in PLAIN}
        kwargs.pop("max_length", None)
        if self.often(0.97):
            most = min(scenario.parallel, scenario.batch_size)
            _fit(kwargs, min(most, self.between(1, 3)) if self.crowded and self.often(0.8) else most)
        new = self.between(10, 30) if self.crowded else kwargs.get("max_new_tokens") or self.between(1, 12)
        marks = [length + new, length + new, length + self.between(1, 30)]
        marks += [mark + self.between(0, 2) for mark in (scenario.window, scenario.max_tokens) if mark is not None]
        total = self.chance.choice([mark for mark in marks if mark > length])
        kwargs["max_new_tokens"] = total - length
        if not extended and self.often(0.4):
            kwargs["max_length"] = kwargs.pop("max_new_tokens") + length
        if self.often(0.7 if self.crowded else 0.2):
            kwargs.pop("eos_token_id", None)
        if self.often(0.4):
            kwargs.pop("seed", None)
        if self.often(0.04):
            kwargs["max_time"] = float(self.between(1, 15))
        if self.often(0.08):
            kwargs |= {"output_scores": True, "return_dict_in_generate": True}
        return kwargs


def _fit(kwargs: dict[str, Any], most: int) -> None:
    """Let a request have so many rows at most, but a beam search its two beams or groups."""
    beams = kwargs.get("num_beams", 1)
    if beams > most:
        groups = kwargs.get("num_beam_groups", 1)
        beams = kwargs["num_beams"] = max(2, most) if groups == 1 else max(groups, most // groups * groups)
    if "num_return_sequences" in kwargs:
        at_most = beams if "num_beams" in kwargs else most
        kwargs["num_return_sequences"] = min(kwargs["num_return_sequences"], at_most)


def _most_cells(scenario: Scenario, ask: Ask, longest: int | None) -> int:
    """Return the cells that a request needs at most in a context for sequences up to `longest`."""
    prompt, kwargs = len(ask.prompt), ask.kwargs
    rows: int = max(kwargs.get("num_beams", 1), kwargs.get("num_return_sequences", 1))
    length: int = kwargs.get("max_length") or prompt + kwargs.get("max_new_tokens", 20)
    if longest is not None:
        length, prompt = min(length, longest), min(prompt, longest)
    needed = prompt + rows * (length - prompt)
    return needed if scenario.window is None else min(needed, rows * (scenario.window + scenario.window_chunk))
