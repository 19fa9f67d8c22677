"""How many tokens are drafted, and what comes of them in an engine."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.engine.drafting import Drafting
from edge_phi3.engine.sequence import Event, FinishedEvent, GenerationRequest, RunningRequest, Sequence
from edge_phi3.engine.speculation import Speculation
from edge_phi3.generation import make_decoder
from edge_phi3.generation.decoding import Decoder
from tests.support.cases import cases
from tests.support.cores import Foreseen, make_core
from tests.support.engines import Asked as Request
from tests.support.engines import MakeModel, generated, running_engine
from tests.support.scenarios import END, Ask, Scenario

STEEP = {1: 1.0, 2: 1.9, 3: 3.2, 5: 4.1, 9: 7.1, 17: 17.0}
"""What batches take where drafts cannot pay."""


class Expected(Drafting):
    """Drafts of any length, each token of which holds with the given probability."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def share(self, _expected: object) -> float:
        return self._share

    def draft(self, _decoder: Decoder, most: int) -> NDArray[np.int32]:
        return np.zeros((1, most), np.int32)


def requests(shares: list[float], tokens: int | None = None) -> list[tuple[RunningRequest, int]]:
    made: list[tuple[RunningRequest, int]] = []
    for share in shares:
        prompt = np.array([3, 4, 5], np.int32)
        config = Ask((3, 4, 5), {"prompt_lookup_num_tokens": tokens}).config()
        request = GenerationRequest(prompt, config)
        running = RunningRequest(request, make_decoder(config, prompt), lambda _: None, len(made), 0.0)
        running.sequences, running.drafting = [Sequence(len(made))], Expected(share)
        made.append((running, 40))
    return made


def lengths(speculation: Speculation, asked: list[tuple[RunningRequest, int]], room: int = 64) -> list[int]:
    may = speculation.may_draft([request for request, _ in asked], len(asked), room)
    drafts = speculation.drafts(asked, len(asked), room) if may else {}
    return [drafts[request].shape[1] if request in drafts else 0 for request, _ in asked]


@cases
def test_as_many_are_drafted_as_make_tokens_come_fastest(
    seconds: Mapping[int, float], shares: list[float], expected: list[int]
) -> None:
    assert lengths(Speculation.of("auto", seconds), requests(shares)) == expected


@cases
def test_a_number_is_taken_as_it_is(setting: str, tokens: int | None, room: int, expected: int) -> None:
    assert lengths(Speculation.of(setting, STEEP), requests([0.5], tokens), room) == [expected]


def test_sizes_that_are_not_known_are_tried_in_one_of_a_hundred_batches() -> None:
    speculation, tried = Speculation(), list[int]()
    for _ in range(600):
        (length,) = lengths(speculation, requests([0.0]))
        tried += [length] * (length > 0)
        speculation.took(1 + length, 1.0 + length)
    assert tried == [1, 2, 4, 8, 16, 1]


def test_how_often_drafts_hold_is_learned_apart_for_long_matches_and_for_requests_to_come() -> None:
    drafting, most, speculation = Drafting(), 4, Speculation()

    def share_after(text: list[int]) -> float:
        decoder = make_decoder(Ask((1,), {"do_sample": False}).config(), np.array(text, np.int32))
        drafting._lookups.clear()
        assert drafting.draft(decoder, most).shape == (1, most)
        return drafting.share(speculation.expected)

    short, long = [1, 2, 3, 4, 5, 1, 2], [*range(10, 30), *range(10, 20)]
    first = share_after(short)
    assert first < 0.5 < share_after(long)
    for held, shares in ((0, (0.0, 0.1)), (most, (0.9, 1.0))):
        share_after(short)
        for _ in range(20):
            speculation.judge(drafting, most, held, 1)
        assert shares[0] < drafting.share(speculation.expected) < shares[1]
        assert share_after(long) == pytest.approx(0.8)
    assert (drafting.drafted, drafting.held) == (160, 80)
    drafting = Drafting()
    assert share_after(short) > 0.8, "others' have held"
    for _ in range(99):
        speculation.judge(drafting, most, 0, 1)
    drafting = Drafting()
    assert share_after(short) == first, "but each request tries"


@pytest.mark.parametrize("kwargs", [{}, {"do_sample": True, "seed": 3, "num_return_sequences": 3, "top_k": 3}])
def test_answers_are_the_same_with_drafts(make_model: MakeModel, kwargs: dict[str, Any]) -> None:
    prompt, answers = [7, 8, 9, 10, 7, 8, 9], []
    with running_engine(make_model("4k"), ctx_size=512, speculation="auto") as engine:
        for tokens in (0, 6):
            more: dict[str, Any] = {"max_new_tokens": 60, "eos_token_id": [], "repetition_penalty": 0.5}
            finished = Request(engine, prompt, prompt_lookup_num_tokens=tokens, **more, **kwargs).finished()
            answers.append(generated(finished))
            assert 0 <= finished.accepted_tokens <= finished.drafted_tokens
            assert (finished.drafted_tokens > 0) == (tokens > 0)
    assert answers[0] == answers[1]


@pytest.mark.soak
def test_drafts_do_not_change_what_is_drawn() -> None:
    """Chi-square of 20,000 draws of six tokens with drafts against as many without."""
    prompt = (5, 6, 7, 5, 6, 7, 5, 6)
    bias = [[[token], 5.0] for token in (5, 6, 7)]
    kwargs = {"do_sample": True, "top_k": 0, "max_new_tokens": 6, "sequence_bias": bias}
    counts: list[Counter[tuple[int, ...]]] = []
    for drafts in (0, 3):
        core, _ = make_core(Scenario((), drafts=drafts), lambda: 0.0)
        drawn: Counter[tuple[int, ...]] = Counter()

        def take(event: Event, drawn: Counter[tuple[int, ...]] = drawn) -> None:
            assert isinstance(event, FinishedEvent)
            drawn[tuple(generated(event)[0])] += 1

        for _ in range(20_000 // 8):
            for _ in range(8):
                running = core.submit(GenerationRequest(np.array(prompt, np.int32), Ask(prompt, kwargs).config()), take)
                running.drafting = Foreseen([[*prompt, 5, 6, 7, 7, 7, 6]], wrong=END)  # what is drawn most often
            while core.has_work:
                core.step()
        assert drawn.total() == 20_000
        assert (core.totals.accepted > 5_000) == (drafts > 0)
        counts.append(drawn)
    common = [key for key in counts[0] | counts[1] if counts[0][key] + counts[1][key] >= 20]
    pairs = np.array([[drawn[key] for key in common] for drawn in counts], np.float64)
    pairs = np.column_stack([pairs, 20_000 - pairs.sum(axis=1)])
    statistic = ((pairs[0] - pairs[1]) ** 2 / pairs.sum(axis=0)).sum()
    freedom = pairs.shape[1] - 1
    # Beyond four standard deviations: once in 30,000 runs.
    assert statistic < freedom + 4 * np.sqrt(2 * freedom), (statistic, freedom)
