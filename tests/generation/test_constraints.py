"""Sequences held to a language choose exactly as from a model that never says anything else."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.generation import Decoder, GenerationConfig, GenerationError, make_decoder
from tests.generation.conftest import DEFAULTS, END, Model, Prefix, decoder, run, table_model

PROMPT = (5, 6, 7)


class Remainders:
    """Holds a sequence to tokens that are 0, 1, 2, 0, ... modulo 3 (all above the end token), six or nine of them."""

    def __init__(self, length: int = 0) -> None:
        self.length = length

    def permits(self, token: int) -> bool:
        if token == END:
            return self.length in {6, 9}
        return token > END and token % 3 == self.length % 3 and self.length < 9

    def mask(self, scores: NDArray[np.float32]) -> None:
        scores[[not self.permits(token) for token in range(len(scores))]] = -np.inf

    def accept(self, token: int) -> None:
        assert self.permits(token)
        self.length += 1

    def clone(self) -> Self:
        return type(self)(self.length)


def constrained(**options: Any) -> Decoder:
    config = GenerationConfig.resolve({"max_new_tokens": 20} | options, DEFAULTS)
    return make_decoder(config, np.array(PROMPT, np.int32), constraint=Remainders())


def obedient(model: Model) -> Model:
    """Give the model that says only what the language allows."""

    def logits(prefix: Prefix) -> NDArray[np.float32]:
        row = model(prefix).copy()
        Remainders(len(prefix) - len(PROMPT)).mask(row)
        return row

    return logits


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "return_dict_in_generate": True, "output_scores": True},
        {"do_sample": None, "num_return_sequences": 2},
        {"seed": 1},
        {"seed": 2, "num_return_sequences": 4, "top_k": 0, "temperature": 1.4},
        {"seed": 3, "num_return_sequences": 3, "top_k": 2, "top_p": 0.8, "return_dict_in_generate": True,
         "output_scores": True},
        {"do_sample": False, "max_new_tokens": 4},
    ],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(4))
def test_tokens_and_scores_are_those_of_a_model_that_says_nothing_else(options: dict[str, Any], seed: int) -> None:
    model = table_model(seed)
    held, free = constrained(**options), decoder(PROMPT, **({"max_new_tokens": 20} | options))
    run(model, (held, PROMPT))
    run(obedient(model), (free, PROMPT))
    result, expected = held.result(), free.result()
    assert [s.tolist() for s in result.sequences] == [s.tolist() for s in expected.sequences]
    assert result.finish_reasons == expected.finish_reasons
    assert result.scores == expected.scores
    reason = "length" if options.get("max_new_tokens") == 4 else "stop"
    assert set(result.finish_reasons) == {reason}


@pytest.mark.parametrize("options", [{"do_sample": False}, {"seed": 1}, {"seed": 1, "num_return_sequences": 2}])
def test_without_an_allowed_token_the_request_fails_with_a_sentence(options: dict[str, Any]) -> None:
    each = constrained(suppress_tokens=[token for token in range(200) if token % 3 == 1], **options)
    other = decoder(PROMPT, do_sample=False, max_new_tokens=20)
    run(table_model(1), (each, PROMPT), (other, PROMPT))
    with pytest.raises(GenerationError, match="leave"):
        each.result()
    assert other.error is None


def test_a_constraint_is_copied_so_that_a_request_can_be_made_twice() -> None:
    shared = Remainders()
    config = GenerationConfig.resolve({"do_sample": False, "max_new_tokens": 20}, DEFAULTS)
    answers = []
    for _ in range(2):
        each = make_decoder(config, np.array(PROMPT, np.int32), constraint=shared)
        run(table_model(1), (each, PROMPT))
        answers.append(each.result().sequences[0].tolist())
    assert answers[0] == answers[1]
    assert shared.length == 0


def test_beam_searches_take_none() -> None:
    with pytest.raises(ValueError, match="Beam searches"):
        constrained(num_beams=2)
