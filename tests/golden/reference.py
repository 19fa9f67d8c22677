"""transformers' own answers to requests. Needs torch and transformers 4.49.0.

    python -m tests.golden.reference CHECKPOINT REQUESTS.json ANSWERS.json [--noise 1e-4 --times 20]

answers the requests of a file for callers without torch: an answer each, or null where transformers fails. With noise
of that size in the logits, it is instead a list of the different sequences that came of several runs.

What torch leaves open is settled as `edge_phi3.generation` promises it, so that all answers can be compared token by
token:

- Random draws. For sampling, sequence i inverts the cumulative distribution at the next uniform number of
  ``Philox(key=[seed, i])``. For beam-search sampling, ``Philox(key=[seed, 0])`` gives an exponential number for each
  continuation whose probability does not vanish.
- The order of equal scores: the first comes first.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from edge_phi3.generation import API_DEFAULTS
from tests.golden.generation_data import Answer
from tests.golden.requests import Request

_TOPK = torch.topk


class Reference:
    """A checkpoint in transformers, which finds stop strings with `tokenizer`.

    With `rounded`, logits are rounded to float16 values, and each prefix has the same logits whatever batch it was
    computed in; `logits` then holds them.
    """

    def __init__(self, folder: Path, tokenizer: Any, *, rounded: bool = False) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.logits: dict[tuple[int, ...], NDArray[np.float16]] = {}
        self.noise = 0.0
        self._tokenizer = tokenizer
        if rounded:
            self._round()
        self.model.register_forward_hook(self._disturb)

    def _round(self) -> None:
        prepare = self.model.prepare_inputs_for_generation
        rows: list[tuple[int, ...]] = []

        def remember(input_ids: torch.Tensor, **kwargs: Any) -> Any:
            rows[:] = map(tuple, input_ids.tolist())
            return prepare(input_ids, **kwargs)

        def replace(_module: Any, _arguments: Any, output: Any) -> Any:
            for row, prefix in enumerate(rows):
                if prefix not in self.logits:
                    self.logits[prefix] = output.logits[row, -1].half().numpy()
                output.logits[row, -1] = torch.from_numpy(self.logits[prefix]).float()
            return output

        self.model.prepare_inputs_for_generation = remember
        self.model.register_forward_hook(replace)

    def _disturb(self, _module: Any, _arguments: Any, output: Any) -> Any:
        if self.noise:
            output.logits += self.noise * (2 * torch.rand_like(output.logits) - 1)
        return output

    def answer(self, request: Request) -> Answer:
        """Let transformers answer as its pipeline would, with the API's defaults, or raise what it raises."""
        kwargs: dict[str, Any] = {**API_DEFAULTS, **request.kwargs}
        seed = kwargs.pop("seed", 0)
        if kwargs["max_length"] is None:
            del kwargs["max_length"]
        kwargs |= {"return_dict_in_generate": True, "output_scores": True}
        if kwargs.get("stop_strings") is not None:
            kwargs["tokenizer"] = self._tokenizer
        prompt = torch.tensor([request.prompt])
        with torch.inference_mode(), _settled(seed, beams=(kwargs.get("num_beams") or 1) > 1):
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=GenerationConfig(**self.model.generation_config.to_dict()),
                **kwargs,
            )
        return _read(output, len(request.prompt), request.mode)

    def answer_drawable(self, request: Request) -> Answer | None:
        """Let transformers answer, or give None where it fails to draw from NaN, which its processors may make."""
        try:
            return self.answer(request)
        except (RuntimeError, ValueError) as error:
            if "not finite" in str(error) or "found invalid values" in str(error):
                return None
            raise

    def answer_firmly(self, request: Request, noise: float = 2e-4, times: int = 2) -> Answer | None:
        """Let transformers answer, and give None where a little noise in the logits changes the tokens, too."""
        first = self.answer_drawable(request)
        with mock.patch.object(self, "noise", noise):
            others = [self.answer_drawable(request) for _ in range(times)] if first else []
        same = first and all(other and other.sequences == first.sequences for other in others)
        return first if same else None


