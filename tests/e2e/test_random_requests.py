"""Random requests through the real service, and those that once stopped it or gave clients each other's answers."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_phi3.demo import DEMO_CHECKPOINT
from tests.support.service_client import CHAT, Ask, Outcome, send
from tests.support.service_fuzz import Trial
from tests.support.service_requests import WORDS, AskMaker, Setup, make_model
from tests.support.services import PATIENCE, Server, serving, wait_for

QUESTIONS = json.loads((DEMO_CHECKPOINT / "questions.json").read_text(encoding="utf-8"))
CROSSING: dict[str, Any] = {"num_beams": 4, "max_length": 4100, "do_sample": False}
"""Beams that grow beyond the original context of a long-rope model, from a prompt of 3,000 tokens."""

Model = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("random")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return functools.cache(lambda kind: make_model(folder, kind, 1))


@contextlib.contextmanager
def served(folder: Path, *arguments: str | Path, store: Path | None = None) -> Iterator[Server]:
    """Serve a model, and see that the service is well afterwards, has met no error, and ends on SIGTERM."""
    options = (*map(str, arguments), "--threads", "1", "--log-format", "json")
    with serving(folder, *options, store=store or folder) as server:
        yield server
        assert server.troubles() == []
        assert server.logged_errors() == []
        assert server.stop()[0] == 0


def ask(prompt: int | str, *, stream: bool = False, **kwargs: Any) -> Ask:
    """Return a request, with a prompt of so many tokens of the random models' vocabulary or with this one."""
    text = prompt if isinstance(prompt, str) else " ".join(random.Random(prompt).choices(WORDS, k=prompt))
    body = {"prompt": text, "return_full_text": False, "generate_kwargs": kwargs, "stream": stream}
    return Ask("asked", CHAT, body)


def send_together(server: Server, asks: list[Ask]) -> list[Outcome]:
    with ThreadPoolExecutor(len(asks)) as pool:
        return [*pool.map(lambda asked: send(server.port, asked, PATIENCE), asks)]


@contextlib.contextmanager
def begun(server: Server, asked: Ask) -> Iterator[Iterator[str]]:
    """Send a request that streams, and go on when its first line is there; the client leaves with the context."""
    with httpx.stream("POST", server.url + asked.path, json=asked.body, timeout=PATIENCE) as response:
        lines = response.iter_lines()
        next(lines)
        yield lines


def is_answered(outcome: Outcome) -> bool:
    return outcome.status == 200 and outcome.answer is not None and not outcome.trouble


def is_answered_or_refused(outcome: Outcome) -> bool:
    return is_answered(outcome) or (outcome.status == 400 and len(outcome.sentence) > 10)


def tried(setup: Setup, model: Model, folder: Path, *, seed: int, threads: int, share: float, **chosen: int) -> Trial:
    """Send random requests to a service of its own, and see that nothing is wrong."""
    maker = AskMaker(seed, setup, longest=chosen["longest"])
    trial = Trial(setup, model(setup.kind), folder, seed=seed, threads=threads, refusal=math.inf)
    trial.run(maker.chains(chosen["count"], chosen.get("crosstalk", 0)), share)
    assert trial.failures == []
    return trial


@pytest.mark.parametrize(
    "setup",
    [
        Setup("128k", {"ctx_size": 6000, "prefix_cache_mib": 1, "request_timeout": PATIENCE}),
        Setup("window of 64", {"ctx_size": 1024, "parallel": 4, "exact_seeds": True, "request_timeout": PATIENCE}),
    ],
    ids=lambda setup: setup.kind,
)
def test_random_requests_are_answered_or_refused_and_get_the_same_answers_alone(
    setup: Setup, model: Model, folder: Path
) -> None:
    tried(setup, model, folder, seed=1, threads=8, share=0.15, count=50, crosstalk=1, longest=2900)


def test_beams_whose_clients_leave_do_not_touch_the_answers_beside_them(model: Model, folder: Path) -> None:
    # So many cells that a cache with a part for each sequence would have room for eight beams.
    setup = Setup("128k", {"ctx_size": 65536, "request_timeout": PATIENCE})
    counts = tried(setup, model, folder, seed=5, threads=16, share=0, count=0, crosstalk=4, longest=100).counts
    assert counts["greedy beside", "equal"] + counts["greedy beside", "by rounding"] == 4 * 12


