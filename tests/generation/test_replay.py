"""transformers' recorded answers, token by token, from the logits that it chose them from."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.generation import Decoder
from edge_phi3.generation.parameters import PARAMETERS
from tests.generation.conftest import Prefix, decoder, run
from tests.golden import generation_data as data
from tests.golden.requests import MODES, Request

RECORDED = data.read_answers("replay")


@functools.cache
def logits() -> dict[Prefix, NDArray[np.float32]]:
    return data.read_logits()


def recorded_logits(prefix: Prefix) -> NDArray[np.float32]:
    assert prefix in logits(), f"transformers never came to {prefix}"
    return logits()[prefix]


def start(request: Request) -> Decoder:
    options = request.kwargs | {"output_scores": True, "return_dict_in_generate": True}
    return decoder(request.prompt, data.REPLAY_DEFAULTS, vocabulary=data.replay_texts(), **options)


def compare(running: Decoder, request: Request, answer: data.Answer) -> list[str]:
    pad = data.REPLAY_DEFAULTS.pad_token_id
    assert pad is not None
    return data.differences(running.result(), request, answer, request.kwargs.get("pad_token_id", pad))


@pytest.mark.parametrize("mode", MODES)
def test_each_request_alone_gives_the_tokens_and_scores_of_transformers(mode: str) -> None:
    of_mode = [(request, answer) for request, answer in RECORDED if request.mode == mode]
    running = [start(request) for request, _ in of_mode]
    for each, (request, _) in zip(running, of_mode, strict=True):
        run(recorded_logits, (each, request.prompt))
    found = [compare(each, *recorded) for each, recorded in zip(running, of_mode, strict=True)]
    assert {number: differing for number, differing in enumerate(found) if differing} == {}


def test_all_requests_together_give_the_tokens_and_scores_of_transformers() -> None:
    running = [(start(request), request.prompt) for request, _ in RECORDED]
    run(recorded_logits, *running)
    found = [compare(each, *recorded) for (each, _), recorded in zip(running, RECORDED, strict=True)]
    assert not [index for index, differing in enumerate(found) if differing]
    reasons = {reason for each, _ in running for reason in each.result().finish_reasons}
    assert reasons == {"stop", "stop_string", "length"}, "answers end in every way"


def test_the_recorded_requests_cover_every_mode_and_parameter() -> None:
    requests = [request for request, _ in RECORDED]
    assert len(requests) >= 400
    assert {request.mode for request in requests} == set(MODES)
    recorded = {name for request in requests for name in request.kwargs}
    elsewhere = {"max_time", "bos_token_id", "output_scores", "return_dict_in_generate"}
    assert recorded == PARAMETERS.keys() - elsewhere
