"""Fresh random requests, through the whole engine and through transformers on the same F32 checkpoints, token by token.

    TORCH_PYTHON=~/torch/bin/python PARITY_REQUESTS=5000 pytest -m parity tests/parity/test_random_requests.py

Checkpoints and requests come from a seed that is new each time, and printed; PARITY_SEED repeats one. All modes take
turns, with random combinations of all parameters. transformers draws from the random numbers that a `seed` promises
(`docs/parameters.md`), so that sampled answers are compared token by token too, and log-probabilities to 1e-3.

llama.cpp's logits differ from torch's by some 1e-5. Where that decides between two tokens, a request counts as "by
rounding" when transformers itself gives our answer after noise of 1e-4 was put into its logits.
"""

import dataclasses
import json
import os
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edge_phi3.conversion.convert import convert
from tests.golden.attention import MODELS
from tests.golden.checkpoints import write_checkpoint
from tests.golden.generation_data import Answer
from tests.golden.requests import MODES, Request, RequestMaker
from tests.parity.conftest import Peers
from tests.support.engines import Compared, compared, running_engine
from tests.support.service_requests import ORDINARY, texts_of

pytestmark = pytest.mark.parity

REQUESTS = int(os.environ.get("PARITY_REQUESTS", "500"))
SEED = int(os.environ.get("PARITY_SEED", secrets.randbits(32)))

CHECKPOINTS = ("4k", "gqa", "128k", "phi-3.5-mini", "phi-3-medium-4k", "phi-4-mini", "phi-4")
_NOISE, _NOISY_RUNS = 1e-4, 40
_SPARE = 1.1
"""transformers fails on some requests (it draws from NaN), so that many times more are asked."""


def ask_transformers(peers: Peers, checkpoint: Path, requests: list[Request], *options: str) -> list[Any]:
    """Return an answer for each request, as ``tests.golden.reference`` writes it."""
    asked, answers = checkpoint / "requests.json", checkpoint / "answers.json"
    asked.write_text(json.dumps([dataclasses.asdict(request) for request in requests]), encoding="utf-8")
    peers.python("-m", "tests.golden.reference", checkpoint, asked, answers, *options)
    return json.loads(answers.read_text(encoding="utf-8"))


def is_among(one: Compared, answers: list[list[list[int]]]) -> bool:
    """Return whether ours is one of some answers, each its sequences padded to one length."""
    return any(
        sequences == [row.tolist() + [one.pad] * (len(sequences[0]) - len(row)) for row in one.ours.sequences]
        for sequences in answers
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_answers_are_those_of_transformers(name: str, peers: Peers, tmp_path: Path) -> None:
    index = CHECKPOINTS.index(name)
    seed, share = SEED + index, len(range(index, REQUESTS, len(CHECKPOINTS)))
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **{"seed": seed, "gain": 2.0, **MODELS[name]})
    texts = texts_of("phi-4-mini" if "phi-4" in name else "4k")
    maker = RequestMaker(seed, ORDINARY, texts=texts, longest_prompt=60, most_new=20, most_beams=8)
    requests = [maker.make(MODES[each % len(MODES)]) for each in range(int(share * _SPARE) + 1)]
    theirs = ask_transformers(peers, checkpoint, requests)
    pairs = zip(requests, theirs, strict=True)
    answered = [(request, Answer(**found)) for request, found in pairs if found is not None][:share]
    assert len(answered) == share, "transformers failed on more requests than were spare"
    model = convert(checkpoint, tmp_path / "model.gguf", outtype="f32").path
    speculation = secrets.choice(("auto", "off", "5"))
    print(f"speculation {speculation}")
    with running_engine(model, ctx_size=4096, parallel=16, max_queue=share, speculation=speculation) as engine:
        doubtful = [one for one in compared(engine, answered) if one.differences]
    noise = ("--noise", str(_NOISE), "--times", str(_NOISY_RUNS))
    asked = [one.request for one in doubtful]
    noisy = ask_transformers(peers, checkpoint, asked, *noise) if doubtful else []
    different = [one for one, answers in zip(doubtful, noisy, strict=True) if not is_among(one, answers)]
    print(f"{share} requests; by rounding differ {Counter(request.mode for request in asked)}")
    wrong = "\n".join(f"{json.dumps(dataclasses.asdict(one.request))}: {one.differences[0]}" for one in different)
    assert not different, f"PARITY_SEED={SEED} PARITY_REQUESTS={REQUESTS}\n{wrong}"
