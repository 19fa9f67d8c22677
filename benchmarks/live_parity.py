"""Fresh random requests, through the whole engine and through transformers on the same F32 checkpoints, token by token.

    python -m benchmarks.live_parity                                  # needs torch and transformers 4.49.0
    python -m benchmarks.live_parity --python ~/torch/bin/python      # which may live in another environment

Checkpoints (a plain one, one with grouped-query attention, one of the 128k kind) and requests come from a seed that is
new each time, and printed. Greedy decoding, sampling, beam search, beam sampling and group beam search take turns, with
random combinations of all parameters. transformers draws from the random numbers that a `seed` promises
(`docs/parameters.md`), so that sampled answers are compared token by token too, and log-probabilities to 1e-3.

llama.cpp's logits differ from torch's by some 1e-5. Where that decides between two tokens, the answers differ although
neither is wrong: such a request counts as "by rounding" when transformers itself gives our answer after noise of 1e-4
was put into its logits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import secrets
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.sequence import Event, FinishedEvent, GenerationRequest
from edge_phi3.generation import GenerationConfig, GenerationResult
from tests.golden.checkpoints import longrope, write_checkpoint
from tests.golden.generation_data import Answer, differences
from tests.golden.requests import MODES, Request, RequestMaker
from tests.golden.vocabularies import phi3_vocabulary

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "4k": {},
    "grouped-query": {"kv_heads": 2},
    "128k": {"max_position_embeddings": 131072, "sliding_window": 262144, "rope_scaling": longrope(16)},
}
_NOISE, _NOISY_RUNS = 1e-4, 40
_SPARE = 1.1
"""transformers fails on some requests (it draws from NaN), so that many times more are asked."""


def main() -> int:
    """Ask both, print what agrees; exit code 1 when an answer differs by more than rounding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500, help="how many requests are compared (default: 500)")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of checkpoints and requests")
    parser.add_argument("--python", default=sys.executable, help="interpreter with torch; default: this one")
    arguments = parser.parse_args()
    console = Console()
    console.print(f"seed {arguments.seed}")
    counts: Counter[tuple[str, str]] = Counter()
    for index, name in enumerate(CHECKPOINTS):
        share = len(range(index, arguments.requests, len(CHECKPOINTS)))
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            seed = arguments.seed + index
            checkpoint = write_checkpoint(work / "checkpoint", seed=seed, gain=2.0, **CHECKPOINTS[name])
            parity = Parity(work, checkpoint, arguments.python)
            for request, verdict, found in parity.compare(random_requests(seed, int(share * _SPARE) + 1), share):
                counts[request.mode, verdict] += 1
                if found:
                    console.print(f"{name}, {verdict}: {json.dumps(dataclasses.asdict(request))}\n  {found[0]}")
    table = Table("mode", "requests", "equal", "by rounding", "different")
    for mode in MODES:
        row = [counts[mode, verdict] for verdict in ("equal", "by rounding", "different")]
        table.add_row(mode, str(sum(row)), *map(str, row))
    console.print(table)
    return 1 if any(verdict == "different" for _, verdict in counts) else 0


def random_requests(seed: int, count: int) -> list[Request]:
    """Make requests, the modes in turn, over the ordinary pieces of the small Phi-3 vocabulary."""
    vocabulary = phi3_vocabulary(merges=300)
    added = {token.id for token in vocabulary.added}
    usual = [token for token in range(259, len(vocabulary.pieces)) if token not in added]
    texts = [piece.text.replace("▁", " ") for piece in vocabulary.pieces]
    maker = RequestMaker(seed, usual, texts=texts, longest_prompt=60, most_new=20, most_beams=8)
    return [maker.make(MODES[index % len(MODES)]) for index in range(count)]


class Parity:
    """One checkpoint in both.

    Args:
        work: a folder for files.
        checkpoint: the checkpoint.
        python: interpreter with torch.
    """

    def __init__(self, work: Path, checkpoint: Path, python: str) -> None:
        self._work = work
        self._checkpoint = checkpoint
        self._python = python

    def compare(self, requests: list[Request], count: int) -> list[tuple[Request, str, list[str]]]:
        """Give the verdict on each of the first `count` requests that transformers can answer, and what differs."""
        answered = [
            (request, Answer(**answer))
            for request, answer in zip(requests, self._ask_transformers(requests), strict=True)
            if answer is not None
        ][:count]
        ours, pads = self._ask_engine([request for request, _ in answered])
        verdicts: list[tuple[Request, str, list[str]]] = []
        doubtful: list[int] = []
        for index, (request, answer) in enumerate(answered):
            found = differences(ours[index], request, answer, pads[index])
            verdicts.append((request, "different" if found else "equal", found))
            if found:
                doubtful.append(index)
        if doubtful:
            noise = ["--noise", str(_NOISE), "--times", str(_NOISY_RUNS)]
            for index, seen in zip(
                doubtful, self._ask_transformers([answered[index][0] for index in doubtful], *noise), strict=True
            ):
                request, _, found = verdicts[index]
                if any(_same(ours[index], sequences, pads[index]) for sequences in seen):
                    verdicts[index] = request, "by rounding", found
        return verdicts

    def _ask_transformers(self, requests: list[Request], *options: str) -> list[Any]:
        asked, answers = self._work / "requests.json", self._work / "answers.json"
        asked.write_text(json.dumps([dataclasses.asdict(request) for request in requests]), encoding="utf-8")
        command = [self._python, "-m", "tests.golden.reference", self._checkpoint, asked, answers, *options]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
        result: list[Any] = json.loads(answers.read_text(encoding="utf-8"))
        return result

    def _ask_engine(self, requests: list[Request]) -> tuple[list[GenerationResult], list[int]]:
        """Run all requests at once, and give their results and what each would be padded with."""
        model = convert(self._checkpoint, self._work / "model.gguf", outtype="f32", force=True).path
        engine = Engine(
            EngineSettings(model, ctx_size=4096, kv_cache_type="f32", window_chunk=1, max_queue=len(requests))
        )
        loaded = engine.load()
        try:
            waiting: list[queue.SimpleQueue[Event]] = []
            pads = []
            for request in requests:
                kwargs = request.kwargs | {"return_dict_in_generate": True, "output_scores": True}
                config = GenerationConfig.resolve(kwargs, loaded.defaults)
                pads.append(config.pad_token_id if config.pad_token_id is not None else config.eos_token_id[0])
                mailbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
                engine.submit(GenerationRequest(np.array(request.prompt, dtype=np.int32), config), mailbox.put)
                waiting.append(mailbox)
            return [_result(mailbox.get()) for mailbox in waiting], pads
        finally:
            engine.close()


def _result(event: Event) -> GenerationResult:
    if isinstance(event, BaseException):
        raise event
    assert isinstance(event, FinishedEvent)
    return event.result


def _same(ours: GenerationResult, sequences: list[list[int]], pad_token_id: int) -> bool:
    width = len(sequences[0])
    padded = [tokens.tolist() + [pad_token_id] * (width - len(tokens)) for tokens in ours.sequences]
    return padded == sequences


if __name__ == "__main__":
    sys.exit(main())
