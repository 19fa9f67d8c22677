"""The context that computes nothing, against the reference that knows no cache, and what it refuses."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from edge_phi3.engine.sequence import GenerationRequest
from edge_phi3.generation import GenerationConfig, GenerationResult, advance, make_decoder
from edge_phi3.llama import DecodeFailedError
from tests.golden.requests import MODES, RequestMaker
from tests.support.hash_context import Failure, HashContext
from tests.support.reference import Attention, answer, contents_of
from tests.support.scenarios import DEFAULTS, MODEL, TEXTS, VOCABULARY

PARALLEL = 8


class Driver:
    """Answers one request at a time on contexts: rows one after the other, each with a sequence of its own."""

    def __init__(self, attention: Attention, seed: int) -> None:
        self.attention, self.chance = attention, random.Random(seed)
        self.contexts = [
            HashContext(
                MODEL,
                cells=500,
                sequences=PARALLEL,
                batch_size=self.chance.randint(1, 40),
                rotary=rotary,
                window=attention.window,
                window_chunk=attention.window_chunk,
            )
            for rotary in range(1 if attention.max_tokens is None else 2)
        ]

    def answer(self, request: GenerationRequest) -> GenerationResult:
        prompt = request.prompt_ids.tolist()
        decoder = make_decoder(request.config, request.prompt_ids, vocabulary=TEXTS)
        rows, place = {0: prompt}, self.attention.rotary(len(prompt))
        context, done = self.contexts[place], dict.fromkeys(range(PARALLEL), 0)
        while not decoder.finished:
            length = len(next(iter(rows.values())))
            if self.attention.rotary(length) != place:
                context.clear()
                place, done = 1, dict.fromkeys(range(PARALLEL), 0)
                context = self.contexts[1]
            logits = [self.feed(context, seq_id, rows[seq_id], done[seq_id], len(prompt)) for seq_id in rows]
            (step,) = advance([decoder], np.concatenate(logits))
            old, before = list(rows), rows
            kept = {old[parent] for parent in step.parents}
            for seq_id in set(old) - kept:
                context.remove(seq_id, -1, -1)
            free, rows = [seq_id for seq_id in range(PARALLEL) if seq_id not in kept], {}
            for parent, token in zip(step.parents, step.tokens, strict=True):
                source = target = old[parent]
                if source in rows:
                    target = free.pop()
                    self.fork(context, source, target)
                rows[target] = [*before[source], token]
                done[target] = length
        for context in self.contexts:
            context.clear()
        return decoder.result()

    def feed(self, context: HashContext, seq_id: int, tokens: Sequence[int], start: int, prompt_length: int) -> Any:
        """Decode the tokens of a sequence from `start` on, and return the last one's logits."""
        window, chunk = self.attention.window, self.attention.window_chunk
        logits: Any = None
        while start < len(tokens):
            count = min(len(tokens) - start, context.batch_size, self.chance.randint(1, 12))
            if window is not None:
                if start < window:
                    count = min(count, window - start)
                elif start < prompt_length:
                    count = min(count, prompt_length - start, chunk - (start - window) % chunk)
                else:
                    count = 1
                context.remove(seq_id, 0, self.attention.first_seen(start, prompt_length))
            context.tokens[:count] = tokens[start : start + count]
            context.positions[:count] = range(start, start + count)
            context.seq_ids[:count], context.wants_logits[:count] = seq_id, 0
            start += count
            context.wants_logits[count - 1] = start == len(tokens)
            logits = context.decode(count, int(start == len(tokens))).copy()
        return logits

    def fork(self, context: HashContext, source: int, target: int) -> None:
        """Let one sequence begin as another does: by sharing, or by what is saved of it, whole or in two parts."""
        way, (start, last) = self.chance.random(), context.position_range(source)
        if way < 0.5:
            context.copy(source, target)
            return
        parts = [start, self.chance.randint(start, last), last + 1] if way < 0.8 else [start, last + 1]
        for first, end in itertools.pairwise(parts):
            if first < end:
                state = context.save(source, first, end)
                assert context.restore(target, state, behind=first > start)


@pytest.mark.parametrize("seed", range(60))
def test_it_computes_what_the_reference_says(seed: int) -> None:
    chance = random.Random(seed)
    attention = Attention(chance.choice((None, 3, 8, 20)), chance.choice((1, 3, 8)), chance.choice((None, 10, 20)))
    asked = RequestMaker(seed, range(1, VOCABULARY), texts=TEXTS, longest_prompt=40).make(MODES[seed % 5])
    config = GenerationConfig.resolve(asked.kwargs, DEFAULTS)
    request = GenerationRequest(np.array(asked.prompt, np.int32), config)
    expected = answer(request, MODEL, attention, TEXTS)
    if expected.result is None:
        assert expected.error is not None
        with pytest.raises(type(expected.error)):
            Driver(attention, seed).answer(request)
        return
    result = Driver(attention, seed).answer(request)
    assert [each.tolist() for each in result.sequences] == [each.tolist() for each in expected.result.sequences]
    assert result.finish_reasons == expected.result.finish_reasons


