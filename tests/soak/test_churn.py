"""Thousands of requests of every kind through one engine, a third of them cancelled: nothing may leak.

5,000 on each model, or SOAK_REQUESTS. Many begin alike, in a KV cache that is too small for all of them, so that the
scheduler preempts, beside a prefix cache of one MiB, so that it drops. KV cells are audited after every step. The
process's memory is sampled at rest: from the first fifth to the end it must not grow by more than 2 %.
"""

import os
import random
from pathlib import Path
from typing import Any

import psutil
import pytest

from edge_phi3.conversion.convert import convert
from tests.golden.checkpoints import write_checkpoint
from tests.support.engines import Asked, running_engine
from tests.support.service_requests import ORDINARY
from tests.support.services import wait_for

pytestmark = pytest.mark.soak

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "5000"))
IN_FLIGHT = 48
OPTIONS: dict[str, Any] = {"ctx_size": 1024, "max_queue": 96, "prefix_cache_mib": 1, "kv_cache_type": "f16"}
MODES: tuple[dict[str, Any], ...] = ({}, {"do_sample": True, "num_return_sequences": 3}, {"num_beams": 4})


@pytest.mark.parametrize("window", [2047, 63], ids=["no window in reach", "a window of 63 tokens"])
def test_nothing_leaks(window: int, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", seed=1, sliding_window=window)
    path = convert(checkpoint, tmp_path / "model.gguf", outtype="f32").path
    chance, sizes = random.Random(0), list[int]()
    heads = [chance.choices(ORDINARY, k=200) for _ in range(8)]
    with running_engine(path, window_chunk=32, **OPTIONS) as engine:
        kv = engine.model.runners[0].kv
        for _ in range(10):
            flying: list[Asked] = []
            for left in reversed(range(REQUESTS // 10)):
                head = chance.choice(heads)[: chance.randrange(200)]
                own = chance.choices(ORDINARY, k=chance.randint(1, 200))
                kwargs = chance.choice(MODES) | {"max_new_tokens": chance.randint(1, 64)}
                flying.append(Asked(engine, head + own, stream=True, **kwargs))
                while len(flying) > min(left, IN_FLIGHT - 1):
                    asked = flying.pop(chance.randrange(len(flying)))
                    if chance.random() < 1 / 3:
                        engine.cancel(asked.running)
                    else:
                        asked.finished()
            assert wait_for(lambda: not engine.stats().running + engine.stats().waiting)
            # What has finished leaves the cells a little at a time.
            assert wait_for(lambda: (len(kv._free_ids), kv.free) == (kv.sequences, kv.cells))
            sizes.append(psutil.Process().memory_info().rss)
        print(f"{engine.stats().preemptions_total} preemptions, RSS {sizes}")
    assert sizes[-1] / sizes[1] - 1 <= 0.02, sizes
