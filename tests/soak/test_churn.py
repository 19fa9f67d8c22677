"""Thousands of random requests of every kind through one service, many of which leave: nothing may leak.

Many begin alike, and all of them want more KV cells than there are, so that the scheduler preempts, beside a prefix
cache of one MiB, so that it drops. After every tenth part the service is well and at rest, without a cell taken, and
its memory is sampled: from the first fifth to the end it must not grow by more than 2 %.

    pytest -m soak                          # 5,000 requests on each model; SOAK_REQUESTS=N for another number
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil
import pytest

from tests.support.service_fuzz import Trial
from tests.support.service_requests import AskMaker, Setup, make_model
from tests.support.services import PATIENCE

pytestmark = pytest.mark.soak

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "5000"))
OPTIONS = {"ctx_size": 1024, "prefix_cache_mib": 1, "request_timeout": PATIENCE}
TOLERANCE = 0.02


@pytest.mark.parametrize("kind", ["4k", "window of 64"])
def test_nothing_leaks(kind: str, tmp_path: Path) -> None:
    setup = Setup(kind, OPTIONS)
    sizes: list[int] = []
    trial = Trial(setup, make_model(tmp_path, kind, 1), tmp_path, seed=1, threads=48, refusal=math.inf)
    maker = AskMaker(1, setup, longest=400)
    with trial.serving() as server:
        process = psutil.Process(server.process.pid)
        for _ in range(10):
            trial.send_all(server, maker.chains(REQUESTS // 10, crosstalk=1))
            assert [*trial.failures, *server.troubles(), *server.logged_errors()] == []
            sizes.append(process.memory_info().rss)
        preemptions = server.metrics()["num_preemptions_total"]
    print(f"{trial.counts}, {preemptions:g} preemptions, RSS {sizes}")
    assert preemptions > 0
    assert sum(count for (_, column), count in trial.counts.items() if column == "left") > 0
    assert sizes[-1] / sizes[1] - 1 <= TOLERANCE, sizes
