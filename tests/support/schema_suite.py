"""What is made of the official JSON-Schema-Test-Suite's schemas: refused, or held to, and how well.

    python -m tests.support.schema_suite FOLDER      # its tests/draft2020-12 (https://github.com/json-schema-org)

Each schema that is accepted is sampled, with a bias to tokens that close strings, lists and objects, up to 512 tokens:
what has ended must be valid. Exit code 1 where anything is not.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, cast

import jsonschema
import numpy as np

from edge_phi3.engine.constraint import ConstraintVocabulary
from edge_phi3.engine.errors import SchemaError
from edge_phi3.engine.grammars import json_grammar
from edge_phi3.engine.tokenizer import Tokenizer
from tests.support.schemas import Pieces

END, STEPS = 0, 512
PIECES = [b"</s>", *(bytes([value]) for value in range(256)), *b'{" "} ": ", ]] }, "a" foo bar'.split()]


def sampled(made: ConstraintVocabulary, schema: object, chance: random.Random) -> bytes | None:
    """Return a random answer, or None where it has not ended in time."""
    constraint, text = made.constrain(json_grammar(schema), [END]), b""
    for _ in range(STEPS):
        allowed = np.flatnonzero(constraint.allowed()).tolist()
        if not allowed or END in allowed:
            return text if allowed else None
        closing = [token for token in allowed if PIECES[token].strip() and not PIECES[token].strip(b'"}], ')]
        token = chance.choice(closing if closing and chance.random() < 0.3 else allowed)
        constraint.accept(token)
        text += PIECES[token]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samplings", type=int, default=50)
    arguments = parser.parse_args()
    tokens = Pieces(PIECES, {END}, len(PIECES))
    made, chance = ConstraintVocabulary(cast("Tokenizer", tokens)), random.Random(1)
    refused: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for path in sorted(arguments.folder.glob("*.json")):
        for case in json.loads(path.read_text(encoding="utf-8")):
            schema: Any = case["schema"]
            counts["schemas"] += 1
            try:
                answers = [sampled(made, schema, chance) for _ in range(arguments.samplings)]
            except SchemaError as error:
                refused[str(error)[:60]] += 1
                continue
            ended = [answer for answer in answers if answer is not None]
            validator = jsonschema.Draft202012Validator(schema)
            counts["accepted"] += 1
            try:
                wrong = [answer for answer in ended if not validator.is_valid(json.loads(answer))]
            except re.error:
                counts["of which Python's `re` cannot judge"] += 1
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
