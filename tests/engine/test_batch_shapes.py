"""Which sizes of a batch are chosen, from times like those of an AVX-512 machine."""

from __future__ import annotations

from edge_phi3.engine.batch_shapes import BatchShapes, measure

MEASURED = {1: 14, 3: 33, 4: 45, 7: 76, 8: 111, 12: 118, 15: 134, 16: 112, 31: 234, 32: 205}
"""Milliseconds of a step with so many rows of Q4_K."""


def test_a_batch_just_below_a_tile_is_filled_up() -> None:
    shapes = BatchShapes(MEASURED)
    assert [shapes.padding(count) for count in (13, 14, 15, 16, 31, 32)] == [3, 2, 1, 0, 1, 0]
    assert [shapes.padding(count) for count in (0, 1, 4, 7)] == [0, 0, 0, 0]


def test_sizes_beyond_what_was_measured_go_by_their_last_tile() -> None:
    shapes = BatchShapes(MEASURED)
    assert [shapes.padding(count) for count in (47, 64, 79, 80, 511)] == [1, 0, 1, 0, 1]


def test_a_size_that_is_slow_is_cut_in_two() -> None:
    shapes = BatchShapes(MEASURED)
    assert shapes.parts(8) == (4, 4)
    assert shapes.parts(9) == (5, 4)
    assert [shapes.parts(count) for count in (1, 4, 16, 100)] == [(1,), (4,), (16,), (100,)]
    assert shapes.parts(15) == (15,), "filling it up is faster still"


def test_gaps_between_sequences_are_filled() -> None:
    shapes = BatchShapes({1: 11, 4: 36, 7: 60, 8: 80, 12: 98, 15: 111, 16: 94})
    everybody = list(range(16))
    without_7 = [seq_id for seq_id in everybody if seq_id != 7]
    assert shapes.fillers(without_7, [7]) == [7]
    assert shapes.fillers(without_7, []) == [], "who computes a prompt is not free"
    assert shapes.fillers(everybody[:15], [15]) == [15], "filled up to a size that is faster"
    assert shapes.fillers(everybody[1:], [0]) == [0]
    assert shapes.fillers([0, 1, 5, 6], [2, 3, 4, 7, 8]) == [], "two small batches are faster than a large one"
    assert shapes.fillers(everybody[:7], everybody[7:]) == []
    assert BatchShapes({}).fillers([0, 2], [1]) == []
    assert BatchShapes({1: 1, 4: 1}).fillers([0, 7], list(range(1, 7))) == [], "more than a batch takes"


def test_a_smooth_machine_is_left_alone() -> None:
    shapes = BatchShapes({size: 10 + size for size in range(1, 33)})
    assert all(shapes.padding(count) == 0 and len(shapes.parts(count)) == 1 for count in range(1, 100))


def test_without_measurements_nothing_changes() -> None:
    shapes = BatchShapes({})
    assert shapes.padding(15) == 0
    assert shapes.parts(8) == (8,)


def test_measuring_ends_in_time_and_keeps_within_the_context() -> None:
    sizes: list[int] = []
    measure(sizes.append, 8)
    assert max(sizes) == 8
    assert sizes.count(8) == 3
    few: list[int] = []
    assert measure(few.append, 32, seconds=-1).padding(15) == 0
    assert few == []
