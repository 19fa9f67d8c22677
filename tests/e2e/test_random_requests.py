"""Random requests through the real service, and those that once stopped it or gave clients each other's answers."""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.service_client import CHAT, Ask, Outcome, send
from tests.support.service_fuzz import Trial
from tests.support.service_requests import WORDS, AskMaker
from tests.support.service_setups import Setup, make_model
from tests.support.services import PATIENCE, Server, serving

Model = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("random")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return functools.cache(lambda kind: make_model(folder, kind, 1))


@contextlib.contextmanager
def served(model: Path, *arguments: str) -> Iterator[Server]:
    """Serve a model, and see that the service is well afterwards, has met no error, and ends on SIGTERM."""
    options = (str(model), *arguments, "--threads", "1", "--log-format", "json")
    with serving(model.parent, *options, store=model.parent) as server:
        yield server
        assert server.troubles() == []
        assert server.logged_errors() == []
        assert server.stop()[0] == 0


def ask(prompt: int, *, stream: bool = False, **kwargs: Any) -> Ask:
    """Return a request with a prompt of so many tokens of the random models' vocabulary."""
    text = " ".join(random.Random(prompt).choices(WORDS, k=prompt))
    body = {"prompt": text, "return_full_text": False, "generate_kwargs": kwargs, "stream": stream}
    return Ask("asked", CHAT, body)


def is_answered(outcome: Outcome) -> bool:
    return outcome.status == 200 and outcome.answer is not None and not outcome.trouble


def tried(setup: Setup, model: Model, *, seed: int, threads: int, share: float, **chosen: int) -> Trial:
    """Send random requests to a service of its own, and see that nothing is wrong."""
    maker, path = AskMaker(seed, setup, longest=chosen["longest"]), model(setup.kind)
    trial = Trial(setup, path, path.parent, seed=seed, threads=threads, refusal=math.inf)
    trial.run(maker.chains(chosen["count"], chosen.get("crosstalk", 0)), share)
    assert trial.failures == []
    return trial


MIXED = {"seed": 1, "threads": 8, "share": 0.15, "count": 50, "crosstalk": 1, "longest": 2900}
SMALL = {"seed": 12, "threads": 2, "share": 0.3, "count": 15, "longest": 400}


@pytest.mark.parametrize(
    ("kind", "options", "chosen"),
    [
        ("128k", {"ctx_size": 6000, "prefix_cache_mib": 1}, MIXED),
        ("window of 64", {"ctx_size": 1024, "parallel": 4, "exact_seeds": True}, MIXED),
        ("window of 64", {"ctx_size": 4096}, SMALL),
        ("window of 16", {"ctx_size": 4096}, SMALL),
        ("window of 3", {"ctx_size": 4096}, SMALL),
    ],
)
def test_random_requests_are_answered_or_refused_and_get_the_same_answers_alone(
    model: Model, kind: str, options: dict[str, Any], chosen: dict[str, Any]
) -> None:
    tried(Setup(kind, options | {"request_timeout": PATIENCE}), model, **chosen)


def test_beams_whose_clients_leave_do_not_touch_the_answers_beside_them(model: Model) -> None:
    # So many cells that a cache with a part for each sequence would have room for eight beams.
    setup = Setup("128k", {"ctx_size": 65536, "request_timeout": PATIENCE})
    counts = tried(setup, model, seed=5, threads=16, share=0, count=0, crosstalk=4, longest=100).counts
    assert counts["greedy beside", "equal"] + counts["greedy beside", "by rounding"] == 4 * 12


@pytest.mark.parametrize("cells", [None, 8000, 20000])  # those of the defaults, more, and enough for all of it
@pytest.mark.parametrize("seed", [{}, {"seed": 1}], ids=["no seed", "seed"])
@pytest.mark.parametrize(
    "kwargs",
    [{"num_beams": 4, "do_sample": False}, {"num_return_sequences": 4, "do_sample": True, "eos_token_id": []}],
    ids=["beams", "sequences"],
)
def test_sequences_that_outgrow_the_original_context_stop_nobody(
    model: Model, cells: int | None, seed: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    enough, short = cells == 20000, ask(8, do_sample=False, max_new_tokens=4)
    crossing = ask(4000 if enough else 3000, max_length=4100, **kwargs, **seed)
    with served(model("128k"), *(() if cells is None else ("--ctx-size", str(cells)))) as server:
        with ThreadPoolExecutor(3) as pool:
            asks = [crossing, short, ask(9, max_new_tokens=4, seed=2)]
            first, *beside = pool.map(lambda asked: send(server.port, asked, PATIENCE), asks)
        refused = first.status == 400 and len(first.sentence) > 10
        assert is_answered(first) or (refused and not enough), first
        for outcome in (*beside, send(server.port, short, PATIENCE)):
            assert is_answered(outcome), outcome


def test_several_sequences_fit_beside_another_request_whose_window_has_moved(model: Model) -> None:
    new: dict[str, Any] = {"max_new_tokens": 120, "eos_token_id": []}
    moved = ask(1800, stream=True, do_sample=False, **new)
    with (
        served(model("4k")) as server,
        httpx.stream("POST", server.url + moved.path, json=moved.body, timeout=PATIENCE) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        several = send(server.port, ask(2000, do_sample=True, num_return_sequences=4, **new), PATIENCE)
        assert is_answered(several), several
        assert "event: result" in lines


def test_a_long_rope_model_decodes_as_many_sequences_at_once_as_others(model: Model) -> None:
    with served(model("128k")) as server:
        before = server.metrics()["engine_steps_total"]
        new = 60
        many = ask(10, do_sample=True, num_return_sequences=16, max_new_tokens=new, eos_token_id=[])
        assert is_answered(send(server.port, many, PATIENCE))
        assert server.metrics()["engine_steps_total"] - before < 2 * new
        beams = send(server.port, ask(10, do_sample=False, num_beams=8, max_new_tokens=10), PATIENCE)
        assert is_answered(beams), beams
