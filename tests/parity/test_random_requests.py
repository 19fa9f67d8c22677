"""Fresh random requests, through the whole engine and through transformers on the same F32 checkpoints, token by token.

    TORCH_PYTHON=~/torch/bin/python PARITY_REQUESTS=5000 pytest -m parity tests/parity/test_random_requests.py

Checkpoints (a plain one, one with grouped-query attention, one of the 128k kind) and requests come from a seed that is
new each time, and printed; PARITY_SEED repeats one. Greedy decoding, sampling, beam search, beam sampling and group
beam search take turns, with random combinations of all parameters. transformers draws from the random numbers that a
`seed` promises (`docs/parameters.md`), so that sampled answers are compared token by token too, and log-probabilities
to 1e-3.

llama.cpp's logits differ from torch's by some 1e-5. Where that decides between two tokens, the answers differ although
neither is wrong: such a request counts as "by rounding" when transformers itself gives our answer after noise of 1e-4
was put into its logits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.generation import API_DEFAULTS, GenerationResult
from tests.golden.attention import MODELS
from tests.golden.checkpoints import write_checkpoint
from tests.golden.generation_data import Answer, differences
from tests.golden.requests import MODES, Request, RequestMaker
from tests.golden.vocabularies import phi3_vocabulary
from tests.parity.conftest import Peers
from tests.support.engines import Asked

pytestmark = pytest.mark.parity

REQUESTS = int(os.environ.get("PARITY_REQUESTS", "500"))
SEED = int(os.environ.get("PARITY_SEED", secrets.randbits(32)))

CHECKPOINTS = ("4k", "gqa", "128k")
_NOISE, _NOISY_RUNS = 1e-4, 40
_SPARE = 1.1
"""transformers fails on some requests (it draws from NaN), so that many times more are asked."""


def random_requests(seed: int, count: int) -> list[Request]:
    """Make requests, the modes in turn, over the ordinary pieces of the small Phi-3 vocabulary."""
    vocabulary = phi3_vocabulary(merges=300)
    added = {token.id for token in vocabulary.added}
    usual = [token for token in range(259, len(vocabulary.pieces)) if token not in added]
    texts = [piece.text.replace("▁", " ") for piece in vocabulary.pieces]
    maker = RequestMaker(seed, usual, texts=texts, longest_prompt=60, most_new=20, most_beams=8)
    return [maker.make(MODES[index % len(MODES)]) for index in range(count)]


@dataclasses.dataclass
class Compared:
    """A request, transformers' answer, ours, and the token that ours is padded with."""

    request: Request
    theirs: Answer
    ours: GenerationResult
    pad: int

    def differs(self) -> list[str]:
        """Return in what the answers differ."""
        return differences(self.ours, self.request, self.theirs, self.pad)

    def is_among(self, answers: list[list[list[int]]]) -> bool:
        """Return whether ours is one of some answers, each its sequences padded to one length."""
        return any(
            sequences == [row.tolist() + [self.pad] * (len(sequences[0]) - len(row)) for row in self.ours.sequences]
            for sequences in answers
        )


def ask_transformers(peers: Peers, checkpoint: Path, requests: list[Request], *options: str) -> list[Any]:
    """Return an answer for each request, as ``tests.golden.reference`` writes it."""
    asked, answers = checkpoint / "requests.json", checkpoint / "answers.json"
    asked.write_text(json.dumps([dataclasses.asdict(request) for request in requests]), encoding="utf-8")
    peers.python("-m", "tests.golden.reference", checkpoint, asked, answers, *options)
    result: list[Any] = json.loads(answers.read_text(encoding="utf-8"))
    return result


def ask_engine(model: Path, answered: list[tuple[Request, Any]]) -> list[Compared]:
    """Run all requests at once, and put our answers beside theirs."""
    engine = Engine(EngineSettings(model, ctx_size=4096, kv_cache_type="f32", window_chunk=1, max_queue=len(answered)))
    engine.load()
    usual: dict[str, Any] = {**API_DEFAULTS}
    scored = {"return_dict_in_generate": True, "output_scores": True}
    try:
        asked = [Asked(engine, request.prompt, **usual | request.kwargs | scored) for request, _ in answered]
        configs = [one.request.config for one in asked]
        pads = [c.eos_token_id[0] if c.pad_token_id is None else c.pad_token_id for c in configs]
        return [
            Compared(request, Answer(**theirs), one.finished().result, pad)
            for (request, theirs), one, pad in zip(answered, asked, pads, strict=True)
        ]
    finally:
        engine.close()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_answers_are_those_of_transformers(name: str, peers: Peers, tmp_path: Path) -> None:
    index = CHECKPOINTS.index(name)
    seed, share = SEED + index, len(range(index, REQUESTS, len(CHECKPOINTS)))
    checkpoint = write_checkpoint(tmp_path / "checkpoint", seed=seed, gain=2.0, **MODELS[name])
    requests = random_requests(seed, int(share * _SPARE) + 1)
    theirs = ask_transformers(peers, checkpoint, requests)
    answered = [pair for pair in zip(requests, theirs, strict=True) if pair[1] is not None][:share]
    assert len(answered) == share, "transformers failed on more requests than were spare"
    model = convert(checkpoint, tmp_path / "model.gguf", outtype="f32").path
    doubtful = [one for one in ask_engine(model, answered) if one.differs()]
    noise = ("--noise", str(_NOISE), "--times", str(_NOISY_RUNS))
    asked = [one.request for one in doubtful]
    noisy = ask_transformers(peers, checkpoint, asked, *noise) if doubtful else []
    different = [one for one, answers in zip(doubtful, noisy, strict=True) if not one.is_among(answers)]
    print(f"{share} requests; by rounding differ {Counter(request.mode for request in asked)}")
    wrong = "\n".join(f"{json.dumps(dataclasses.asdict(one.request))}: {one.differs()[0]}" for one in different)
    assert not different, f"PARITY_SEED={SEED} PARITY_REQUESTS={REQUESTS}\n{wrong}"
