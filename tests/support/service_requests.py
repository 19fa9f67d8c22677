"""Random requests to services: of all kinds, at every edge, right and wrong, each from a seed."""

import random
from dataclasses import replace
from typing import Any

from edge_phi3.byte_level import bytes_of
from tests.golden.requests import RequestMaker
from tests.golden.vocabularies import phi3_vocabulary
from tests.support.odd_texts import random_text
from tests.support.scenario_maker import PLAIN
from tests.support.schemas import SCHEMAS, random_schema
from tests.support.service_client import CHAT, CHAT_COMPLETIONS, COMPLETIONS, Ask
from tests.support.service_setups import KINDS, ORIGINAL_CONTEXT, Setup

VOCABULARY = phi3_vocabulary(merges=300)


def texts_of(kind: str) -> list[str]:
    """Return the text of each token of a kind's vocabulary."""
    vocabulary = KINDS[kind].get("vocabulary")
    if vocabulary:
        return [bytes_of(token).decode(errors="replace") for token in vocabulary.tokens]
    return [piece.text.replace("▁", " ") for piece in VOCABULARY.pieces]


def words_of(kind: str) -> list[str]:
    """Return words of one token each: so many of them, a space before each, are so many tokens."""
    return [text[1:] for text in texts_of(kind) if text[0] == " " and text[1:].isascii() and text[1:].isalpha()]


TEXTS, WORDS = texts_of("4k"), words_of("4k")
"""Those of Phi-3's vocabulary, which itself puts a space in front of a text."""
ORDINARY = range(259, 500)
"""Token ids that are neither bytes nor special."""
_LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "forced_bos_token_id")
_MODES = {"greedy": 5, "sample": 5, "several": 3, "beam": 4, "group_beam": 2, "beam_sample": 2}
_CHAINS = {"one": 55, "leaves": 12, "time": 5, "conversation": 8, "wrong": 10, "oversized": 5, "tokens": 5}
_TOOLS = {"tools": [{"<|end|>": 1}], "enable_thinking": False}
_ENDS: Any = ({}, {"add_generation_prompt": False}, {"continue_final_message": True}, {"chat_template_kwargs": _TOOLS})
_PATTERNS = {"type": "object", "properties": {"a": {"allOf": [{"pattern": f"a.*{n}"} for n in range(22)]}}}
_WRONG: tuple[tuple[str, dict[str, Any] | bytes, str], ...] = (
    (CHAT, {}, "prompt"),
    (CHAT, b'{"prompt":', "JSON"),
    (CHAT, b"[" * 100_000, ""),
    (CHAT, b'{"prompt": "\xff"}', "JSON"),
    (CHAT, b'{"prompt": "' + b"a " * 140_000 + b'"}', "--max-body-size"),
    (CHAT, b'{"prompt": [' + b"[]," * 80_000 + b"[]]}", "262144"),
    ("/tokenize", b'{"content": "' + "\U00010380".encode() * 60_000 + b'"}', "131072"),
    (COMPLETIONS, {"prompt": "a", "guided_json": _PATTERNS}, "allOf"),
    (COMPLETIONS, {"prompt": "a", "guided_grammar": 'root ::= "a"' + ' | "ab"*' * 3000}, "16384"),
    (COMPLETIONS, {"prompt": "a", "guided_json": '"start: %json {}"'}, "a schema must be an object"),
    ("/chats", {"prompt": "a"}, "/chats"),
    (CHAT, {"prompt": "a", "generate_kwargs": {"max_lenght": 5}}, "max_lenght"),
    (CHAT_COMPLETIONS, {"messages": []}, "messages"),
    (COMPLETIONS, {"prompt": [10**6]}, "prompt[0]"),
)
"""Route, body, and what the sentence of the refusal names. `tests/api` holds all the others."""

Chain = list[Ask]
"""Requests of one client, one after the other."""