def context_of(cells: int = 16, **options: Any) -> HashContext:
    return HashContext(MODEL, cells=cells, sequences=4, batch_size=8, **options)


def decode(context: HashContext, seq_id: int, first: int, tokens: Sequence[int], rows: int = 1) -> Any:
    count = len(tokens)
    context.tokens[:count], context.positions[:count] = tokens, range(first, first + count)
    context.seq_ids[:count], context.wants_logits[:count] = seq_id, 0
    context.wants_logits[count - rows : count] = 1
    return context.decode(count, rows)


def test_every_visible_cell_counts() -> None:
    tokens = [5, 6, 7, 8, 9]
    right = contents_of(tokens, Attention(), 0)
    assert len({*right}) == 5
    assert contents_of(tokens, Attention(), 1)[0] != right[0], "the rotary factors count"
    for place in range(5):
        other = contents_of([*tokens[:place], 10, *tokens[place + 1 :]], Attention(), 0)
        assert all((left == again) == (at < place) for at, (left, again) in enumerate(zip(right, other, strict=True)))
    narrow = contents_of(tokens, Attention(window=3), 0)
    assert narrow[:3] == right[:3]
    assert narrow[3] != right[3]
    context = context_of()
    decode(context, 0, 0, tokens)
    assert context.contents(0) == right


def test_freed_cells_keep_their_content_and_are_used_again() -> None:
    context = context_of(cells=6)
    decode(context, 0, 0, [5, 6, 7])
    context.copy(0, 1)
    context.remove(0, 1, -1)
    assert (context.used, context.held) == (3, 4)
    context.remove(1, -1, -1)
    assert (context.position_range(0), context.position_range(1), context.used) == ((0, 0), (-1, -1), 1)
    stale = context._data.tolist()
    context.clear()
    assert context._data.tolist() == stale
    context.clear(zero=True)
    assert not context._data.any()


def test_without_room_everything_stays() -> None:
    context = context_of(cells=4)
    decode(context, 0, 0, [5, 6, 7])
    state, held = context.save(0, 0, 3), context.contents(0)
    with pytest.raises(DecodeFailedError, match="status 1"):
        decode(context, 1, 0, [5, 6])
    assert not context.restore(1, state, behind=False)
    assert (context.contents(0), context.position_range(1), context.refused) == (held, (-1, -1), 1)


def test_a_failure_leaves_what_was_done_and_spoils_the_rest() -> None:
    context = context_of(failures=[Failure(1, status=-3, done=2)])
    decode(context, 0, 0, [5, 6])
    with pytest.raises(DecodeFailedError, match="status -3"):
        decode(context, 1, 0, [7, 8, 9])
    assert context.position_range(1) == (0, 1)
    context.clear()
    assert np.isnan(decode(context, 0, 0, [5])).all(), "what is no number gets through a mask"
    context.clear(zero=True)
    assert not np.isnan(decode(context, 0, 0, [5])).any()


def test_a_context_may_stay_broken_and_be_aborted() -> None:
    broken, aborted = context_of(failures=[Failure(0, lasting=True)]), context_of()
    aborted.abort()
    for context in (broken, aborted):
        for _ in range(2):
            with pytest.raises(DecodeFailedError):
                context.warm_up()
    working = context_of()
    working.warm_up()
    assert (working.used, working.decoded) == (0, 0)


MISUSE: dict[str, Any] = {
    "a position is left out": lambda context: decode(context, 0, 4, [5]),
    "a position comes twice": lambda context: decode(context, 0, 2, [5]),
    "a sequence begins late": lambda context: decode(context, 1, 1, [5]),
    "there is no such sequence": lambda context: decode(context, 5, 0, [5]),
    "there is no such token": lambda context: decode(context, 1, 0, [VOCABULARY]),
    "other logits are asked for": lambda context: (decode(context, 1, 0, [5]), context.decode(1, 0)),
    "an empty batch": lambda context: context.decode(0, 0),
    "too large a batch": lambda context: context.decode(9, 0),
    "copied onto what is held": lambda context: (context.copy(0, 1), context.copy(0, 1)),
    "copied onto itself": lambda context: context.copy(0, 0),
    "a hole": lambda context: (context.remove(0, 1, 2), decode(context, 0, 3, [5])),
    "not held": lambda context: context.save(0, 0, 4),
    "behind a gap": lambda context: context.restore(1, context.save(0, 1, 3), behind=True),
    "closed": lambda context: (context.close(), decode(context, 1, 0, [5])),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_found(name: str) -> None:
    context = context_of()
    decode(context, 0, 0, [5, 6, 7])
    with pytest.raises(AssertionError):
        MISUSE[name](context)
    assert context.violations


def test_a_token_must_see_its_window_and_no_more() -> None:
    context = context_of(window=3)
    decode(context, 0, 0, [5, 6, 7])
    with pytest.raises(AssertionError, match="sees 4 tokens"):
        decode(context, 0, 3, [8])
    context.remove(0, 0, 2)
    with pytest.raises(AssertionError, match="sees 2 tokens"):
        decode(context, 0, 3, [8])
