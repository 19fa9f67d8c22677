"""The golden data of ``generate()``: how it is read, and which checkpoints it was made with.

Made by ``make.py``. In ``tests/golden/generation/``:

- ``replay.json`` and ``replay.npz``: requests over a random Phi-3 of 96 tokens whose logits were rounded to float16,
  with transformers' answers, and those logits for every prefix that occurred.
- ``engine.json``: requests over a random Phi-3 with a real tokenizer, with transformers' answers.
- ``validation.json``: ``generate_kwargs`` at the edge of what transformers accepts, each with the reason for which
  transformers refuses it or null; ``names.json``: the names that it has.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation import ModelDefaults
from tests.golden.checkpoints import write_checkpoint
from tests.golden.requests import Request

FOLDER = Path(__file__).with_name("generation")
VALIDATION = FOLDER / "validation.json"
VALIDATION_PROMPT = [11, 12, 13, 11, 12]

REPLAY_VOCABULARY = 96
REPLAY_DEFAULTS = ModelDefaults(
    vocab_size=REPLAY_VOCABULARY, bos_token_id=1, eos_token_ids=(2, 5, 7), pad_token_id=2, context_length=4096
)
REPLAY_SEED = 5
ENGINE_SEED = 17


@dataclasses.dataclass(frozen=True)
class Answer:
    """What transformers generated: token ids of each sequence, prompt included, padded to one length, and beam scores.

    `scores` has, for each sequence, the processed score of each token, padding included, `logprobs` their log-softmax.
    In beam modes `scores` are the transition scores, and `logprobs` is None; in group beam search, whose beam indices
    transformers mixes up, so is `scores`.
    """

    sequences: list[list[int]]
    sequences_scores: list[float] | None = None
    scores: list[list[float]] | None = None
    logprobs: list[list[float]] | None = None


def replay_texts() -> list[str]:
    """Return each token of the replayed model a text of a few letters, so that stop strings do occur."""
    random = np.random.Generator(np.random.PCG64(3))
    letters = np.array(list("eo "))
    return ["".join(letters[random.integers(0, 3, random.integers(1, 4))]) for _ in range(REPLAY_VOCABULARY)]


def write_replay_model(folder: Path) -> Path:
    ends: dict[str, Any] = {"eos_token_id": list(REPLAY_DEFAULTS.eos_token_ids), "pad_token_id": 2}
    write_checkpoint(folder, seed=REPLAY_SEED, hidden_size=32, layers=1, vocab_size=REPLAY_VOCABULARY, **ends)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, **ends}), encoding="utf-8")
    return folder


def write_engine_model(folder: Path) -> Path:
    return write_checkpoint(folder, seed=ENGINE_SEED, hidden_size=64, heads=4, layers=2, gain=2.0)


def write_answers(path: Path, answers: Sequence[tuple[Request, Answer]]) -> None:
    lines = [
        json.dumps([dataclasses.asdict(request), dataclasses.asdict(answer)], separators=(",", ":"))
        for request, answer in answers
    ]
    write_lines(path, lines)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a JSON list, an entry a line."""
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def read_answers(name: str) -> list[tuple[Request, Answer]]:
    rows = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return [(Request(**request), Answer(**answer)) for request, answer in rows]


def write_logits(path: Path, logits: dict[tuple[int, ...], NDArray[np.float16]]) -> None:
    """Write the logits of prefixes; tokens are padded with -1 to one length."""
    tokens = np.array(list(itertools.zip_longest(*logits, fillvalue=-1)), np.int8).T
    np.savez_compressed(path, tokens=tokens, logits=np.stack(list(logits.values())))


def read_logits() -> dict[tuple[int, ...], NDArray[np.float32]]:
    """Return the logits of every prefix that occurred, each of shape (vocabulary,)."""
    with np.load(FOLDER / "replay.npz") as file:
        rows = zip(file["tokens"], file["logits"].astype(np.float32), strict=True)
    return {tuple(tokens[tokens >= 0].tolist()): logits for tokens, logits in rows}


def differences(ours: Any, request: Request, answer: Answer, pad_token_id: int) -> list[str]:
    """Return what differs between a `GenerationResult` with scores and transformers' answer, padded with a token.

    Nothing when all tokens are equal and all scores agree to 1e-3 or one part in 1,000.
    """
    found: list[str] = []
    start = len(request.prompt)
    if len(ours.sequences) != len(answer.sequences):
        return [f"{len(ours.sequences)} sequences instead of {len(answer.sequences)}"]
    for index, (tokens, theirs) in enumerate(zip(ours.sequences, answer.sequences, strict=True)):
        padded = tokens.tolist() + [pad_token_id] * (len(theirs) - len(tokens))
        if padded != theirs:
            found.append(f"sequence {index} is {padded[start:]} instead of {theirs[start:]}")
    if found:
        return found
    if answer.sequences_scores is not None:
        found += _apart("sequences_scores", ours.sequences_scores, answer.sequences_scores)
    for index, scored in enumerate(ours.scores):
        # transformers knows no score of an end token appended to a beam that was cut off.
        if answer.scores is not None:
            found += _apart(f"scores[{index}]", [each.score for each in scored], answer.scores[index][: len(scored)])
        if answer.logprobs is not None:
            logprobs = answer.logprobs[index][: len(scored)]
            found += _apart(f"logprobs[{index}]", [each.logprob for each in scored], logprobs)
    return found


def _apart(name: str, ours: Sequence[float], theirs: Sequence[float]) -> list[str]:
    if len(ours) == len(theirs) and np.allclose(ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True):
        return []
    return [f"{name} are {list(ours)} instead of {list(theirs)}"]