@contextlib.contextmanager
def _settled(seed: int, *, beams: bool) -> Iterator[None]:
    streams = [np.random.Generator(np.random.Philox(key=np.array([seed, i], dtype=np.uint64))) for i in range(256)]
    softmax = torch.nn.functional.softmax
    latest: list[torch.Tensor] = []

    def remember(scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        latest[:] = [scores]
        return softmax(scores, *args, **kwargs)

    def draw(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        if not torch.isfinite(probabilities).all():
            raise RuntimeError("the probabilities are not finite")
        if beams:
            return torch.from_numpy(_without_replacement(latest[0][0].numpy(), num_samples, streams[0]))[None]
        chosen = []
        for row, stream in zip(probabilities.double().numpy(), streams, strict=False):
            reached = np.cumsum(row)
            chosen.append([int(np.searchsorted(reached, stream.random() * reached[-1], side="right"))])
        return torch.tensor(chosen)

    with (
        mock.patch("torch.nn.functional.softmax", remember),
        mock.patch("torch.multinomial", draw),
        mock.patch("torch.topk", _topk),
        mock.patch("torch.sort", functools.partial(torch.sort, stable=True)),
        mock.patch("torch.argsort", functools.partial(torch.argsort, stable=True)),
    ):
        yield


def _topk(values: torch.Tensor, k: int, **kwargs: Any) -> Any:
    """Do what ``torch.topk`` does, the first of equal values first."""
    best = _TOPK(values, k, **kwargs).values
    ordered, order = torch.sort(values, dim=-1, descending=True, stable=True)
    assert torch.equal(best, ordered[..., :k]) or bool(torch.isnan(best).any())
    return torch.return_types.topk((ordered[..., :k], order[..., :k]))


def _without_replacement(scores: NDArray[np.float32], count: int, stream: np.random.Generator) -> NDArray[np.intp]:
    possible = np.flatnonzero(scores > scores.max() - np.float32(103))
    keys = scores[possible] - np.log(stream.standard_exponential(len(possible)))
    drawn = possible[np.argsort(-keys)[:count]]
    others = np.setdiff1d(np.arange(len(scores)), possible)
    return np.concatenate((drawn, others[np.argsort(-scores[others], kind="stable")]))[:count]


def _read(output: Any, prompt_length: int, mode: str) -> Answer:
    sequences = output.sequences.tolist()
    steps = [step.double() for step in output.scores]
    if mode == "group_beam":
        return Answer(sequences, output.sequences_scores.tolist())
    if mode in ("beam", "beam_sample"):
        scores = [
            [
                float(steps[step][row, token])
                for step, (row, token) in enumerate(zip(rows, sequence[prompt_length:], strict=False))
                if row >= 0
            ]
            for rows, sequence in zip(output.beam_indices.tolist(), sequences, strict=True)
        ]
        return Answer(sequences, output.sequences_scores.tolist(), scores)
    scores, logprobs = [], []
    for row, sequence in enumerate(sequences):
        chosen = list(zip(steps, sequence[prompt_length:], strict=True))
        scores.append([float(step[row, token]) for step, token in chosen])
        logprobs.append([float(step[row].log_softmax(-1)[token]) for step, token in chosen])
    return Answer(sequences, None, scores, logprobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "requests", "answers"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--times", type=int, default=1)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Both read SentencePiece's model alike; of byte-level ones the slow one finds other words.
    slow = (arguments.checkpoint / "tokenizer.model").exists()
    reference = Reference(arguments.checkpoint, AutoTokenizer.from_pretrained(arguments.checkpoint, use_fast=not slow))
    reference.noise = arguments.noise
    answers: list[Any] = []
    for fields in json.loads(arguments.requests.read_text(encoding="utf-8")):
        found = [reference.answer_drawable(Request(**fields)) for _ in range(arguments.times)]
        different = {str(answer.sequences): answer.sequences for answer in found if answer}
        answers.append([*different.values()] if arguments.noise else found[0] and dataclasses.asdict(found[0]))
    arguments.answers.write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
