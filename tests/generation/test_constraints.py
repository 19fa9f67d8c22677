"""Sequences held to a language choose exactly as from a model that never says anything else."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.generation import GenerationError
from tests.generation.conftest import END, Model, Prefix, answer, decoder, run, table_model

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


def obedient(model: Model) -> Model:
    """Return the model that says only what the language allows."""

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
    model, options = table_model(seed), {"max_new_tokens": 20} | options
    shared = Remainders()
    result = answer(model, PROMPT, constraint=shared, **options)
    expected = answer(obedient(model), PROMPT, **options)
    assert shared.length == 0, "a constraint is copied, so that a request can be made twice"
    assert [s.tolist() for s in result.sequences] == [s.tolist() for s in expected.sequences]
    assert result.finish_reasons == expected.finish_reasons
    assert result.scores == expected.scores
    assert set(result.finish_reasons) == {"length" if options["max_new_tokens"] == 4 else "stop"}


@pytest.mark.parametrize("options", [{"do_sample": False}, {"seed": 1}, {"seed": 1, "num_return_sequences": 2}])
def test_without_an_allowed_token_the_request_fails_with_a_sentence(options: dict[str, Any]) -> None:
    banned = [token for token in range(200) if token % 3 == 1]
    each = decoder(PROMPT, constraint=Remainders(), suppress_tokens=banned, max_new_tokens=20, **options)
    other = decoder(PROMPT, do_sample=False, max_new_tokens=20)
    run(table_model(1), (each, PROMPT), (other, PROMPT))
    with pytest.raises(GenerationError, match="leave"):
        each.result()
    assert other.error is None
