"""Records what transformers generates, for ``tests/generation`` and ``tests/engine``; see `generation_data`.

Run ``python -m tests.golden.make [elementwise] [validation] [replay] [engine]`` where torch and transformers 4.49.0 are
installed; without a name it makes all four.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer
from transformers.generation import logits_process

from tests.golden import elementwise, validation
from tests.golden.generation_data import (
    ENGINE_SEED,
    FOLDER,
    REPLAY_SEED,
    REPLAY_VOCABULARY,
    Answer,
    replay_texts,
    write_answers,
    write_engine_model,
    write_logits,
    write_replay_model,
)
from tests.golden.reference import Reference
from tests.golden.requests import MODES, Request, RequestMaker

REQUESTS_PER_MODE = 90
"""Of each decoding mode, in both sets."""


class PlainTokenizer:
    """As much of a tokenizer as transformers needs to find stop strings."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert text == "abcdef"
        assert not add_special_tokens
        return {"input_ids": [-1]}

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(len(self._texts))}

    def _convert_id_to_token(self, token: int) -> str:
        return str(token)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join("abcdef" if token == "-1" else self._texts[int(token)] for token in tokens)


def record_replay() -> None:
    """Record answers together with the logits that they were chosen from."""
    texts = replay_texts()
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(write_replay_model(Path(folder)), PlainTokenizer(texts), rounded=True)
    maker = RequestMaker(REPLAY_SEED, range(1, REPLAY_VOCABULARY), texts=texts)
    answers = []
    for mode in MODES:
        answers += _answered(mode, maker, reference.answer)
    write_answers(FOLDER / "replay.json", answers)
    write_logits(FOLDER / "replay.npz", reference.logits)
    print(f"replay: {_counted(answers)}; {len(reference.logits)} prefixes")


def record_engine() -> None:
    """Record answers that do not hang on rounding errors, for engines that compute logits themselves."""
    with tempfile.TemporaryDirectory() as folder:
        write_engine_model(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
        reference = Reference(Path(folder), tokenizer)
    maker = engine_requests(tokenizer, ENGINE_SEED)
    answers = []
    for mode in MODES:
        answers += _answered(mode, maker, reference.answer_firmly)
    write_answers(FOLDER / "engine.json", answers)
    print(f"engine: {_counted(answers)}")


def engine_requests(tokenizer: Any, seed: int) -> RequestMaker:
    """Make requests over the ordinary pieces of a tokenizer."""
    usual = [token for token in range(259, len(tokenizer)) if token not in tokenizer.all_special_ids]
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    texts = [tokenizer.convert_tokens_to_string(["a", piece])[1:] for piece in pieces]
    return RequestMaker(seed, usual, texts=texts, longest_prompt=40, most_new=16, most_beams=8)


def _answered(mode: str, maker: RequestMaker, ask: Any) -> list[tuple[Request, Answer]]:
    answers: list[tuple[Request, Answer]] = []
    while len(answers) < REQUESTS_PER_MODE:
        request = maker.make(mode)
        try:
            answer = ask(request)
        except (RuntimeError, ValueError) as error:
            # transformers cannot draw from NaN, which its processors make of some combinations.
            if not any(known in str(error) for known in ("not finite", "found invalid values")):
                raise
            continue
        if answer is not None:
            answers.append((request, _shortened(answer)))
    return answers


def _shortened(answer: Answer) -> Answer:
    def short(values: Any) -> Any:
        return [short(value) for value in values] if isinstance(values, list) else float(f"{values:.7g}")

    return Answer(
        answer.sequences,
        *(
            None if values is None else short(values)
            for values in (answer.sequences_scores, answer.scores, answer.logprobs)
        ),
    )


def _counted(answers: list[tuple[Request, Answer]]) -> str:
    return f"{len(answers)} requests, {dict(Counter(request.mode for request, _ in answers))}"


def record_elementwise() -> None:
    """Record what each processor makes of scores."""
    results = {}
    for name, (kind, arguments) in (elementwise.CASES | elementwise.ENCODER_CASES).items():
        tokens, scores = (torch.from_numpy(array) for array in elementwise.inputs(name))
        extra: dict[str, Any] = {}
        if name in elementwise.ENCODER_CASES:
            extra["encoder_input_ids"] = torch.from_numpy(elementwise.PROMPT.astype(np.int64))[None]
        if kind == "NoBadWordsLogitsProcessor":
            extra["eos_token_id"] = torch.tensor([7])
        processor = getattr(logits_process, kind)(**arguments, **extra)
        results[name] = processor(tokens.long(), scores).numpy()
    name, penalty, chosen = elementwise.GROUP_CASE
    tokens, scores = (torch.from_numpy(array) for array in elementwise.inputs(name))
    groups = logits_process.HammingDiversityLogitsProcessor(penalty, 2 * len(chosen), 2)
    current = torch.tensor(chosen + [0] * len(chosen))
    results[name] = groups(tokens.long(), scores, current_tokens=current, beam_group_idx=1).numpy()
    np.savez_compressed(FOLDER / "elementwise.npz", **results)
    print(f"elementwise: {len(results)} processors")


def record_validation() -> None:
    """Record which requests transformers refuses."""
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(write_replay_model(Path(folder)), PlainTokenizer(replay_texts()))
    refused = []
    for kwargs in validation.CASES:
        try:
            mode = "sample" if kwargs.get("num_beams", 1) in (1, None) else "group_beam"
            reference.answer(Request(mode, validation.PROMPT, dict(kwargs)))
            refused.append(None)
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError) as error:
            refused.append(f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
    rows = zip(validation.CASES, refused, strict=True)
    lines = ",\n".join(json.dumps([kwargs, reason]) for kwargs, reason in rows)
    (FOLDER / "validation.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    names = sorted(name for name in transformers.GenerationConfig().to_dict() if not name.startswith("_"))
    (FOLDER / "names.json").write_text(json.dumps(names, indent=0) + "\n", encoding="utf-8")
    print(f"validation: {sum(reason is not None for reason in refused)} of {len(refused)} refused")


def main() -> None:
    """Record the named parts."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(2)
    FOLDER.mkdir(exist_ok=True)
    parts = {
        "elementwise": record_elementwise,
        "validation": record_validation,
        "replay": record_replay,
        "engine": record_engine,
    }
    for part in sys.argv[1:] or parts:
        parts[part]()


if __name__ == "__main__":
    main()
