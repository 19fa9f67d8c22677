"""Random requests through the real service, and those that once stopped it or gave clients each other's answers."""

import functools
import math
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.cases import cases
from tests.support.service_client import CHAT, Ask, Outcome, send
from tests.support.service_fuzz import Trial
from tests.support.service_requests import WORDS, AskMaker
from tests.support.service_setups import Setup, make_model
from tests.support.services import PATIENCE, serving

Model = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("random")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return functools.cache(lambda kind: make_model(folder, kind, 1))


def ask(prompt: int, **kwargs: Any) -> Ask:
    """Return a request with a prompt of so many tokens of the random models' vocabulary."""
    text = " ".join(random.Random(prompt).choices(WORDS, k=prompt))
    return Ask("asked", CHAT, {"prompt": text, "return_full_text": False, "generate_kwargs": kwargs})


def is_answered(outcome: Outcome) -> bool:
    return outcome.status == 200 and outcome.answer is not None and not outcome.trouble


@cases
def test_random_requests_are_answered_or_refused_and_get_the_same_answers_alone(
    model: Model, kind: str, options: dict[str, Any], chosen: dict[str, Any]
) -> None:
    setup = Setup(kind, options | {"request_timeout": PATIENCE}, chosen.get("adapters", 0))
    path = model(kind)
    maker = AskMaker(chosen["seed"], setup, longest=chosen["longest"])
    trial = Trial(setup, path, path.parent, seed=chosen["seed"], threads=chosen["threads"], refusal=math.inf)
    trial.run(maker.chains(chosen["count"], chosen["crosstalk"]), chosen["share"])
    assert trial.failures == []
    # Beams whose clients leave do not touch the answers beside them.
    compared = sum(trial.counts["greedy beside", verdict] for verdict in ("equal", "by rounding"))
    assert compared == 12 * chosen["crosstalk"]


@cases
def test_sequences_that_outgrow_the_original_context_stop_nobody(
    model: Model, folder: Path, cells: int | None, every: int
) -> None:
    enough, short = cells == 20000, ask(8, do_sample=False, max_new_tokens=4)
    beams: dict[str, Any] = {"num_beams": 4, "do_sample": False}
    sequences = {"num_return_sequences": 4, "do_sample": True, "eos_token_id": []}
    options = ["--threads", "1", "--log-format", "json", *(["--ctx-size", str(cells)] if cells else [])]
    with serving(folder, str(model("128k")), *options, store=folder) as server:
        asked = (beams, sequences, beams | {"seed": 1}, sequences | {"seed": 1})[::every]
        for number, kwargs in enumerate(asked):
            # Of another length, and so another prompt: nothing of it is held.
            crossing = ask((4000 if enough else 3000) + number, max_length=4100, **kwargs)
            with ThreadPoolExecutor(3) as pool:
                asks = [crossing, short, ask(9, max_new_tokens=4, seed=2)]
                first, *beside = pool.map(lambda asked: send(server.port, asked, PATIENCE), asks)
            refused = first.status == 400 and len(first.sentence) > 10
            assert is_answered(first) or (refused and not enough), (kwargs, first)
            for outcome in (*beside, send(server.port, short, PATIENCE)):
                assert is_answered(outcome), (kwargs, outcome)
            assert server.troubles() == [], kwargs
        assert server.logged_errors() == []
        assert server.stop()[0] == 0
