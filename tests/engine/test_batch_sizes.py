"""Which numbers of rows are decoded together."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.engine.batch_sizes import BatchSizes, measure
from edge_phi3.engine.sequence import GenerationRequest
from tests.engine.conftest import MakeModel, running_engine
from tests.support.cores import make_core
from tests.support.scenarios import Ask, Scenario

MEASURED = {1: 17, 2: 29, 3: 39, 4: 42, 6: 64, 7: 74, 8: 104, 12: 123, 15: 144, 16: 127, 24: 207, 32: 228}
"""Milliseconds of a 0.65 B model at Q4_K_M on two cores with AVX2."""


def test_rows_are_filled_up_where_a_whole_tile_is_faster() -> None:
    sizes = BatchSizes(MEASURED)
    assert {rows: sizes.padding(rows) for rows in (3, 4, 12, 14, 15, 16, 33)} == {
        3: 0, 4: 0, 12: 0, 14: 2, 15: 1, 16: 0, 33: 0,
    }  # fmt: skip


def test_rows_go_in_two_batches_where_that_is_faster() -> None:
    sizes = BatchSizes(MEASURED)
    assert {rows: sizes.first(rows) for rows in (1, 2, 4, 7, 8, 16, 40)} == {
        1: 1, 2: 2, 4: 4, 7: 7, 8: 4, 16: 16, 40: 40,
    }  # fmt: skip


def test_what_was_not_measured_is_decoded_as_it_comes() -> None:
    sizes = BatchSizes({})
    assert sizes.padding(3) == 0
    assert sizes.first(3) == 3


@pytest.mark.parametrize("exact", [True, False])
def test_a_request_that_repeats_to_the_bit_is_never_filled_up(exact: bool) -> None:
    """What was measured differs from one start of the service to the next."""
    ask = Ask((5, 6, 7), {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6, "seed": 1})
    scenario = Scenario((ask,), exact_seeds=exact, sizes=(9, 9, 9, 1, 9, 9, 9, 9))
    core, (context,) = make_core(scenario, lambda: 1.0)
    decode, filled = context.decode, []

    def noted(count: int, rows: int) -> NDArray[np.float32]:
        filled.append(context.scratch in context.seq_ids[:count])
        return decode(count, rows)

    context.decode = noted  # type: ignore[method-assign]
    core.submit(GenerationRequest(np.array(ask.prompt, np.int32), ask.config()), lambda _: None)
    while core.in_flight:
        core.step()
    assert any(filled) is not exact


def test_a_context_is_measured_and_left_empty(make_model: MakeModel) -> None:
    with running_engine(make_model("4k"), parallel=6) as engine:
        context = engine.model.runners[0].context
        engine._core.stop("It is measured.")  # type: ignore[union-attr]
        sizes = measure(context)
        assert sizes._largest <= 6
        assert context.position_range(0) == (-1, -1)
