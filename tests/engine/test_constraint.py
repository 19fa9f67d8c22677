"""JSON schemas in the engine: an answer that ends is valid, what is valid can come, and the rest is refused by name."""

import contextlib
import dataclasses
import datetime as dt
import gc
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.engine import grammars
from edge_phi3.engine.constraint import ConstraintVocabulary, GrammarConstraint
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.errors import SchemaError
from edge_phi3.engine.grammars import Grammar, json_grammar
from edge_phi3.engine.json_schema import adapted
from edge_phi3.engine.sequence import GenerationRequest
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.generation import GenerationConfig, GenerationError, ModelDefaults
from edge_phi3.llama.model import Model
from tests.generation import conftest as toys
from tests.support.cases import cases, tables
from tests.support.engines import Asked, MakeModel, engine_at_rest, generated, running_engine

DATA = json.loads((Path(__file__).parent / "data" / "json_schemas.json").read_text(encoding="utf-8"))
SCHEMAS: dict[str, Any] = DATA["schemas"]


class Vocabulary:
    """A model's vocabulary, and texts made or read with it under a schema."""

    def __init__(self, model: Model) -> None:
        self.tokenizer = Tokenizer(model)
        self.end = model.eos_token_id
        self.made = ConstraintVocabulary(self.tokenizer)
        self.closing = np.array([bool(text.strip()) and not text.strip(b'"}], \n') for text in self.made.texts])
        self.token_of = {raw[0]: token for token, raw in self.tokenizer.raw_of.items()}

    def start(self, schema: object) -> GrammarConstraint:
        grammar = schema if isinstance(schema, Grammar) else json_grammar(schema)
        return self.made.constrain(grammar, [self.end])

    def write(self, constraint: GrammarConstraint, random_: random.Random) -> str | None:
        """Go a random way, rather to the end; None where that was not met in time."""
        tokens: list[int] = []
        for _ in range(600):
            scores = np.zeros(self.tokenizer.vocab_size, np.float32)
            constraint.mask(scores)
            allowed = np.flatnonzero(scores == 0)
            assert len(allowed)
            if scores[self.end] == 0:
                return self.tokenizer.decode([self.end, *tokens])
            closing = allowed[self.closing[allowed]]
            choices = closing if len(closing) and random_.random() < 0.3 else allowed
            tokens.append(int(random_.choice(choices.tolist())))
            assert constraint.permits(tokens[-1])
            constraint.accept(tokens[-1])
        return None

    def reads(self, schema: object, text: bytes) -> bool:
        """Return whether a schema lets a text through, byte by byte."""
        constraint = self.start(schema)
        for byte in text:
            if not constraint.permits(self.token_of[byte]):
                return False
            constraint.accept(self.token_of[byte])
        return constraint.permits(self.end)


@pytest.fixture(scope="module", params=["small", "whole"])
def vocabulary(
    request: pytest.FixtureRequest, make_model: MakeModel, model_file: Callable[[str, str], Path]
) -> Iterator[Vocabulary]:
    """A few hundred tokens, and the whole of Phi-3's vocabulary."""
    path = make_model("4k") if request.param == "small" else model_file("tiny", "F32")
    with contextlib.closing(Model(path, n_gpu_layers=0)) as model:
        yield Vocabulary(model)


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_comes_the_schema_accepts(vocabulary: Vocabulary, name: str) -> None:
    schema, random_ = SCHEMAS[name]["schema"], random.Random(1)
    start = vocabulary.start(schema)
    written = [text for _ in range(12) if (text := vocabulary.write(start.clone(), random_)) is not None]
    assert len(written) >= 10
    formats = jsonschema.FormatChecker()
    formats.checks("time", ValueError)(lambda text: bool(dt.time.fromisoformat(str(text))))
    formats.checks("date-time", ValueError)(lambda text: bool(dt.datetime.fromisoformat(str(text))))
    checker = jsonschema.Draft202012Validator(schema, format_checker=formats)
    for text in written:
        checker.validate(json.loads(text))


@pytest.mark.parametrize("name", [name for name, each in SCHEMAS.items() if "accepted" in each])
def test_texts_are_accepted_and_refused(vocabulary: Vocabulary, name: str) -> None:
    case = SCHEMAS[name]
    assert [text for text in case["accepted"] if not vocabulary.reads(case["schema"], text.encode())] == []
    assert [text for text in case["refused"] if vocabulary.reads(case["schema"], text.encode())] == []


