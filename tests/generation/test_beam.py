"""Beam search beyond the recorded requests: scores, rows, groups, ends."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from edge_phi3.generation import GenerationResult, ModelDefaults, advance
from tests.generation.conftest import END, VOCABULARY, Model, Prefix, answer, decoder, run, table_model

PROMPT = (5, 6, 7)
SCORED = {"output_scores": True, "return_dict_in_generate": True, "do_sample": False}


def searched(seed: int = 1, **options: Any) -> GenerationResult:
    each = decoder(PROMPT, **({"do_sample": False} | options))
    assert run(table_model(seed), (each, PROMPT)) == [[]], "beams emit nothing before the end"
    return each.result()


def log_probability(model: Model, tokens: Prefix, start: int = len(PROMPT)) -> float:
    """Sum the log-probabilities of the tokens from a place on, in float64."""
    rows = [model(tokens[:length]).astype(np.float64) for length in range(start, len(tokens))]
    return float(sum(row[token] - np.log(np.exp(row).sum()) for row, token in zip(rows, tokens[start:], strict=True)))


def test_as_many_beams_as_continuations_find_the_best_of_all() -> None:
    """With room for every continuation, beam search is exhaustive search."""
    model = table_model(9, 6, 1.0)
    defaults = ModelDefaults(vocab_size=6, bos_token_id=1, eos_token_ids=(), pad_token_id=0, context_length=64)
    options = {"do_sample": False, "num_beams": 36, "num_return_sequences": 5, "max_new_tokens": 3}
    result = answer(model, (1, 2, 3), defaults=defaults, **options)
    every = [(1, 2, 3, *tail) for tail in itertools.product(range(6), repeat=3)]
    best = sorted(every, key=lambda tokens: log_probability(model, tokens))[::-1][:5]
    assert [tuple(tokens.tolist()) for tokens in result.sequences] == best
    assert result.sequences_scores is not None
    np.testing.assert_allclose(
        result.sequences_scores, [log_probability(model, tokens) / 3 for tokens in best], rtol=1e-5
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.5, 2.0])
def test_scores_are_sums_of_log_probabilities_over_powers_of_the_length(groups: int, length_penalty: float) -> None:
    options: dict[str, Any] = SCORED | {"num_beams": 4, "num_return_sequences": 4, "length_penalty": length_penalty}
    if groups > 1:
        options |= {"num_beam_groups": groups, "diversity_penalty": -1.0}  # below 0: groups, and no penalty
    result = searched(3, **options, max_new_tokens=12, eos_token_id=[*range(2, 30)])
    assert result.sequences_scores is not None
    assert result.scores is not None
    model = table_model(3)
    for tokens, score, scored, reason in zip(
        result.sequences, result.sequences_scores, result.scores, result.finish_reasons, strict=True
    ):
        new = len(tokens) - len(PROMPT)
        assert len(scored) == new
        before_last = log_probability(model, tuple(tokens[:-1].tolist()))
        assert sum(each.logprob for each in scored[:-1]) == pytest.approx(before_last, rel=1e-4)
        if reason == "stop":
            # The first end token is written whichever ended the beam, so the last score need not be the beam's.
            assert tokens[-1] == 2
        else:
            assert score == pytest.approx(sum(each.score for each in scored) / new**length_penalty, rel=1e-4)
    assert length_penalty > 1 or "stop" in result.finish_reasons
    assert result.sequences_scores == sorted(result.sequences_scores, reverse=True)


def test_rows_wanted_are_those_of_groups_that_go_on() -> None:
    each = decoder(
        PROMPT, do_sample=False, num_beams=4, num_beam_groups=2, diversity_penalty=5.0, early_stopping=True,
        max_new_tokens=20,
    )  # fmt: skip
    assert each.rows == 1
    logits = np.zeros((1, VOCABULARY), dtype=np.float32)
    logits[0, [10, 11, 20, 21]] = 9, 8.9, 8.8, 8.7
    (step,) = advance([each], logits)
    assert list(step.parents) == [0, 0, 0, 0]
    assert list(step.tokens) == [10, 11, 20, 21]
    logits = np.zeros((4, VOCABULARY), dtype=np.float32)
    logits[:2, END] = 30  # both beams of the first group end, which is enough for it
    logits[2:, 40:42] = 30
    (step,) = advance([each], logits)
    assert each.rows == 2
    assert set(step.parents) <= {2, 3}
    logits = np.zeros((2, VOCABULARY), dtype=np.float32)
    logits[:, END] = 30
    (step,) = advance([each], logits)
    assert each.finished
    assert (each.rows, len(step.parents)) == (0, 0)
    result = each.result()
    assert result.sequences[0].tolist() == [*PROMPT, 10, END]


def test_beam_sampling_draws_by_probability() -> None:
    """The best of one step's draws is a certain token as often as the Plackett-Luce model says."""
    logits = np.full((1, VOCABULARY), -np.inf, dtype=np.float32)
    logits[0, 20:28] = np.log([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05])
    runs, missed = 4000, 0
    for seed in range(runs):
        each = decoder(PROMPT, do_sample=True, seed=seed, num_beams=2, top_k=0, max_new_tokens=1, eos_token_id=4)
        advance([each], logits.copy())
        missed += each.result().sequences[0][-1] != 20
    # Four of eight are drawn without replacement; token 20 wins unless it is in none of the four draws.
    p = np.exp(logits[0, 20:28].astype(np.float64))
    absent = sum(
        np.prod([p[i] / (1 - sum(p[list(order[:n])])) for n, i in enumerate(order)])
        for order in itertools.permutations(range(1, 8), 4)
    )
    assert missed / runs == pytest.approx(absent, abs=5 * np.sqrt(absent * (1 - absent) / runs))


def test_extreme_length_penalties_do_not_overflow() -> None:
    assert searched(num_beams=2, max_new_tokens=3, length_penalty=1e6).sequences_scores == [-0.0]
    assert searched(num_beams=2, max_new_tokens=3, length_penalty=-1e6).sequences_scores == [-np.inf]
