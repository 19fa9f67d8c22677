"""Lets transformers answer requests from a file, for callers without torch.

    python -m tests.golden.answer CHECKPOINT REQUESTS.json ANSWERS.json [--noise 1e-4 --times 20]

The answers are a list with, for each request, an answer, or null where transformers fails on it. With noise, it is
instead a list of the different sequences that came of several runs, each with uniform noise of that size in the logits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from tests.golden.reference import Reference
from tests.golden.requests import Request


def main() -> None:
    """Answer every request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("requests", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--times", type=int, default=1)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint, use_fast=False)
    reference = Reference(arguments.checkpoint, tokenizer)
    reference.noise = arguments.noise
    answers = []
    for fields in json.loads(arguments.requests.read_text(encoding="utf-8")):
        found = [_answer(reference, Request(**fields)) for _ in range(arguments.times)]
        if not arguments.noise:
            answers.append(found[0])
            continue
        different: list[Any] = []
        for answer in found:
            if answer is not None and answer["sequences"] not in different:
                different.append(answer["sequences"])
        answers.append(different)
    arguments.answers.write_text(json.dumps(answers), encoding="utf-8")


def _answer(reference: Reference, request: Request) -> dict[str, Any] | None:
    try:
        return dataclasses.asdict(reference.answer(request))
    except (RuntimeError, ValueError) as error:
        if "not finite" in str(error) or "found invalid values" in str(error):
            return None
        raise


if __name__ == "__main__":
    main()
