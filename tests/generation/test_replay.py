"""transformers' recorded answers, token by token, from the logits that it chose them from."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.generation import Decoder
from tests.generation.conftest import Prefix, decoder, run
from tests.golden.generation_data import (
    REPLAY_DEFAULTS,
    Answer,
    differences,
    read_answers,
    read_logits,
    replay_texts,
)
from tests.golden.requests import MODES, Request

RECORDED = read_answers("replay")


@functools.cache
def logits() -> dict[Prefix, NDArray[np.float32]]:
    return read_logits()


def recorded_logits(prefix: Prefix) -> NDArray[np.float32]:
    assert prefix in logits(), f"transformers never came to {prefix}"
    return logits()[prefix]


def start(request: Request) -> Decoder:
    options = request.kwargs | {"output_scores": True, "return_dict_in_generate": True}
    return decoder(request.prompt, REPLAY_DEFAULTS, vocabulary=replay_texts(), **options)


def compare(running: Decoder, request: Request, answer: Answer) -> list[str]:
    pad = request.kwargs.get("pad_token_id", REPLAY_DEFAULTS.pad_token_id)
    return differences(running.result(), request, answer, pad)


@pytest.mark.parametrize("mode", MODES)
def test_each_request_alone_gives_the_tokens_and_scores_of_transformers(mode: str) -> None:
    wrong = {}
    for index, (request, answer) in enumerate(RECORDED):
        if request.mode == mode:
            running = start(request)
            try:
                run(recorded_logits, (running, request.prompt))
                found = compare(running, request, answer)
            except AssertionError as error:
                found = [str(error)]
            if found:
                wrong[index] = found
    assert not wrong


def test_all_requests_together_give_the_tokens_and_scores_of_transformers() -> None:
    running = [(start(request), request.prompt) for request, _ in RECORDED]
    run(recorded_logits, *running)
    found = [compare(each, *recorded) for (each, _), recorded in zip(running, RECORDED, strict=True)]
    assert not [index for index, differing in enumerate(found) if differing]


def test_the_recorded_requests_cover_every_mode_and_parameter() -> None:
    requests = [request for request, _ in RECORDED]
    assert len(requests) >= 400
    names = {name for request in requests for name in request.kwargs}
    assert {request.mode for request in requests} == set(MODES)
    assert names >= {
        "max_length", "max_new_tokens", "min_length", "min_new_tokens", "eos_token_id", "pad_token_id", "stop_strings",
        "early_stopping", "length_penalty", "num_beams", "num_beam_groups", "diversity_penalty", "num_return_sequences",
        "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
        "bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
        "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "renormalize_logits",
        "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    }  # fmt: skip


def test_answers_end_in_every_way() -> None:
    reasons: set[str] = set()
    for request, _ in RECORDED[::3]:
        running = start(request)
        run(recorded_logits, (running, request.prompt))
        reasons.update(running.result().finish_reasons)
    assert reasons == {"stop", "stop_string", "length"}
