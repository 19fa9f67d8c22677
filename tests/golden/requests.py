"""Random requests in all decoding modes, with random combinations of parameters, from a seed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.support.cases import tables

MODES = ("greedy", "sample", "beam", "beam_sample", "group_beam")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of ``generate()``: one of `MODES`, token ids, and the ``generate_kwargs`` of a request."""

    mode: str
    prompt: list[int]
    kwargs: dict[str, Any]


@dataclasses.dataclass
class RequestMaker:
    """Makes random requests, the same from the same seed.

    Prompts, bans and biases are drawn from `tokens`, all above 0; stop strings, if any, from `texts`, that of each id.
    Beams are at least 4.
    """

    seed: int
    tokens: Sequence[int]
    _: dataclasses.KW_ONLY
    texts: Sequence[str | None] | None = None
    longest_prompt: int = 12
    most_new: int = 12
    most_beams: int = 6

    def __post_init__(self) -> None:
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def make(self, mode: str) -> Request:
        prompt = self._some(1 if self._chance(0.1) else self._integer(1, self.longest_prompt))
        if len(prompt) > 3 and self._chance(0.5):
            # Repeated n-grams, for what bans or penalises them.
            prompt = (prompt[: len(prompt) // 2] * 2)[: self.longest_prompt]
        kwargs: dict[str, Any] = {"do_sample": mode in ("sample", "beam_sample")}
        kwargs |= self._lengths(len(prompt)) | self._processors(prompt)
        if mode in ("sample", "beam_sample"):
            kwargs |= self._chosen("WARPERS") | {"seed": self._integer(0, 2**62)}
        if mode == "sample":
            kwargs["num_return_sequences"] = self._integer(1, 4)
        if mode in ("beam", "beam_sample", "group_beam"):
            kwargs |= self._beams(mode)
        elif kwargs.get("num_return_sequences", 1) == 1 and self._chance(0.2):
            kwargs["encoder_repetition_penalty"] = self._number(0.6, 1.8)
        return Request(mode, prompt, kwargs)

    def _chance(self, probability: float) -> bool:
        return bool(self._random.random() < probability)

    def _integer(self, low: int, high: int) -> int:
        return int(self._random.integers(low, high, endpoint=True))

    def _number(self, low: float, high: float) -> float:
        return round(float(self._random.uniform(low, high)), 3)

    def _one_of(self, *values: Any) -> Any:
        return values[self._integer(0, len(values) - 1)]

    def _some(self, count: int) -> list[int]:
        return [int(token) for token in self._random.choice([*self.tokens], count)]

    def _several(self, low: int, high: int) -> list[int]:
        return self._some(self._integer(low, high))

    def _token(self) -> int:
        return self._some(1)[0]

    def _always(self) -> bool:
        return True

    def _decay(self) -> list[float]:
        return [self._integer(0, 4), self._number(1.01, 1.5)]

    def _chosen(self, table: str, **makers: Callable[[], Any]) -> dict[str, Any]:
        """Choose parameters of a table; `makers` draw the values that follow from the request."""
        kwargs = {}
        for name, (chance, *kind) in tables(__file__)[table].items():
            if self._chance(chance):
                kwargs[name] = getattr(self, f"_{kind[0]}")(*kind[1:]) if kind else makers[name]()
        return kwargs

    def _lengths(self, prompt_length: int) -> dict[str, Any]:
        new = self._integer(1, self.most_new)
        kwargs: dict[str, Any] = {"max_new_tokens": new} if self._chance(0.5) else {"max_length": prompt_length + new}
        kwargs |= self._chosen(
            "LENGTHS",
            min_length=lambda: prompt_length + self._integer(0, new),
            min_new_tokens=lambda: self._integer(0, new),
        )
        if self.texts is not None and self._chance(0.25):
            kwargs["stop_strings"] = self._stop_strings()
        return kwargs

    def _ends(self) -> int | list[int]:
        # Many end tokens, so that short answers of random models do end.
        return self._token() if self._chance(0.3) else self._several(1, 10)

    def _stop_strings(self) -> str | list[str]:
        assert self.texts is not None
        strings = []
        for _ in range(self._integer(1, 3)):
            text = "".join(self.texts[token] or "" for token in self._several(1, 2))
            start = self._integer(0, max(len(text) - 2, 0))
            strings.append(text[start : start + self._integer(1, 3)] or "e")
        return strings[0] if len(strings) == 1 and self._chance(0.5) else strings

    def _phrases(self) -> list[list[int]]:
        return [self._several(1, 3) for _ in range(self._integer(1, 12))]

    def _processors(self, prompt: list[int]) -> dict[str, Any]:
        # Phrases that begin with what the prompt ends on take effect at once.
        likely = [*prompt[-1:], *self._some(1)]
        kwargs = self._chosen(
            "PROCESSORS",
            bad_words_ids=lambda: [*self._phrases(), likely],
            sequence_bias=lambda: [[one, self._number(-4, 4)] for one in [*self._phrases(), likely]],
        )
        return kwargs | (self._chosen("ONE_TOKEN") if len(prompt) == 1 else {})

    def _beams(self, mode: str) -> dict[str, Any]:
        kwargs: dict[str, Any] = {"num_beams": self._integer(2, self.most_beams)}
        if mode == "group_beam":
            groups = self._integer(2, self.most_beams // 2)
            kwargs["num_beam_groups"] = groups
            kwargs["num_beams"] = groups * self._integer(1, self.most_beams // groups)
            kwargs["diversity_penalty"] = self._number(0.1, 3.0)
        kwargs["num_return_sequences"] = self._integer(1, kwargs["num_beams"])
        return kwargs | self._chosen("BEAMS")
