"""Which numbers of rows are decoded together."""

from __future__ import annotations

from edge_phi3.engine.batch_sizes import BatchSizes, measure
from tests.engine.conftest import MakeModel, running_engine

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


def test_a_context_is_measured_and_left_empty(make_model: MakeModel) -> None:
    with running_engine(make_model("4k"), parallel=6) as engine:
        context = engine.model.runners[0].context
        engine._core.stop("It is measured.")  # type: ignore[union-attr]
        sizes = measure(context)
        assert sizes._largest <= 6
        assert context.position_range(0) == (-1, -1)
