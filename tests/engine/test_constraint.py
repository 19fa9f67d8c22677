"""Grammars in the engine: every token's verdict, whole texts, forks, and nothing left behind."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edge_phi3.engine.constraint import GrammarConstraint, constrain
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.json_schema import json_grammar
from edge_phi3.engine.sequence import FinishedEvent, GenerationRequest
from edge_phi3.generation.config import GenerationConfig
from edge_phi3.llama import GrammarError
from edge_phi3.llama.model import Grammar
from tests.engine.conftest import Asked, MakeModel, engine_at_rest, running_engine

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["one", "two", "three"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "text": {"type": "string", "maxLength": 4},
    },
    "required": ["kind", "count", "text"],
}
PROMPT = np.arange(300, 320, dtype=np.int32)


@pytest.fixture(scope="module")
def engine(make_model: MakeModel) -> Iterator[Engine]:
    with running_engine(make_model("4k"), threads=1) as engine:
        yield engine


def constraint_of(engine: Engine, schema: object = SCHEMA) -> GrammarConstraint:
    loaded = engine.model
    return constrain(loaded.model, loaded.tokenizer, json_grammar(schema), loaded.defaults.eos_token_ids)


class Constrained(Asked):
    """A submitted request that a grammar holds."""

    def __init__(self, engine: Engine, schema: object = SCHEMA, **kwargs: Any) -> None:
        super().__init__(engine, PROMPT, max_new_tokens=1)
        self.finished()
        config = GenerationConfig.resolve({"max_length": None, "max_new_tokens": 200} | kwargs, engine.model.defaults)
        self.request = GenerationRequest(PROMPT, config, constraint=constraint_of(engine, schema))
        self.running = engine.submit(self.request, self.events.put)


def texts_of(engine: Engine, event: FinishedEvent) -> list[str]:
    decode = engine.model.tokenizer.decode
    prompt = decode(PROMPT.tolist())
    return [decode(sequence.tolist())[len(prompt) :] for sequence in event.result.sequences]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "return_dict_in_generate": True, "output_scores": True},
        {"seed": 1, "temperature": 2.0, "top_k": 0},
        {"seed": 2, "num_return_sequences": 4, "top_k": 0},
        {"seed": 3, "num_return_sequences": 3, "top_k": 5},
    ],
)
def test_answers_are_whole_and_follow_the_schema(engine: Engine, options: dict[str, Any]) -> None:
    event = Constrained(engine, **options).finished()
    assert set(event.result.finish_reasons) == {"stop"}
    for text in texts_of(engine, event):
        answer = json.loads(text)
        assert list(answer) == ["kind", "count", "text"]
        assert answer["kind"] in {"one", "two", "three"}
        assert 0 <= answer["count"] <= 99
        assert len(answer["text"]) <= 4


def test_greedy_takes_the_same_tokens_whether_or_not_all_are_masked(engine: Engine) -> None:
    plain = Constrained(engine, do_sample=False).finished()
    scored = Constrained(engine, do_sample=False, return_dict_in_generate=True, output_scores=True).finished()
    assert texts_of(engine, plain) == texts_of(engine, scored)


def test_a_limit_may_cut_the_text_short(engine: Engine) -> None:
    event = Constrained(engine, do_sample=False, max_new_tokens=3).finished()
    assert event.result.finish_reasons == ["length"]
    with pytest.raises(json.JSONDecodeError):
        json.loads(texts_of(engine, event)[0])


def test_mask_and_permits_agree_on_every_token(engine: Engine) -> None:
    random = np.random.default_rng(5)
    constraint = constraint_of(engine, {"type": "object", "properties": {"text": {"type": "string", "maxLength": 9}}})
    vocabulary = engine.model.model.vocab_size
    bytes_seen = False
    for _ in range(60):
        scores = np.zeros(vocabulary, np.float32)
        constraint.mask(scores)
        allowed = np.flatnonzero(scores == 0)
        assert allowed.tolist() == [token for token in range(vocabulary) if constraint.permits(token)]
        going = [token for token in allowed.tolist() if token not in engine.model.defaults.eos_token_ids]
        if not going:
            break
        multibyte = [token for token in going if engine.model.tokenizer.byte_of.get(token, 0) >= 0x80]
        bytes_seen |= bool(multibyte)
        constraint.accept(int(random.choice(multibyte or going)))
    assert bytes_seen


def test_bytes_that_make_no_character_never_come(engine: Engine) -> None:
    token_of = {byte: token for token, byte in engine.model.tokenizer.byte_of.items()}

    def takes(data: bytes) -> bool:
        constraint = constraint_of(engine, {"type": "string"})
        for byte in b'"' + data:
            if not constraint.permits(token_of[byte]):
                return False
            constraint.accept(token_of[byte])
        return True

    for text in ("é", "\u0800", "\ud7ff", "\U00010000", "\U0010ffff", "☃"):
        assert takes(text.encode())
    for wrong in ("c0a2", "e080a2", "f08080a2", "eda080", "f4908080", "ff", "80"):
        assert not takes(bytes.fromhex(wrong))


def test_special_tokens_never_come_and_end_tokens_only_at_the_end(engine: Engine) -> None:
    constraint = constraint_of(engine, {"const": "a"})
    tokenizer, ends = engine.model.tokenizer, engine.model.defaults.eos_token_ids
    for token in tokenizer.encode('"a"').tolist():
        assert not any(constraint.permits(special) for special in tokenizer.special_ids | set(ends))
        constraint.accept(token)
    assert all(constraint.permits(end) for end in ends)
    assert not any(constraint.permits(special) for special in tokenizer.special_ids - set(ends))


def test_what_may_not_come_is_refused_before_llama_cpp_sees_it(engine: Engine) -> None:
    constraint = constraint_of(engine)
    for token in (*engine.model.defaults.eos_token_ids, *engine.model.tokenizer.encode("no").tolist()):
        with pytest.raises(GrammarError, match="does not let"):
            constraint.accept(token)


def test_a_clone_goes_its_own_way(engine: Engine) -> None:
    constraint = constraint_of(engine, {"enum": ["a", "b"]})
    byte_of = {byte: token for token, byte in engine.model.tokenizer.byte_of.items()}
    quote, a, b = byte_of[ord('"')], byte_of[ord("a")], byte_of[ord("b")]
    constraint.accept(quote)
    other = constraint.clone()
    other.accept(a)
    constraint.accept(b)
    assert other.permits(quote)
    assert constraint.permits(quote)


def alive() -> int:
    gc.collect()
    return sum(isinstance(each, Grammar) for each in gc.get_objects())


def test_grammars_are_freed_when_requests_end_fail_or_are_given_up(engine: Engine) -> None:
    before = alive()
    for options in ({"do_sample": False}, {"seed": 1, "num_return_sequences": 4}):
        Constrained(engine, **options).finished()
    # Every token of "kind" is banned, so it fails.
    with pytest.raises(Exception, match="leave"):
        Constrained(engine, do_sample=False, suppress_tokens=list(range(engine.model.model.vocab_size))).finished()
    given_up = Constrained(engine, {"type": "array", "minItems": 2000}, seed=1, max_new_tokens=3000)
    engine.cancel(given_up.running)
    del given_up
    Constrained(engine, do_sample=False).finished()  # what was given up is gone before this one ends
    with engine_at_rest(engine):
        assert alive() == before


def test_a_grammar_that_is_none_is_an_error(engine: Engine) -> None:
    loaded = engine.model
    with pytest.raises(GrammarError, match=r"llama\.cpp cannot use the grammar"):
        constrain(loaded.model, loaded.tokenizer, 'root ::= other "x"', loaded.defaults.eos_token_ids)
    with pytest.raises(GrammarError, match="eos_token_id"):
        constrain(loaded.model, loaded.tokenizer, 'root ::= "x"', [])