def _scored(text: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a request in a chat, for an answer with its scores."""
    kwargs = kwargs | {"return_dict_in_generate": True, "output_scores": True}
    return {"messages": [{"role": "user", "content": text}], "generate_kwargs": kwargs}


class AskMaker:
    """Makes the requests to one service, with prompts of up to `longest` tokens if it has so many cells."""

    def __init__(self, seed: int, setup: Setup, longest: int = 1 << 20) -> None:
        self._chance = random.Random(seed)
        self._setup, self._cells, self._parallel = setup, setup.cells, setup.settings.parallel
        self._longest = min(longest, self._cells + 300)
        self._texts, self._known = texts_of(setup.kind), words_of(setup.kind)
        self._before = " " if "vocabulary" in KINDS[setup.kind] else ""
        self._maker = RequestMaker(seed, ORDINARY, texts=self._texts, longest_prompt=20, most_new=60, most_beams=8)
        self._heads = [self._chance.choices(self._known, k=self._longest) for _ in range(4)]

    def chains(self, count: int, crosstalk: int) -> list[Chain]:
        """Make about `count` requests in random order, but for the rounds of `crosstalk`, which stay together."""
        blocks = [self.crosstalk() for _ in range(crosstalk)]
        left = count - sum(map(len, blocks))
        while left > 0:
            chain = self._chain()[:left]
            left -= len(chain)
            blocks.append([chain])
        self._chance.shuffle(blocks)
        chains = [(chain, self._chance.randint(0, self._setup.adapters)) for block in blocks for chain in block]
        # All requests of a chain are answered with the same adapter, or with none.
        return [[ask.adapted(str(number)) for ask in chain] if number else chain for chain, number in chains]

    def crosstalk(self) -> list[Chain]:
        """Make greedy requests, and beam searches beside them whose clients leave."""
        chance, chains = self._chance, []
        questions = [" ".join(self._heads[0][:20] + chance.choices(self._known, k=12)) for _ in range(12)]
        for question in chance.sample(questions, 4):
            body = _scored(question, {"num_beams": chance.choice((4, 8)), "do_sample": False, "max_new_tokens": 200})
            chains.append([Ask("beams that leave", CHAT, body, leaves=chance.uniform(0.005, 0.1))])
        for question in questions:
            body = _scored(question, {"do_sample": False, "max_new_tokens": 40, "eos_token_id": []})
            chains.append([replace(self._judged("greedy beside", CHAT, body, 1, 100), always=True)])
        chance.shuffle(chains)
        return chains

    def _judged(self, kind: str, path: str, body: dict[str, Any], rows: int, length: int) -> Ask:
        """Return a request for so many sequences of so many tokens with what is known of its answer."""
        ask = Ask(kind, path, body)
        drawn = ask.kwargs.get("do_sample", True) and body.get("temperature", 1) != 0
        # What fits in any case, however a service divides its cells.
        cells = self._cells if rows == 1 else min(self._cells, ORIGINAL_CONTEXT)
        fits = rows <= self._parallel and rows * length <= cells and length <= self._setup.context_length
        return replace(ask, repeats=not drawn or ask.has_seed, must="answer" if fits else "")

    def _chain(self) -> Chain:
        chance = self._chance
        kind = chance.choices([*_CHAINS], [*_CHAINS.values()])[0]
        if kind == "tokens":
            return [self._tokens()]
        if kind == "wrong":
            path, body, names = chance.choice(_WRONG)
            return [Ask("wrong", path, body, must="refusal", names=names)]
        if kind == "oversized":
            return [self._oversized()]
        if kind == "conversation":
            return self._conversation()
        ask = chance.choices((self._chat, self._chat_completion, self._completion), (6, 1, 2))[0]()
        if kind == "leaves":
            leaves = chance.uniform(0.005, 0.2)
            behind = chance.choice((0, 0, 1, 30))
            return [replace(ask, kind=f"{ask.kind}, leaves", leaves=leaves, repeats=False, pipelined=behind)]
        if kind == "time":
            limited = ask.asking(max_time=round(chance.uniform(0, 0.3), 3))
            return [replace(limited, kind="max_time", repeats=False)]
        return [replace(ask, kind="pipelined", pipelined=chance.randint(1, 9)) if chance.random() < 0.05 else ask]

    def _words(self, count: int) -> str:
        """Return so many words: the beginning of a long text that others begin with too, a changed one, or new ones."""
        head, own = self._chance.choice(self._heads), self._chance.choice((0, min(count, 20), count))
        own = self._chance.randint(0, own) if own < count else own
        words = (head * (1 + count // len(head)))[: count - own] + self._chance.choices(self._known, k=own)
        return self._before + " ".join(words)

    def _sizes(self, rows: int) -> tuple[int, int]:
        """Return the tokens of a prompt and of its answer: few, or such that they end where something else begins."""
        chance, cells, window = self._chance, self._cells, self._setup.window
        new = chance.choice((1, 2, 3, 8, 16, 33, 64, 64, 120, 200 if rows > 1 else 400))
        if chance.random() < 0.6:
            return chance.randint(1, min(chance.choice((60, 60, 60, 600)), self._longest)), new
        edges = [cells, -(-cells // 256) * 256, cells // rows, ORIGINAL_CONTEXT, window, window + 1, 256, 512]
        prompt = min(chance.choice(edges), cells) + chance.choice((-300, -17, -2, -1, 0, 1, 2, 17, 300))
        return min(max(1, prompt - chance.choice((0, new))), self._longest), new

    def _chat(self) -> Ask:
        chance = self._chance
        mode = chance.choices([*_MODES], [*_MODES.values()])[0]
        kwargs = self._maker.make("sample" if mode == "several" else mode).kwargs
        plain = chance.random() < 0.5
        kwargs = {
            name: value for name, value in kwargs.items() if name not in _LENGTHS and (name in PLAIN or not plain)
        }
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
        rows = max(kwargs.get("num_beams", 1), kwargs.get("num_return_sequences", 1))
        prompt, new = self._sizes(rows)
        kwargs |= chance.choice(({"max_new_tokens": new}, {"max_length": prompt + new}))
        if chance.random() < 0.8:
            kwargs |= {"return_dict_in_generate": True, "output_scores": True}
        stream = chance.random() < 0.2
        body = {"prompt": self._words(prompt), "generate_kwargs": kwargs, "return_full_text": False, "stream": stream}
        if chance.random() < 0.05:
            return Ask("hole", CHAT, body | {"handle_long_generation": "hole"}, repeats="seed" in kwargs)
        return self._judged(f"{mode}, stream" if stream else mode, CHAT, body, rows, prompt + new)

    def _openai(self, new: int) -> dict[str, Any]:
        """Return what the bodies of OpenAI's two routes have in common."""
        chance = self._chance
        drawn: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": chance.randrange(2**31)}
        body: dict[str, Any] = {"max_tokens": new, "n": chance.choice((1, 1, 1, 2, 4))}
        body["stream"] = chance.random() < 0.25
        body |= chance.choice(({"temperature": 0}, drawn))
        further: tuple[dict[str, Any], ...] = (
            {"presence_penalty": 0.7, "frequency_penalty": -0.2},
            {"stop": [" t", "the"], "include_stop_str_in_output": chance.random() < 0.5},
            {"top_k": 5, "min_p": 0.01, "repeat_penalty": 1.1, "repeat_last_n": 16},
            {"ignore_eos": True, "stop_token_ids": [chance.choice(ORDINARY)], "min_tokens": 1},
            {"cache_prompt": False, "skip_special_tokens": False, "user": "somebody"},
            {"allowed_token_ids": chance.sample(range(3, ORDINARY.stop), 60)},
            {"truncate_prompt_tokens": chance.choice((-1, 1, 30)), "truncation_side": chance.choice(("left", "right"))},
        )
        for more in further:
            body |= more if chance.random() < 0.2 else {}
        return body

    def _chat_completion(self) -> Ask:
        prompt, new = self._sizes(4)
        body = self._openai(new)
        if self._chance.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 3}
        elif self._chance.random() < 0.2:
            described = {"name": "answer", "schema": self._chance.choice(SCHEMAS)}
            forms: list[dict[str, Any]] = [{"type": "json_object"}, {"type": "json_schema", "json_schema": described}]
            body |= {"response_format": self._chance.choice(forms), "max_tokens": min(new, 30)}
        elif self._chance.random() < 0.2:
            function = {"name": "f", "parameters": random_schema(self._chance, 2)}
            choice = self._chance.choice(("auto", "required"))
            tools = {"tools": [{"type": "function", "function": function}], "tool_choice": choice}
            bomb = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer", "const": -1e20}}}
            few = {"guided_choice": ["a", "the"]}, {"guided_regex": "(ab){1000}{1000}"}, {"guided_json": bomb}
            many = {"guided_choice": [f"{n}a" for n in range(5000)]}, {"guided_regex": "([ab]{20}c?){1000}"}
            body |= self._chance.choice((tools, tools | few[0], {"guided_regex": "[a-f]{3,9}"}, *few, *many))
            prompt = max(prompt, 64)
        body["messages"] = [{"role": "user", "content": self._words(prompt)}]
        if self._chance.random() < 0.3:
            body |= self._chance.choice(_ENDS)
            body["messages"] += [{"role": "assistant", "content": ""}] * (body.get("add_generation_prompt") is None)
        length, rows = prompt + 10 + new if prompt < 64 else 1 << 20, body["n"]
        if "logprobs" not in body and self._chance.random() < 0.2:
            rows = max(rows, 2)
            body["generate_kwargs"] = {"num_beams": rows, "do_sample": self._chance.random() < 0.3}
        return self._judged(f"v1/chat{', stream' * body['stream']}", CHAT_COMPLETIONS, body, rows, length)

    def _completion(self) -> Ask:
        chance = self._chance
        prompt, new = self._sizes(4)
        body = self._openai(new) | ({"logprobs": chance.randint(0, 5)} if chance.random() < 0.5 else {})
        if "logprobs" in body and not body["stream"] and chance.random() < 0.6:
            body |= {"echo": True, "max_tokens": chance.choice((0, 1, new)), "min_tokens": None}
        tokens = chance.choices(ORDINARY, k=prompt)
        body["prompt"] = chance.choice(
            (self._words(prompt), tokens, [self._words(prompt), self._words(min(prompt, 9))])
        )
        kind = f"v1/completions{', stream' * body['stream']}{', scored' * ('echo' in body)}"
        return self._judged(kind, COMPLETIONS, body, body["n"], prompt + new)

    def _tokens(self) -> Ask:
        """Make a request to turn a text or a conversation into tokens, or tokens into text."""
        chance, special = self._chance, ["<|end|>", "<|user|>", "<|assistant|>", "<s>"]
        if chance.random() < 0.3:
            tokens = chance.choices(range(len(self._texts)), k=chance.choice((0, 1, 50, 5000)))
            body: dict[str, Any] = {"tokens": tokens, "skip_special_tokens": chance.choice((True, False, None))}
            return Ask("tokens", "/detokenize", body, repeats=True, must="answer")
        text = chance.choice((random_text(chance, special), self._words(self._sizes(1)[0])))
        text = "\U00010380" * 20_000 if chance.random() < 0.02 else text
        bodies: tuple[dict[str, Any], ...] = (
            {"prompt": text, "model": "m", "return_token_strs": True, "add_special_tokens": False},
            {"content": text, "with_pieces": True, "parse_special": chance.random() < 0.5},
            {"messages": [{"role": chance.choice(("user", "assistant")), "content": text}]} | chance.choice(_ENDS),
        )
        return Ask("tokens", "/tokenize", chance.choice(bodies), repeats=True, must="answer")

    def _conversation(self) -> Chain:
        """Make requests each of which goes on from the answer before it, in one of two ways."""
        greedy: dict[str, Any] = {"do_sample": False, "eos_token_id": []}
        greedy["max_new_tokens"] = self._chance.choice((8, 40, 150))
        texts = [self._words(self._sizes(1)[0]) for _ in range(3)]
        bodies = [_scored(text, greedy) for text in texts]
        if self._chance.random() < 0.5:
            bodies = [{"prompt": text, "generate_kwargs": greedy, "return_full_text": False} for text in texts]
        return [Ask("conversation", CHAT, body, repeats=True, follows=index > 0) for index, body in enumerate(bodies)]

    def _oversized(self) -> Ask:
        """Make a request that no service of this size can ever run."""
        chance, prompt = self._chance, self._words(self._chance.randint(1, 40))
        too_large: list[tuple[dict[str, Any], str]] = [
            ({"num_beams": self._parallel + 1, "do_sample": False, "max_new_tokens": 4}, "num_beams"),
            ({"max_new_tokens": 5000}, "new tokens"),
            ({"max_new_tokens": 4000, "num_return_sequences": 64, "do_sample": True}, "num_return_sequences"),
            ({"max_new_tokens": 10**18}, "max_new_tokens"),
        ]
        kwargs, names = chance.choice(too_large)
        if self._setup.window > self._cells and chance.random() < 0.5:
            prompt, kwargs, names = self._words(self._cells + 300), {"max_new_tokens": 1}, "tokens"
        body = {"prompt": prompt, "generate_kwargs": kwargs, "return_full_text": False, "stream": chance.random() < 0.3}
        return Ask("oversized", CHAT, body, must="refusal", names=names)