@pytest.mark.parametrize(
    "options",
    [(), ("--ctx-size", "8000"), ("--ctx-size", "20000")],
    ids=["defaults", "8,000 cells", "enough cells for all of it"],
)
@pytest.mark.parametrize("seed", [{}, {"seed": 1}], ids=["no seed", "seed"])
@pytest.mark.parametrize(
    "kwargs",
    [CROSSING, {"num_return_sequences": 4, "max_length": 4100, "do_sample": True, "eos_token_id": []}],
    ids=["beams", "sequences"],
)
def test_sequences_that_outgrow_the_original_context_stop_nobody(
    model: Model, folder: Path, options: tuple[str, ...], seed: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    enough = "20000" in options
    with served(folder, model("128k"), *options) as server:
        short = ask(8, do_sample=False, max_new_tokens=4)
        crossing, beside, drawn = send_together(
            server, [ask(4000 if enough else 3000, **kwargs, **seed), short, ask(9, max_new_tokens=4, seed=2)]
        )
        assert is_answered(crossing) or (not enough and is_answered_or_refused(crossing)), crossing
        assert is_answered(beside), beside
        assert is_answered(drawn), drawn
        assert is_answered(send(server.port, short, PATIENCE))


def test_several_sequences_fit_beside_another_request_whose_window_has_moved(model: Model, folder: Path) -> None:
    new: dict[str, Any] = {"max_new_tokens": 120, "eos_token_id": []}
    with served(folder, model("4k")) as server, begun(server, ask(1800, stream=True, do_sample=False, **new)) as lines:
        several = send(server.port, ask(2000, do_sample=True, num_return_sequences=4, **new), PATIENCE)
        assert is_answered(several), several
        assert "event: result" in lines


@pytest.mark.parametrize("window", ["window of 64", "window of 16", "window of 3"])
def test_small_windows_break_nothing(model: Model, folder: Path, window: str) -> None:
    setup = Setup(window, {"ctx_size": 4096, "request_timeout": PATIENCE})
    tried(setup, model, folder, seed=12, threads=2, share=0.3, count=15, longest=400)


def test_scores_that_leave_no_token_fail_that_request_alone(folder: Path, store: Path) -> None:
    odd: dict[str, Any] = {"temperature": 0.9, "repetition_penalty": 1e-38, "max_new_tokens": 5, "top_k": 1}
    odd |= {"typical_p": 0.5, "min_p": 0.05, "no_repeat_ngram_size": 2}
    questions = [f"<|user|>\n{entry['question']}<|end|>\n<|assistant|>\n" for entry in QUESTIONS]
    asked = ask(questions[0], do_sample=False)
    with served(folder, store=store) as server:
        alone = [send(server.port, ask(question, **odd), PATIENCE) for question in questions]
        assert [outcome for outcome in alone if not is_answered_or_refused(outcome)] == []
        outcomes = send_together(server, [asked, *(ask(question, **odd) for question in questions * 2)])
        assert [outcome for outcome in outcomes if not is_answered_or_refused(outcome)] == []
        assert is_answered(outcomes[0])
        assert outcomes[0].answer == send(server.port, asked, PATIENCE).answer


def test_a_long_rope_model_decodes_as_many_sequences_at_once_as_others(model: Model, folder: Path) -> None:
    with served(folder, model("128k")) as server:
        before = server.metrics()["engine_steps_total"]
        new = 60
        many = ask(10, do_sample=True, num_return_sequences=16, max_new_tokens=new, eos_token_id=[])
        assert is_answered(send(server.port, many, PATIENCE))
        assert server.metrics()["engine_steps_total"] - before < 2 * new
        beams = send(server.port, ask(10, do_sample=False, num_beams=8, max_new_tokens=10), PATIENCE)
        assert is_answered(beams), beams


def test_what_can_never_run_is_refused_without_waiting_in_the_queue(model: Model, folder: Path) -> None:
    endless = ask(8, stream=True, do_sample=False, max_new_tokens=3500, eos_token_id=[])
    options = ("--parallel", "1", "--max-queue", "1")
    # One runs, and one waits: whatever has to wait too is told so (429).
    with served(folder, model("grouped"), *options) as server, begun(server, endless), begun(server, endless):
        never = [
            ask(8, do_sample=False, max_new_tokens=0),
            ask(8, do_sample=False, num_beams=2, max_new_tokens=2),
            ask(8, do_sample=False, max_new_tokens=5000),
            ask(8, do_sample=False, max_length=100_000),
        ]
        outcomes = send_together(server, never)
    assert [outcome.status for outcome in outcomes] == [400] * len(never), outcomes


@pytest.mark.parametrize("seed", [{}, {"seed": 1}], ids=["no seed", "seed"])
def test_sigterm_ends_the_service_while_such_requests_run(model: Model, folder: Path, seed: dict[str, Any]) -> None:
    asks = [ask(3000, **CROSSING, **seed), ask(20, num_beams=4, max_new_tokens=900, do_sample=False, **seed)]
    options = ("--threads", "1", "--grace-period", "1", "--log-format", "json")
    with (
        serving(folder, str(model("128k")), *options, store=folder) as server,
        ThreadPoolExecutor(len(asks)) as pool,
    ):
        sent = [pool.submit(send, server.port, asked, PATIENCE) for asked in asks]
        assert wait_for(lambda: not server.is_idle() or all(each.done() for each in sent))
        assert server.stop()[0] == 0
    assert "Traceback" not in server.log.read_text()
