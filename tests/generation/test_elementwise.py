"""Single logits processors and warpers against what transformers made of the same scores."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.generation import GenerationConfig, ModelDefaults
from edge_phi3.generation.logits import Candidates
from edge_phi3.generation.processors import HammingDiversity, OccurrencePenalty, build_processors
from edge_phi3.generation.warpers import Warping, warp
from tests.golden import elementwise
from tests.golden.elementwise import CASES, ENCODER_CASES, GROUP_CASE, LENGTH, PROMPT, VOCABULARY
from tests.golden.generation_data import FOLDER

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

ENDS = (7, 8)
DEFAULTS = ModelDefaults(vocab_size=VOCABULARY, bos_token_id=1, eos_token_ids=ENDS, pad_token_id=0, context_length=4096)
WARPERS = {"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}


@pytest.fixture(scope="module")
def recorded() -> dict[str, NDArray[np.float32]]:
    with np.load(FOLDER / "elementwise.npz") as file:
        return dict(file)


def agree(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    assert np.array_equal(np.isneginf(ours), np.isneginf(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)


def options(name: str) -> tuple[dict[str, Any], int]:
    """Return the ``generate_kwargs`` of a case, and the length of the prompt among its tokens."""
    parameter = name.split("-", maxsplit=1)[0]
    arguments = (CASES | ENCODER_CASES)[name][1]
    values = list(arguments.values())
    match parameter:
        case "forced_eos_token_id":
            return {parameter: arguments["eos_token_id"], "max_length": arguments["max_length"]}, 5
        case "exponential_decay_length_penalty":
            return {parameter: list(values[0])}, arguments["input_ids_seq_length"]
        case "begin_suppress_tokens":
            return {parameter: values[0]}, arguments["begin_index"]
        case "bad_words_ids":
            return {parameter: values[0], "eos_token_id": 7}, 5
        case "remove_invalid_values" | "renormalize_logits":
            return {parameter: True}, 5
    return {parameter: values[0]}, 5


def dense(candidates: Candidates, rows: int) -> NDArray[np.float32]:
    """Put candidates back into whole rows."""
    if candidates.tokens is None:
        return candidates.scores
    result = np.full((rows, VOCABULARY), -np.inf, dtype=np.float32)
    row, column = np.nonzero(candidates.scores > -np.inf)
    result[row, candidates.tokens[row, column]] = candidates.scores[row, column]
    return result


@pytest.mark.parametrize("name", [name for name in CASES if name.split("-")[0] not in WARPERS])
def test_processor(name: str, recorded: dict[str, NDArray[np.float32]]) -> None:
    tokens, scores = elementwise.inputs(name)
    kwargs, prompt_length = options(name)
    config = GenerationConfig.resolve({"do_sample": False, "max_length": 100} | kwargs, DEFAULTS)
    (processor,) = build_processors(config, np.resize(tokens[0], prompt_length))
    processor(tokens, scores)
    agree(scores, recorded[name])


@pytest.mark.parametrize("name", ENCODER_CASES)
def test_processor_of_the_prompt(name: str, recorded: dict[str, NDArray[np.float32]]) -> None:
    tokens, scores = elementwise.inputs(name)
    config = GenerationConfig.resolve({"do_sample": False} | options(name)[0], DEFAULTS)
    (processor,) = build_processors(config, PROMPT)
    processor(tokens, scores)
    agree(scores, recorded[name])


def test_diversity_penalty(recorded: dict[str, NDArray[np.float32]]) -> None:
    name, penalty, chosen = GROUP_CASE
    tokens, scores = elementwise.inputs(name)
    processor = HammingDiversity(penalty)
    processor.chosen = np.array(chosen, dtype=np.int32)
    processor(tokens, scores)
    agree(scores, recorded[name])


@pytest.mark.parametrize("name", [name for name in CASES if name.split("-")[0] in WARPERS])
def test_warper(name: str, recorded: dict[str, NDArray[np.float32]]) -> None:
    _, scores = elementwise.inputs(name)
    arguments = dict(CASES[name][1])
    keep = arguments.pop("min_tokens_to_keep", 1)
    (value,) = arguments.values()
    parameter = name.split("-", maxsplit=1)[0]
    if parameter == "top_k":
        value = min(max(value, keep), VOCABULARY)
    warped = warp(scores, [Warping((parameter,), (value,), keep)] * len(scores))
    agree(dense(warped, len(scores)), recorded[name])


def test_warpers_see_the_same_rows_whole_or_cut_to_candidates() -> None:
    """Top-k cuts rows down; every later warper must make the same of the rest as of the whole row."""
    random = np.random.default_rng(0)
    scores = (random.standard_normal((6, VOCABULARY)) * 3).astype(np.float32)
    for name, value in {
        "top_p": 0.7,
        "min_p": 0.1,
        "typical_p": 0.6,
        "epsilon_cutoff": 0.03,
        "eta_cutoff": 0.1,
    }.items():
        cut = warp(scores.copy(), [Warping(("top_k", name), (20, value), 1)] * 6)
        whole = scores.copy()
        whole[whole < np.sort(whole, axis=1)[:, -20:-19]] = -np.inf
        agree(dense(cut, 6), dense(warp(whole, [Warping((name,), (value,), 1)] * 6), 6))


def test_openais_penalties_are_those_of_its_formula_and_leave_the_prompt_out() -> None:
    tokens = np.array([[1, 2, 7, 7, 9, 7], [1, 2, 8, 9, 9, 8]], np.int32)
    scores = np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)
    for start in (2, 6):  # with four tokens generated, and with none
        expected = scores.copy()
        for row, line in enumerate(tokens[:, start:].tolist()):
            for token in range(12):
                count = line.count(token)
                expected[row, token] -= np.float32(count * 0.5) + np.float32(1.25 if count else 0)
        found = scores.copy()
        OccurrencePenalty(1.25, 0.5, start)(tokens, found)
        np.testing.assert_array_equal(found, expected)


def test_processors_follow_the_order_of_transformers() -> None:
    everything = {
        "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "do_sample": False,
        "sequence_bias": [[[3], 1.0]], "repetition_penalty": 1.1, "no_repeat_ngram_size": 2,
        "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[4]], "min_length": 50, "forced_bos_token_id": 5,
        "forced_eos_token_id": 6, "remove_invalid_values": True, "exponential_decay_length_penalty": [1, 1.1],
        "suppress_tokens": [9], "begin_suppress_tokens": [9], "renormalize_logits": True,
    }  # fmt: skip
    config = dataclasses.replace(GenerationConfig.resolve(everything, DEFAULTS), presence_penalty=1.0)
    built = build_processors(config, np.ones(1, dtype=np.int32))
    assert [type(processor).__name__ for processor in built] == [
        "SequenceBias", "HammingDiversity", "RepetitionPenalty", "OccurrencePenalty", "NoRepeatNGram",
        "NoRepeatNGram", "SequenceBias", "BannedTokens", "ForcedTokens", "ForcedTokens", "FiniteScores",
        "ExponentialDecayLengthPenalty", "BannedTokens", "BannedTokens", "Renormalize",
    ]  # fmt: skip


def test_what_is_off_is_not_built() -> None:
    config = GenerationConfig.resolve({}, DEFAULTS)
    assert build_processors(config, np.ones(LENGTH, dtype=np.int32)) == ()
    assert Warping.of(config).active == ("top_k",)