def test_bytes_that_make_no_character_never_come(vocabulary: Vocabulary) -> None:
    for text in ("é", "\u0800", "\ud7ff", "\U00010000", "\U0010ffff", "☃"):
        assert vocabulary.reads({"type": "string"}, f'"{text}"'.encode())
    for wrong in ("c0a2", "e080a2", "f08080a2", "eda080", "f4908080", "ff", "80"):
        assert not vocabulary.reads({"type": "string"}, b'"%b"' % bytes.fromhex(wrong))


def test_mask_and_permits_agree_and_special_tokens_never_come(vocabulary: Vocabulary) -> None:
    random_, ends = random.Random(5), [vocabulary.end, vocabulary.token_of[ord("x")]]
    schema = {"type": "object", "properties": {"x": {"type": "string", "maxLength": 9}}, "required": ["x"]}
    constraint = vocabulary.made.constrain(json_grammar(schema), ends)
    for _ in range(60):
        if random_.random() < 0.5:
            constraint.prepare()
        allowed = np.flatnonzero(constraint.allowed()).tolist()
        assert allowed == [token for token in range(vocabulary.tokenizer.vocab_size) if constraint.permits(token)]
        assert not vocabulary.tokenizer.special_ids & set(allowed) - {vocabulary.end}
        assert not set(allowed) & set(ends) or set(ends) == set(allowed)
        if set(allowed) == set(ends):
            return
        bytes_ = [token for token in allowed if vocabulary.tokenizer.raw_of.get(token, b"") >= b"\x80"]
        constraint.accept(random_.choice(bytes_ or allowed))
    pytest.fail("It never ended.")


def test_a_clone_goes_its_own_way_and_a_wrong_token_ends_all(vocabulary: Vocabulary) -> None:
    constraint = vocabulary.start({"enum": ["a", "b"]})
    quote, a, b = (vocabulary.token_of[ord(each)] for each in '"ab')
    constraint.accept(quote)
    other = constraint.clone()
    other.accept(a)
    constraint.accept(b)
    assert other.permits(quote) is constraint.permits(quote) is True
    constraint.accept(b)
    assert not constraint.allowed().any()
    assert not constraint.permits(quote)
    assert other.permits(quote)
    for begin, further in ((b"[" + 16 * b"1", False), (b'["' + 16 * b"1", True)):
        constraint = vocabulary.start({"type": "array"})
        for byte in begin:
            constraint.accept(vocabulary.token_of[byte])
        assert constraint.clone().permits(vocabulary.token_of[ord("1")]) is further


def test_calls_are_forced_where_they_begin(vocabulary: Vocabulary) -> None:
    tool: Any = ("f", {"type": "object", "properties": {"a": {"type": "number"}}})
    languages = {
        "free": grammars.calls_grammar([tool], None, may_answer=True, parallel=True),
        "forced": grammars.calls_grammar([tool], None, may_answer=False, parallel=False),
        "digits": grammars.regex_grammar("^[0-9]+$"),
        "chosen": grammars.calls_grammar(
            [tool], None, answer=grammars.choice_grammar(["release2024"]), may_answer=True, parallel=True
        ),
    }
    for name, texts in tables(__file__)["CALLS"].items():
        found = [text for text in texts["taken"] + texts["refused"] if vocabulary.reads(languages[name], text.encode())]
        assert found == texts["taken"]


@pytest.mark.parametrize("case", DATA["refusals"], ids=lambda case: json.dumps(case["schema"])[:60])
def test_what_cannot_be_held_to_is_refused_by_name(vocabulary: Vocabulary, case: dict[str, Any]) -> None:
    with pytest.raises(SchemaError) as caught:
        vocabulary.start(case["schema"])
    assert case["names"] in str(caught.value)


@cases
def test_no_number_does_harm(vocabulary: Vocabulary, keyword: str, numbers: list[float]) -> None:
    for number, sign, kind in itertools.product(numbers, (1, -1), ("integer", "number", "string", "array")):
        schema = {"type": kind, keyword: sign * number}
        for each in (schema, {"allOf": [{"$ref": "#/$defs/a"}, {"maximum": 7}], "$defs": {"a": schema}}):
            with contextlib.suppress(SchemaError):
                vocabulary.start(each).forced(9)


def test_schemas_beyond_a_limit_are_refused(vocabulary: Vocabulary) -> None:
    deep = json.loads('{"items":' * 200 + "{}" + "}" * 200)
    doubling = {f"a{at + 1}": {"allOf": [{"$ref": f"#/$defs/a{at}"}] * 2} for at in range(16)}
    nested = {str(at): {"allOf": [{"allOf": [{"allOf": [{"$ref": f"#/$defs/{at + 1}"}, {}]}, {}]}]} for at in range(99)}
    bombs = {
        "100 deep": deep,
        "65536 characters": {"enum": list(range(1_000_000))},
        "merge more than 2000": {"$defs": doubling | {"a0": {"type": "object"}}, "$ref": "#/$defs/a16"},
        "too deeply": {"$ref": "#/$defs/0", "$defs": nested | {"99": {}}},
        "more than 128": {"properties": {str(number): {"type": "null"} for number in range(129)}},
    }
    for limit, bomb in bombs.items():
        with pytest.raises(SchemaError, match=limit):
            vocabulary.start(bomb)


