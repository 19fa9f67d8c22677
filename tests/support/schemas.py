"""Schemas for random requests, and a vocabulary of few tokens that can write what they ask for.

    python -m tests.support.schemas FOLDER      # its tests/draft2020-12 (https://github.com/json-schema-org)

says what is made of the official JSON-Schema-Test-Suite's schemas: refused, or held to, and how well. Each that is
accepted is sampled, with a bias to tokens that close strings, lists and objects, up to 512 tokens: what has ended must
be valid. Exit code 1 where anything is not.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

import httpx
import jsonschema
import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.constraint import ConstraintVocabulary
from edge_phi3.engine.errors import SchemaError
from edge_phi3.engine.grammars import calls_grammar, choice_grammar, json_grammar, written_grammar
from edge_phi3.engine.tokenizer import Tokenizer
from tests.support.scenarios import END, INFINITE, NAN, VOCABULARY

_PIECES: Final = ('{"', '"}', '":', '",', "[[", "]]", "],", "true", "null", "12", "0.", '"a"', '"b":')
_TREE: Final[dict[str, Any]] = {
    "anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 3}]
}
SCHEMAS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"type": "array", "items": {"type": "number"}},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]},
    {"enum": ["a", "ab", 12, None, [1, 2]]},
    {"type": "string", "pattern": "^(ab|ba){2,5}$"},
    {"$ref": "#/$defs/tree", "$defs": {"tree": _TREE}},
    {"type": "integer", "minimum": 5, "maximum": 2100},
)
_TOOLS: Final = [("ab", SCHEMAS[2]), ("a", {"type": "object", "properties": {}})]
GRAMMARS: Final = (
    *map(json_grammar, SCHEMAS),
    calls_grammar(_TOOLS, None, may_answer=False, parallel=True),
    calls_grammar(_TOOLS[:1], None, may_answer=True, parallel=False),
    choice_grammar(["a", "ab", "b"]),
    written_grammar('root ::= ("ab" | "ba")+ "c"'),
)


class Pieces:
    """What a constraint reads of a vocabulary whose tokens are some texts, again and again."""

    unused_ids = control_ids = frozenset[int]()

    def __init__(self, pieces: Iterable[bytes], special_ids: set[int], vocab_size: int) -> None:
        self.pieces, self.special_ids, self.vocab_size = [*pieces], special_ids, vocab_size

    def bytes_of(self, token: int) -> bytes:
        return self.pieces[token % len(self.pieces)]

    def encode(self, text: str, *, parse_special: bool) -> NDArray[np.int32]:
        assert not parse_special
        return np.array([self.pieces.index(bytes([byte])) for byte in text.encode()], np.int32)


@cache
def small_vocabulary() -> ConstraintVocabulary:
    """Return one of JSON's punctuation, some letters, digits, and pieces of several."""
    texts = (*'{}[]":,.+- 0123456789abcdefgilmnorstu\\', *_PIECES)
    tokens = Pieces(map(str.encode, texts), {0, END, NAN, INFINITE}, VOCABULARY)
    return ConstraintVocabulary(cast("Tokenizer", tokens))


def random_schema(chance: random.Random, depth: int) -> dict[str, Any]:
    """Return the schema of an object with up to four properties, of which some are lists and objects again."""

    def value(depth: int) -> dict[str, Any]:
        simple: list[dict[str, Any]] = [
            {"type": "string"} | chance.choice(({}, {"maxLength": chance.randint(0, 9)}, {"format": "date"})),
            {"type": "integer", "minimum": chance.randint(-5, 5), "maximum": chance.randint(6, 1000)},
            {"type": "number"} | chance.choice(({}, {"exclusiveMinimum": 0, "maximum": 0.5}, {"exclusiveMaximum": -2})),
            {"type": chance.choice(("boolean", "null"))},
            {"enum": chance.sample(["a", "b c", 1, None, 2.5, "ü", '"'], 3)},
            {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^[a-c]{1,4}$"}]},
        ]
        if depth == 0 or chance.random() < 0.5:
            return chance.choice(simple)
        if chance.random() < 0.5:
            return random_schema(chance, depth - 1)
        return {"type": "array", "items": value(depth - 1), "minItems": chance.randint(0, 1), "maxItems": 3}

    names = chance.sample(["a", "b", "name", "x y", "ä", "id"], chance.randint(0, 4))
    required = [name for name in names if chance.random() < 0.6]
    properties = {name: value(depth - 1) for name in names} if depth else {}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return schema | ({"required": [name for name in required if name in properties], "additionalProperties": False})


_LAST = 0
_BYTES = [b"</s>", *(bytes([value]) for value in range(256)), *b'{" "} ": ", ]] }, "a" foo bar'.split()]


def _sampled(made: ConstraintVocabulary, schema: object, chance: random.Random) -> bytes | None:
    """Return a random answer, or None where it has not ended in time."""
    constraint, text = made.constrain(json_grammar(schema), [_LAST]), b""
    for _ in range(512):
        allowed = np.flatnonzero(constraint.allowed()).tolist()
        if not allowed or _LAST in allowed:
            return text if allowed else None
        closing = [token for token in allowed if _BYTES[token].strip() and not _BYTES[token].strip(b'"}], ')]
        token = chance.choice(closing if closing and chance.random() < 0.3 else allowed)
        constraint.accept(token)
        text += _BYTES[token]
    return None


def _asked(url: str, schema: object, chance: random.Random) -> bytes | None:
    """Return the answer of a llama-server, drawn with the same bias, or None where it has not ended in time."""
    body = {"prompt": "a", "json_schema": schema, "n_predict": 512, "seed": chance.getrandbits(31), "temperature": 1.0}
    body["logit_bias"] = [[text, 3.0] for text in '"}]']
    answer = httpx.post(f"{url}/completion", json=body, timeout=600)
    if answer.status_code != 200:
        raise SchemaError(answer.text)
    done = answer.json()
    return str(done["content"]).encode() if done["stop_type"] == "eos" else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samplings", type=int, default=50)
    parser.add_argument("--llama-server", metavar="URL", help="sample this server's answers instead")
    arguments = parser.parse_args()
    tokens = Pieces(_BYTES, {_LAST}, len(_BYTES))
    made, chance = ConstraintVocabulary(cast("Tokenizer", tokens)), random.Random(1)
    refused: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for path in sorted(arguments.folder.glob("*.json")):
        for case in json.loads(path.read_text(encoding="utf-8")):
            schema: Any = case["schema"]
            counts["schemas"] += 1
            try:
                if url := arguments.llama_server:
                    answers = [_asked(url, schema, chance) for _ in range(arguments.samplings)]
                else:
                    answers = [_sampled(made, schema, chance) for _ in range(arguments.samplings)]
            except SchemaError as error:
                refused[str(error)[:60]] += 1
                continue
            ended = [answer for answer in answers if answer is not None]
            validator = jsonschema.Draft202012Validator(schema)
            counts["accepted"] += 1
            try:
                wrong = [answer for answer in ended if not validator.is_valid(json.loads(answer))]
            except ValueError:
                wrong = ended[:1]
            except (re.error, OverflowError):
                counts["of which Python cannot judge"] += 1
                continue
            counts["with wrong answers"] += bool(wrong)
            counts["of which too few ended"] += len(ended) < 0.9 * len(answers)
            if wrong:
                print(path.name, case["description"], json.dumps(schema)[:200], wrong[0])
    print(*(f"{count} {what}" for what, count in counts.items()), sep=", ")
    print("refused:", dict(refused.most_common(20)))
    return int(counts["with wrong answers"] > 0)


if __name__ == "__main__":
    sys.exit(main())
