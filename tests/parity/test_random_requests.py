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
from pathlib import Path
from typing import Any

import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.generation import API_DEFAULTS, GenerationResult
from tests.golden.checkpoints import longrope, write_checkpoint
from tests.golden.generation_data import Answer, differences
from tests.golden.requests import MODES, Request, RequestMaker
from tests.golden.vocabularies import phi3_vocabulary
from tests.parity.conftest import Peers, Verdicts
from tests.support.engines import Asked

pytestmark = pytest.mark.parity

REQUESTS = int(os.environ.get("PARITY_REQUESTS", "500"))
SEED = int(os.environ.get("PARITY_SEED", secrets.randbits(32)))

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "4k": {},
    "grouped-query": {"kv_heads": 2},
    "128k": {"max_position_embeddings": 131072, "sliding_window": 262144, "rope_scaling": longrope(16)},
}
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
class Transformers:
    """transformers on one checkpoint, in a process that has torch."""

    peers: Peers
    checkpoint: Path

    def answer(self, requests: list[Request], *options: str) -> list[Any]:
        """Return an answer for each request, as ``tests.golden.reference`` writes it."""
        asked, answers = self.checkpoint / "requests.json", self.checkpoint / "answers.json"
        asked.write_text(json.dumps([dataclasses.asdict(request) for request in requests]), encoding="utf-8")
        self.peers.python("-m", "tests.golden.reference", self.checkpoint, asked, answers, *options)
        result: list[Any] = json.loads(answers.read_text(encoding="utf-8"))
        return result

    def can_give(self, requests: list[Request], ours: list[GenerationResult], pads: list[int]) -> list[bool]:
        """Return whether it gives each of our answers too, once there is noise in its logits."""
        if not requests:
            return []
        seen = self.answer(requests, "--noise", str(_NOISE), "--times", str(_NOISY_RUNS))
        return [
            any(_same(result, sequences, pad) for sequences in found)
            for result, found, pad in zip(ours, seen, pads, strict=True)
        ]


def ask_engine(model: Path, requests: list[Request]) -> tuple[list[GenerationResult], list[int]]:
    """Run all requests at once; return their results and what each would be padded with."""
    engine = Engine(EngineSettings(model, ctx_size=4096, kv_cache_type="f32", window_chunk=1, max_queue=len(requests)))
    engine.load()
    scored: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True}
    try:
        asked = [Asked(engine, request.prompt, **dict(API_DEFAULTS) | request.kwargs | scored) for request in requests]
        configs = [one.request.config for one in asked]
        pads = [c.eos_token_id[0] if c.pad_token_id is None else c.pad_token_id for c in configs]
        return [one.finished().result for one in asked], pads
    finally:
        engine.close()


def _same(ours: GenerationResult, sequences: list[list[int]], pad_token_id: int) -> bool:
    width = len(sequences[0])
    padded = [tokens.tolist() + [pad_token_id] * (width - len(tokens)) for tokens in ours.sequences]
    return padded == sequences


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_answers_are_those_of_transformers(name: str, peers: Peers, verdicts: Verdicts, tmp_path: Path) -> None:
    index = list(CHECKPOINTS).index(name)
    seed, share = SEED + index, len(range(index, REQUESTS, len(CHECKPOINTS)))
    checkpoint = write_checkpoint(tmp_path / "checkpoint", seed=seed, gain=2.0, **CHECKPOINTS[name])
    transformers = Transformers(peers, checkpoint)
    requests = random_requests(seed, int(share * _SPARE) + 1)
    answered = [
        (request, Answer(**answer))
        for request, answer in zip(requests, transformers.answer(requests), strict=True)
        if answer is not None
    ][:share]
    assert len(answered) == share, "transformers failed on more requests than were spare"
    model = convert(checkpoint, tmp_path / "model.gguf", outtype="f32").path
    ours, pads = ask_engine(model, [request for request, _ in answered])
    found = [
        differences(result, request, answer, pad)
        for result, (request, answer), pad in zip(ours, answered, pads, strict=True)
    ]
    doubtful = [number for number, differing in enumerate(found) if differing]
    rounding = transformers.can_give(
        [answered[number][0] for number in doubtful],
        [ours[number] for number in doubtful],
        [pads[number] for number in doubtful],
    )
    by_rounding = {number for number, same in zip(doubtful, rounding, strict=True) if same}
    wrong = []
    for number, (request, _) in enumerate(answered):
        verdict = "equal" if not found[number] else "by rounding" if number in by_rounding else "different"
        verdicts[request.mode, verdict] += 1
        if found[number]:
            print(f"{verdict}: {json.dumps(dataclasses.asdict(request))}\n  {found[number][0]}")
        if verdict == "different":
            wrong.append(f"{json.dumps(dataclasses.asdict(request))}: {found[number][0]}")
    assert not wrong, f"PARITY_SEED={SEED} PARITY_REQUESTS={REQUESTS}\n" + "\n".join(wrong)
