"""Random requests to a service: of all kinds, at every edge, right and wrong, from a seed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, Literal

from tests.golden.requests import RequestMaker
from tests.golden.vocabularies import phi3_vocabulary
from tests.support.scenario_maker import PLAIN
from tests.support.service_client import CHAT, CHAT_COMPLETIONS, COMPLETIONS, Ask
from tests.support.service_setups import ORIGINAL_CONTEXT, Setup

VOCABULARY = phi3_vocabulary(merges=300)
WORDS = [
    piece.text[1:]
    for piece in VOCABULARY.pieces
    if piece.text.startswith("▁") and piece.text[1:].isascii() and piece.text[1:].isalpha()
]
"""Words of one token each: so many words, separated by spaces, are so many tokens."""

_FIRST_TOKEN, _LAST_TOKEN = 259, 500
_LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "forced_bos_token_id")
_MODES = {"greedy": 5, "sample": 5, "several": 3, "beam": 4, "group_beam": 2, "beam_sample": 2}
_MESSAGE = {"role": "user", "content": "hello"}
_WRONG: tuple[tuple[str, str, dict[str, Any] | bytes, str], ...] = (
    (CHAT, "application/json", {}, "prompt"),
    (CHAT, "application/json", {"messages": [{"role": "emperor", "content": "a"}]}, "emperor"),
    (CHAT, "application/json", b'{"prompt":', "JSON"),
    (CHAT, "application/json", b"[" * 100_000, ""),
    (CHAT, "application/json", b'{"prompt": "\xff"}', "JSON"),
    (CHAT, "text/plain", {"prompt": "a"}, "application/json"),
    (CHAT, "application/json", b'{"prompt": "' + b"a " * 140_000 + b'"}', "--max-body-size"),
    ("/chats", "application/json", {"prompt": "a"}, "/chats"),
    (CHAT, "application/json", {"prompt": "a", "generate_kwargs": {"max_lenght": 5}}, "max_lenght"),
    (CHAT, "application/json", {"prompt": "a", "generate_kwargs": {"top_p": 1.5}}, "top_p"),
    (CHAT, "application/json", {"prompt": "a", "generate_kwargs": {"eos_token_id": 10**6}}, "eos_token_id"),
    (CHAT_COMPLETIONS, "application/json", {"messages": []}, "messages"),
    (CHAT_COMPLETIONS, "application/json", {"messages": [_MESSAGE], "stop": ["a", "b", "c", "d", "e"]}, "stop"),
    (COMPLETIONS, "application/json", {"prompt": [10**6]}, "prompt[0]"),
    (COMPLETIONS, "application/json", {"prompt": ["a", 5]}, "prompt"),
    (COMPLETIONS, "application/json", {"prompt": "the cat", "best_of": 3}, "best_of"),
)
"""Route, media type, body, and what the sentence of the refusal names. `tests/api` holds all the others."""


Chain = list[Ask]
"""Requests of one client, one after the other."""


class AskMaker:
    """Makes the requests to one service.

    Args:
        seed: equal seeds make equal requests.
        setup: what the service is.
        longest: tokens of the longest prompt, should the service have so many cells.
    """

    def __init__(self, seed: int, setup: Setup, longest: int = 1 << 20) -> None:
        self._chance = random.Random(seed)
        self._setup = setup
        self._longest = min(longest, setup.cells + 300)
        texts = [piece.text.replace("▁", " ") for piece in VOCABULARY.pieces]
        usual = range(_FIRST_TOKEN, _LAST_TOKEN)
        self._maker = RequestMaker(seed, usual, texts=texts, longest_prompt=20, most_new=60, most_beams=8)
        self._heads = [self._chance.choices(WORDS, k=self._longest) for _ in range(4)]
        self._questions = [" ".join(self._heads[0][:20] + self._chance.choices(WORDS, k=12)) for _ in range(12)]

    def chains(self, count: int, crosstalk: int) -> list[list[Chain]]:
        """Make about `count` requests in blocks, in random order; the chains of a block belong beside each other.

        Args:
            count: how many, those of the rounds included.
            crosstalk: rounds in which beams leave beside greedy requests.
        """
        blocks = [self.crosstalk() for _ in range(crosstalk)]
        left = count - sum(len(chain) for block in blocks for chain in block)
        while left > 0:
            chain = self._chain()[:left]
            left -= len(chain)
            blocks.append([chain])
        self._chance.shuffle(blocks)
        return blocks

    # -- what is known of them

    def _of(self, kind: str, body: dict[str, Any], rows: int, length: int, path: str = CHAT) -> Ask:
        kwargs = body.get("generate_kwargs", {})
        drawn = kwargs.get("do_sample", True) and body.get("temperature", 1) != 0
        repeats = not drawn or body.get("seed", kwargs.get("seed")) is not None
        must: Literal["answer", ""] = "answer" if self._fits(rows, length) else ""
        return Ask(kind, path, body, repeats=repeats, must=must)

    def _fits(self, rows: int, length: int) -> bool:
        """Return whether a request fits in any case, however a service divides its cells."""
        cells = self._setup.cells if rows == 1 else min(self._setup.cells, ORIGINAL_CONTEXT)
        return rows <= self._setup.parallel and rows * length <= cells

    def crosstalk(self) -> list[Chain]:
        """Make greedy requests, and beam searches beside them whose clients leave."""
        leavers: list[Chain] = []
        for _ in range(4):
            beams = {"num_beams": self._chance.choice((4, 8)), "do_sample": False, "max_new_tokens": 200}
            body = self._asking(self._chance.choice(self._questions), beams)
            leavers.append([Ask("beams that leave", CHAT, body, leaves=self._chance.uniform(0.005, 0.1))])
        greedy = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": []}
        must: Literal["answer", ""] = "answer" if self._fits(1, 100) else ""
        stay: list[Chain] = [
            [Ask("greedy beside", CHAT, self._asking(question, greedy), repeats=True, always=True, must=must)]
            for question in self._questions
        ]
        block = leavers + stay
        self._chance.shuffle(block)
        return block

    def _asking(self, question: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        scored = {"return_dict_in_generate": True, "output_scores": True}
        return {"messages": [{"role": "user", "content": question}], "generate_kwargs": kwargs | scored}

    # -- random ones

    def _chain(self) -> Chain:
        kind = self._chance.choices(
            ("one", "leaves", "max_time", "conversation", "wrong", "oversized"), (60, 12, 5, 8, 10, 5)
        )[0]
        if kind == "wrong":
            return [self._wrong()]
        if kind == "oversized":
            return [self._oversized()]
        if kind == "conversation":
            return self._conversation()
        ask = self._chance.choices((self._chat, self._chat_completion, self._completion), (6, 1, 2))[0]()
        if kind == "leaves":
            leaves = self._chance.uniform(0.005, 0.2)
            return [dataclasses.replace(ask, kind=f"{ask.kind}, leaves", leaves=leaves, repeats=False)]
        if kind == "max_time" and isinstance(ask.body, dict):
            kwargs = ask.kwargs | {"max_time": round(self._chance.uniform(0, 0.3), 3)}
            body = ask.body | {"generate_kwargs": kwargs}
            return [dataclasses.replace(ask, kind="max_time", body=body, repeats=False)]
        return [ask]

    def _words(self, count: int) -> str:
        """Return so many words: the beginning of a long text that others begin with too, a changed one, or new ones."""
        head = self._chance.choice(self._heads)
        kind = self._chance.random()
        if kind < 0.3 and count <= len(head):
            return " ".join(head[:count])
        own = self._chance.randint(1, min(count, 20)) if kind < 0.8 else count
        return " ".join((head * (1 + count // len(head)))[: count - own] + self._chance.choices(WORDS, k=own))

    def _sizes(self, rows: int) -> tuple[int, int]:
        """Return the tokens of a prompt and of its answer: few, or such that they end where something else begins."""
        chance, setup = self._chance, self._setup
        new = chance.choice((1, 2, 3, 8, 16, 33, 64, 64, 120, 200 if rows > 1 else 400))
        kind = chance.random()
        if kind < 0.45:
            return chance.randint(1, min(60, self._longest)), new
        if kind < 0.6:
            return chance.randint(1, min(600, self._longest)), new
        edges = [
            setup.cells,
            -(-setup.cells // 256) * 256,
            setup.cells // rows,
            ORIGINAL_CONTEXT,
            setup.window,
            setup.window + 1,
            256,
            512,
        ]
        edge = min(chance.choice(edges), setup.cells) + chance.choice((-300, -17, -2, -1, 0, 1, 2, 17, 300))
        prompt = edge if chance.random() < 0.5 else edge - new
        return min(max(1, prompt), self._longest), new

    def _mode(self) -> tuple[str, dict[str, Any], int]:
        """Return a mode, its parameters without lengths, and how many sequences it decodes at once."""
        chance = self._chance
        mode = chance.choices([*_MODES], [*_MODES.values()])[0]
        kwargs = self._maker.make("sample" if mode == "several" else mode).kwargs
        if chance.random() < 0.5:
            kwargs = {name: value for name, value in kwargs.items() if name in PLAIN}
        kwargs = {name: value for name, value in kwargs.items() if name not in _LENGTHS}
        if mode == "sample":
            kwargs["num_return_sequences"] = 1
            if chance.random() < 0.2:
                del kwargs["seed"]
        if mode == "several":
            kwargs["num_return_sequences"] = chance.randint(2, 4)
            kwargs.pop("encoder_repetition_penalty", None)
        if chance.random() < 0.3:
            kwargs["eos_token_id"] = []
            kwargs.pop("exponential_decay_length_penalty", None)
        return mode, kwargs, max(kwargs.get("num_beams", 1), kwargs.get("num_return_sequences", 1))

    def _chat(self) -> Ask:
        mode, kwargs, rows = self._mode()
        prompt, new = self._sizes(rows)
        kwargs |= {"max_new_tokens": new} if self._chance.random() < 0.5 else {"max_length": prompt + new}
        if self._chance.random() < 0.8:
            kwargs |= {"return_dict_in_generate": True, "output_scores": True}
        stream = self._chance.random() < 0.2
        body = {"prompt": self._words(prompt), "generate_kwargs": kwargs, "return_full_text": False}
        body |= {"stream": True} if stream else {}
        if self._chance.random() < 0.05:
            return Ask("hole", CHAT, body | {"handle_long_generation": "hole"}, repeats="seed" in kwargs)
        return self._of(f"{mode}, stream" if stream else mode, body, rows, prompt + new)

    def _openai(self, new: int) -> tuple[str, dict[str, Any], int]:
        chance = self._chance
        body: dict[str, Any] = {"max_tokens": new}
        rows = chance.choice((1, 1, 1, 2, 4))
        body |= {"n": rows} if rows > 1 else {}
        if chance.random() < 0.5:
            body["temperature"] = 0
        else:
            body |= {"temperature": 0.9, "top_p": 0.9, "seed": chance.randrange(2**31)}
        if chance.random() < 0.2:
            body |= {"presence_penalty": 0.7, "frequency_penalty": -0.2}
        if chance.random() < 0.2:
            body["stop"] = [" t", "the"]
        stream = chance.random() < 0.25
        return ", stream" if stream else "", body | ({"stream": True} if stream else {}), rows

    def _chat_completion(self) -> Ask:
        prompt, new = self._sizes(4)
        stream, body, rows = self._openai(new)
        if self._chance.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 3}
        elif self._chance.random() < 0.15:
            body |= {"response_format": {"type": "json_object"}, "max_tokens": min(new, 30)}
        body["messages"] = [{"role": "user", "content": self._words(prompt)}]
        fits = min(prompt, 64) + 10 + new if prompt < 64 else 1 << 20
        return self._of(f"v1/chat{stream}", body, rows, fits, CHAT_COMPLETIONS)

    def _completion(self) -> Ask:
        prompt, new = self._sizes(4)
        stream, body, rows = self._openai(new)
        if self._chance.random() < 0.3:
            body["logprobs"] = self._chance.randint(0, 5)
        shape: Callable[[], Any] = self._chance.choice(
            (
                lambda: self._words(prompt),
                lambda: [self._chance.randint(_FIRST_TOKEN, _LAST_TOKEN) for _ in range(prompt)],
                lambda: [self._words(prompt), self._words(min(prompt, 9))],
            )
        )
        body["prompt"] = shape()
        return self._of(f"v1/completions{stream}", body, rows, prompt + new, COMPLETIONS)

    def _conversation(self) -> Chain:
        """Make requests each of which goes on from the answer before it, in one of two ways."""
        chance = self._chance
        greedy = {"do_sample": False, "max_new_tokens": chance.choice((8, 40, 150)), "eos_token_id": []}
        bodies = [self._asking(self._words(self._sizes(1)[0]), greedy) for _ in range(3)]
        if chance.random() < 0.5:
            bodies = [{"prompt": body["messages"][0]["content"], "generate_kwargs": greedy} for body in bodies]
            bodies = [body | {"return_full_text": False} for body in bodies]
        return [Ask("conversation", CHAT, body, repeats=True, follows=index > 0) for index, body in enumerate(bodies)]

    def _oversized(self) -> Ask:
        """Make a request that no service of this size can ever run."""
        chance, cells = self._chance, self._setup.cells
        prompt = self._words(chance.randint(1, 40))
        kwargs, names = chance.choice(
            (
                ({"num_beams": self._setup.parallel + 1, "do_sample": False, "max_new_tokens": 4}, "num_beams"),
                ({"num_beams": 9, "num_return_sequences": 8, "do_sample": False}, "num_beams"),
                ({"max_new_tokens": 5000}, "new tokens"),
                ({"max_length": 100_000}, "max_length"),
                ({"max_new_tokens": 4000, "num_return_sequences": 64, "do_sample": True}, "num_return_sequences"),
                ({"max_new_tokens": 10**18}, "max_new_tokens"),
            )
        )
        if self._setup.window > cells and chance.random() < 0.5:
            prompt, kwargs, names = self._words(cells + 300), {"max_new_tokens": 1}, "tokens"
        stream = chance.random() < 0.3
        body = {"prompt": prompt, "return_full_text": False, "generate_kwargs": kwargs} | (
            {"stream": True} if stream else {}
        )
        return Ask("oversized", CHAT, body, must="refusal", names=names)

    def _wrong(self) -> Ask:
        path, media_type, body, names = self._chance.choice(_WRONG)
        return Ask("wrong", path, body, must="refusal", names=names, media_type=media_type)