def test_long_texts_many_rules_and_many_tools_are_followed(vocabulary: Vocabulary) -> None:
    for grammar in (grammars.choice_grammar(["ab " * 10_000]), grammars.regex_grammar("(ab ){1000}{1000}{1000}")):
        long = vocabulary.start(grammar)
        for token in long.forced(20):
            assert long.forced(3)[0] == token
            long.accept(token)
    rules = "\n".join(f'r{number}: "{number}"' for number in range(1000))
    deep = "\n".join(f"A{at}: {'(' * 20}A{at + 1}{')' * 20}" for at in range(300))
    choice = f'start: {" | ".join(f"r{n}" for n in range(1000))} | A0\n{rules}\n{deep}\nA300: "a"'
    assert all(vocabulary.reads(grammars.written_grammar(choice), text) for text in (b"999", b"a"))
    following = "".join(f'\nt{at}: "a" ("b" t{at + 1} | "c")' for at in range(700))
    assert vocabulary.reads(grammars.written_grammar(f'start: t0{following}\nt700: "z"'), b"ababac")
    assert vocabulary.reads(grammars.choice_grammar(['q\x7f\\"\nz', "\x00"]), b'q\x7f\\"\nz')
    tools = [(f"f{at}", {"properties": {f"p{each}": {"type": "string"} for each in range(8)}}) for at in range(70)]
    assert vocabulary.start(
        grammars.calls_grammar(tools, None, answer=json_grammar({}), may_answer=True, parallel=True)
    )
    chain = {str(at): {"anyOf": [{"$ref": f"#/$defs/{at + 1}"}, {}]} for at in range(1100)}
    assert vocabulary.start({"$ref": "#/$defs/0", "$defs": chain | {"1100": {}}}), "deeper than a usual stack"
    for refused, rules in (("no text follows it", "start start"), ("`%json`", '%json {"const": -1e20}')):
        with pytest.raises(SchemaError, match=refused):
            vocabulary.start(grammars.written_grammar(f"start: {rules}"))


def test_equal_schemas_of_an_any_of_are_one(vocabulary: Vocabulary) -> None:
    """Each would multiply the work of those inside."""
    lists = {"type": "array", "items": {"$ref": "#/$defs/a"}}
    bomb: dict[str, Any] = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [lists] * 200}}}
    assert adapted(bomb)["$defs"]["a"]["anyOf"] == [lists, *[False] * 199]
    assert vocabulary.reads(bomb, b"[[],[[]]]")
    bomb["$defs"]["a"]["anyOf"] = [lists | {"maxItems": 1000 + at} for at in range(200)]
    for each in (bomb, grammars.written_grammar(f'start: {"(a|b)* " * 3000}\na: "a"\nb: "b"')):
        with pytest.raises(SchemaError, match="too many of its rules"):
            vocabulary.start(each)


def test_who_has_used_up_the_time_may_write_nothing(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    held = vocabulary.start({"const": "abcdefghijkl"})
    for token in vocabulary.tokenizer.encode('"abc', parse_special=False).tolist():
        held.accept(token)
    spent = itertools.count(step=0.6)
    monkeypatch.setattr("edge_phi3.engine.constraint.time.thread_time", lambda: next(spent))
    assert [len(held.forced(9)), len(held.forced(9))] == [1, 0]
    assert held.clone().allowed().any(), "to look ahead takes nothing from the answer"
    token = vocabulary.token_of[ord("[")]
    for use in (GrammarConstraint.allowed, GrammarConstraint.permits, GrammarConstraint.accept):
        constraint = vocabulary.start({"type": "array"})
        use(constraint.clone(), *[token] * (use is not GrammarConstraint.allowed))
        assert not constraint.permits(token)
        assert not constraint.allowed().any()


HARD = {"type": "string", "pattern": "^(.{0,200}a.{0,200}){9,200}$"}  # on which llguidance gives up after a few tokens


def test_where_llguidance_gives_up_nothing_may_come(vocabulary: Vocabulary) -> None:
    constraint = vocabulary.start(HARD)
    for byte in b'"' + b"aababbabab" * 20:
        if not constraint.allowed().any():
            break
        assert constraint.permits(vocabulary.token_of[byte])
        constraint.accept(vocabulary.token_of[byte])
    assert not any(map(constraint.permits, (vocabulary.end, vocabulary.token_of[byte])))


# -- in decoders and the engine

PROMPT = np.arange(300, 320, dtype=np.int32)
ANSWER, OPTIONS, BEAMS = (tables(__file__)[name] for name in ("ANSWER", "OPTIONS", "BEAMS"))


@pytest.fixture(scope="module")
def engine(make_model: MakeModel) -> Iterator[Engine]:
    with running_engine(make_model("4k"), threads=1) as engine:
        yield engine


def test_what_a_schema_leaves_no_choice_about_is_drafted(engine: Engine) -> None:
    names = ["the name of the first property", "and that of the second"]
    schema = {"type": "object", "properties": {name: {"enum": ["yes", "no"]} for name in names}, "required": names}
    plain, drafted = (Constrained(engine, schema, seed=3, prompt_lookup_num_tokens=each).finished() for each in (0, 8))
    assert (plain.accepted_tokens > 8, drafted.accepted_tokens > 8) == (False, True)
    assert generated(plain) == generated(drafted)


@pytest.mark.parametrize("options", OPTIONS)
def test_tokens_and_scores_are_those_of_a_model_that_says_nothing_else(engine: Engine, options: dict[str, Any]) -> None:
    defaults: ModelDefaults = engine.model.defaults
    start = ConstraintVocabulary(engine.model.tokenizer).constrain(json_grammar(ANSWER), defaults.eos_token_ids)
    model = toys.table_model(1, defaults.vocab_size)

    def obedient(prefix: toys.Prefix) -> NDArray[np.float32]:
        row, constraint = model(prefix).copy(), start.clone()
        for token in prefix[len(PROMPT) :]:
            constraint.accept(token)
        constraint.mask(row)
        return row

    options = {"defaults": defaults, "max_length": None, "max_new_tokens": 200} | options
    logprobs = options.pop("top_logprobs", None)
    result = toys.answer(model, PROMPT.tolist(), constraint=start, top_logprobs=logprobs, **options)
    expected = toys.answer(obedient, PROMPT.tolist(), **options)
    assert [each.tolist() for each in result.sequences] == [each.tolist() for each in expected.sequences]
    assert result.finish_reasons == expected.finish_reasons
    assert result.scores == expected.scores


class Constrained(Asked):
    """A submitted request that a schema holds."""

    def __init__(self, engine: Engine, schema: object = ANSWER, **kwargs: Any) -> None:
        super().__init__(engine, PROMPT, max_new_tokens=1)
        self.finished()
        defaults = engine.model.defaults
        logprobs = kwargs.pop("top_logprobs", None)
        kwargs = {"max_length": None, "max_new_tokens": 200} | kwargs
        config = dataclasses.replace(GenerationConfig.resolve(kwargs, defaults), top_logprobs=logprobs)
        vocabulary = ConstraintVocabulary(engine.model.tokenizer)
        constraint = vocabulary.constrain(json_grammar(schema), defaults.eos_token_ids)
        self.request = GenerationRequest(PROMPT, config, constraint=constraint)
        self.running = engine.submit(self.request, self.events.put)


@pytest.mark.parametrize("options", OPTIONS + BEAMS)
def test_answers_are_whole_and_follow_the_schema(engine: Engine, options: dict[str, Any]) -> None:
    event = Constrained(engine, **options).finished()
    assert set(event.result.finish_reasons) == {"stop"}
    decode = engine.model.tokenizer.decode
    for sequence in event.result.sequences:
        jsonschema.validate(json.loads(decode(sequence.tolist()).removeprefix(decode(PROMPT.tolist()))), ANSWER)


def alive() -> int:
    gc.collect()
    return sum(isinstance(each, GrammarConstraint) for each in gc.get_objects())


def test_constraints_are_freed_when_requests_end_fail_or_are_given_up(engine: Engine) -> None:
    before = alive()
    for options in (OPTIONS[0], {"seed": 1, "num_return_sequences": 4}, *BEAMS):
        Constrained(engine, **options).finished()
    banned = {"suppress_tokens": list(range(engine.model.model.vocab_size))}
    for options in (OPTIONS[0], {"seed": 1}, {"seed": 1, "num_return_sequences": 2}, BEAMS[0]):
        with pytest.raises(GenerationError, match="format leaves no token"):
            Constrained(engine, **banned, **options).finished()
    with pytest.raises(GenerationError, match="takes too long to follow"):
        Constrained(engine, HARD, seed=1).finished()
    engine.cancel(Constrained(engine, {"type": "array", "minItems": 2000}, seed=1, max_new_tokens=3000).running)
    Constrained(engine, do_sample=False).finished()  # what was given up is gone before this one ends
    with engine_at_rest(engine):
        assert alive() == before
