"""Decoding: transformers' recorded answers, and beyond them seeds, draws, scores, beams, log-probabilities, ends."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_phi3.generation import GenerationError, ModelDefaults, advance
from edge_phi3.generation.drawing import draw
from edge_phi3.generation.logits import Candidates
from edge_phi3.generation.parameters import PARAMETERS
from edge_phi3.generation.stopping import StopStrings
from tests.generation.conftest import END, VOCABULARY, Model, Prefix, answer, decoder, run, table_model
from tests.golden import generation_data as data
from tests.golden.requests import MODES
from tests.support.cases import cases, tables

PROMPT = (5, 6, 7)


def generated(*requests: dict[str, Any], seed: int = 1) -> list[list[list[int]]]:
    """Run requests together, and return the new tokens of each returned sequence."""
    decoders = [(decoder(PROMPT, **({"max_new_tokens": 25} | request)), PROMPT) for request in requests]
    run(table_model(seed), *decoders)
    return [[tokens[len(PROMPT) :].tolist() for tokens in each.result().sequences] for each, _ in decoders]


@pytest.mark.parametrize("options", [{"num_return_sequences": 2}, {"num_beams": 4, "temperature": 2.0}])
def test_equal_seeds_repeat_and_other_or_no_seeds_differ(options: dict[str, Any]) -> None:
    request = options | {"top_k": 0, "max_new_tokens": 20}
    first, again, *others = (str(generated(request | {"seed": seed})) for seed in (11, 11, 12, None, None))
    assert first == again
    assert len({first, *others}) == 4
    # The sequences of a request are drawn independently, and the first does not depend on how many there are.
    one = {"seed": 1, "top_k": 0, "max_new_tokens": 300, "eos_token_id": []}
    (sequences,) = generated(one | {"num_return_sequences": 8})
    assert len({tuple(tokens) for tokens in sequences}) == 8
    assert generated(one) == [sequences[:1]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@cases
def test_sampling_refuses_scores_that_are_no_distribution(options: dict[str, Any], value: float) -> None:
    logits = table_model(1)(PROMPT)[None]
    logits[0, 100] = value
    each = decoder(PROMPT, **options)
    advance([each], logits.copy())
    assert isinstance(each.error, GenerationError)
    if "num_beams" not in options:  # which see log-probabilities: one such value makes them NaN altogether
        mended = decoder(PROMPT, remove_invalid_values=True, **options)
        advance([mended], logits.copy())
        assert mended.error is None


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**32), st.integers(1, 2000), st.floats(0, 1, exclude_max=True), st.floats(0.01, 50), st.booleans()
)
def test_draws_invert_the_distribution(seed: int, width: int, uniform: float, spread: float, whole: bool) -> None:
    tokens = None if whole else np.tile(np.arange(width, dtype=np.int32), (2, 1))
    random = np.random.default_rng(seed)
    scores = (random.standard_normal((2, width)) * spread).astype(np.float32)
    scores[:, random.random(width) < 0.3] = -np.inf
    scores[:, random.integers(width)] = 0
    drawn = draw(Candidates(scores, tokens), np.array([0, 1]), np.array([uniform, uniform]))
    reached = np.cumsum(np.exp(scores - scores.max(1, keepdims=True)), axis=1, dtype=np.float64)
    reached /= reached[:, -1:]
    for row, token in enumerate(drawn.tokens.tolist()):
        assert scores[row, token] > -np.inf
        below = reached[row, token - 1] if token else 0.0
        assert below - 1e-6 <= uniform <= reached[row, token] + 1e-6


def test_draws_reach_the_last_token_and_never_an_impossible_one() -> None:
    scores = np.full((1, 1300), -np.inf, dtype=np.float32)
    scores[0, [3, 700, 1001]] = 0
    for tokens in (None, np.arange(1300, dtype=np.int32)[None]):
        for uniform, token in ((0.0, 3), (np.nextafter(1, 0), 1001), (0.34, 700), (1 / 3, 700)):
            assert draw(Candidates(scores, tokens), np.array([0]), np.array([uniform])).tokens[0] == token


def test_what_cannot_start_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        decoder([])
    with pytest.raises(ValueError, match="rows of logits"):
        advance([decoder(PROMPT)], np.zeros((2, VOCABULARY), dtype=np.float32))
    with pytest.raises(ValueError, match="vocabulary"):
        decoder(PROMPT, stop_strings="a")
    with pytest.raises(ValueError, match="Beam searches"):
        decoder(PROMPT, num_beams=2, top_logprobs=1)


# -- beams, beyond the recorded requests


def log_probability(model: Model, tokens: Prefix, start: int = len(PROMPT)) -> float:
    """Sum the log-probabilities of the tokens from a place on, in float64."""
    rows = [model(tokens[:length]).astype(np.float64) for length in range(start, len(tokens))]
    return float(sum(row[token] - np.log(np.exp(row).sum()) for row, token in zip(rows, tokens[start:], strict=True)))


def test_as_many_beams_as_continuations_find_the_best_of_all() -> None:
    """With room for every continuation, beam search is exhaustive search."""
    model = table_model(9, 6, 1.0)
    defaults = ModelDefaults(vocab_size=6, bos_token_id=1, eos_token_ids=(), pad_token_id=0, context_length=64)
    options = {"do_sample": False, "num_beams": 36, "num_return_sequences": 5, "max_new_tokens": 3}
    result = answer(model, (1, 2, 3), defaults=defaults, **options)
    every = [(1, 2, 3, *tail) for tail in itertools.product(range(6), repeat=3)]
    best = sorted(every, key=lambda tokens: log_probability(model, tokens))[::-1][:5]
    assert [tuple(tokens.tolist()) for tokens in result.sequences] == best
    assert result.sequences_scores == pytest.approx([log_probability(model, tokens) / 3 for tokens in best], rel=1e-5)
    # Extreme length penalties do not overflow.
    options = {"do_sample": False, "num_beams": 2, "max_new_tokens": 3}
    for length_penalty, score in ((1e6, -0.0), (-1e6, -np.inf)):
        result = answer(table_model(1), PROMPT, length_penalty=length_penalty, **options)
        assert result.sequences_scores == [score]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_scores_are_those_of_a_beams_own_tokens(groups: int) -> None:
    """transformers mixes up the beams of groups here, so that its answers do not show it."""
    options: dict[str, Any] = {"do_sample": False, "num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 12}
    options |= {"output_scores": True, "return_dict_in_generate": True, "eos_token_id": []}
    if groups > 1:
        options |= {"num_beam_groups": groups, "diversity_penalty": 0.5}
    result = answer(table_model(3), PROMPT, **options)
    assert result.scores is not None
    assert result.sequences_scores is not None
    for tokens, score, scored in zip(result.sequences, result.sequences_scores, result.scores, strict=True):
        assert score == pytest.approx(sum(each.score for each in scored) / len(scored), rel=1e-4)
        if groups == 1:
            expected = log_probability(table_model(3), tuple(tokens.tolist()))
            assert sum(each.logprob for each in scored) == pytest.approx(expected, rel=1e-4)
    for less in itertools.product([False, True], repeat=2):
        options |= dict(zip(("return_dict_in_generate", "output_scores"), less, strict=True))
        assert (answer(table_model(3), PROMPT, **options).scores is not None) == all(less), "both options are on"


class Among:
    """A constraint: the tokens of one of these texts, then an end token."""

    def __init__(self, texts: Iterable[Prefix], before: Prefix = (), ends: Sequence[int] = (END,)) -> None:
        self.texts, self.before, self.ends = [*texts], before, ends

    def prepare(self) -> None:
        pass

    def permits(self, token: int) -> bool:
        after = (*self.before, token)
        return (
            self.before in self.texts if token in self.ends else any(text[: len(after)] == after for text in self.texts)
        )

    def mask(self, scores: NDArray[np.float32]) -> None:
        scores[[token for token in range(len(scores)) if not self.permits(token)]] = -np.inf

    def forced(self, most: int) -> list[int]:  # noqa: ARG002 - a protocol's
        return []

    def accept(self, token: int) -> None:
        assert self.permits(token)
        self.before = (*self.before, token)

    def clone(self) -> "Among":
        return Among(self.texts, self.before, self.ends)


@pytest.mark.parametrize(
    "form", [{"do_sample": False}, {"top_k": 0, "seed": 5}, {"num_beam_groups": 2, "diversity_penalty": 0.5}]
)
def test_beams_that_are_held_to_some_texts_end_in_the_best_of_them(form: dict[str, Any]) -> None:
    model, texts = table_model(2), [(9, 9), (9, 8, 7), (9, 8, 7, 6, 5), (9, 9, 9, 9), (40,), (41, 42, 43, 44, 45, 46)]
    options = {"do_sample": "seed" in form, "num_beams": 24, "num_return_sequences": 3, "max_new_tokens": 20} | form
    result = answer(model, PROMPT, constraint=Among(texts), **options)
    scores = {text: log_probability(model, (*PROMPT, *text, END)) / (len(text) + 1) for text in texts}
    found = [tuple(tokens[len(PROMPT) : -1].tolist()) for tokens in result.sequences]
    assert set(found) <= set(texts)
    assert set(result.finish_reasons) == {"stop"}
    if form == {"do_sample": False}:
        assert found == sorted(texts, key=lambda text: -scores[text])[:3]
        assert result.sequences_scores == pytest.approx([scores[text] for text in found], rel=1e-4)
    few: dict[str, Any] = {"num_beams": 2, "num_return_sequences": 2, "num_beam_groups": 1, "diversity_penalty": 0.0}
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        (few | {"suppress_tokens": [41], "min_new_tokens": 5}, "leaves 1 of the 2 answers"),
        ({"suppress_tokens": [9, 40, 41]}, "leaves no token"),
        ({"suppress_tokens": [9, 41]}, f"leaves {form.get('num_beam_groups', 1)} of the 3"),
        (
            {"suppress_tokens": [8, 43], "renormalize_logits": True, "top_p": 0.9},
            "leaves 2" if "seed" in form else "None",
        ),
        ({"eos_token_id": [3, 3, 2, 1, 0], "early_stopping": True}, "None"),
        ({"length_penalty": -2000.0}, "None"),
    )
    for more, error in cases:
        each = decoder(PROMPT, constraint=Among(texts, ends=more.get("eos_token_id", [END])), **options | more)
        run(model, (each, PROMPT))
        assert error in str(each.error), more
        if each.error is None and "num_beam_groups" not in form:
            assert len({tuple(tokens.tolist()) for tokens in each.result().sequences}) == 3, "none comes twice"


def test_beams_that_nothing_can_follow_do_not_hold_up_a_stop_string() -> None:
    """Their tokens are no answers, so that a stop string need not be in them."""
    vocabulary, texts = [f"<{token}>" for token in range(VOCABULARY)], [(9,), (40, 41, 42, 43, 44)]
    options: dict[str, Any] = {"do_sample": False, "num_beams": 2, "length_penalty": 9.0, "stop_strings": "<42>"}
    each = decoder(PROMPT, constraint=Among(texts), vocabulary=vocabulary, suppress_tokens=[END], **options)
    run(table_model(2), (each, PROMPT))
    assert [tokens[len(PROMPT) :].tolist() for tokens in each.result().sequences] == [[40, 41, 42, END]]


# -- log-probabilities of the model's own logits, whatever is done to them before a token is chosen


OPTIONS: list[dict[str, Any]] = tables(__file__)["OPTIONS"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("top", [0, 1, 5, VOCABULARY + 1])
def test_they_are_the_log_softmax_of_the_raw_logits(options: dict[str, Any], top: int) -> None:
    model, options = table_model(1), {"max_new_tokens": 12} | options
    result, plain = (answer(model, PROMPT, **more, **options) for more in ({"top_logprobs": top}, {}))
    assert [s.tolist() for s in result.sequences] == [s.tolist() for s in plain.sequences]
    assert plain.logprobs is None
    assert result.logprobs is not None
    for sequence, recorded in zip(result.sequences, result.logprobs, strict=True):
        tokens = sequence.tolist()
        assert [logprobs.token_id for logprobs in recorded] == tokens[len(PROMPT) :]
        for place, logprobs in enumerate(recorded, len(PROMPT)):
            logits = model(tuple(tokens[:place])).astype(np.float64)
            expected = logits - np.log(np.exp(logits).sum())
            assert logprobs.logprob == pytest.approx(expected[tokens[place]], abs=1e-9)
            best = np.argsort(-expected, kind="stable")[:top].tolist()
            assert [token for token, _ in logprobs.top] == best
            assert [logprob for _, logprob in logprobs.top] == pytest.approx(expected[best].tolist(), abs=1e-9)


def test_steps_hold_them_beside_what_they_emit_and_of_equal_tokens_the_lower_ids_come_first() -> None:
    each, other = decoder(PROMPT, do_sample=False, top_logprobs=3), decoder(PROMPT, do_sample=False)
    logits = np.zeros((2, VOCABULARY), np.float32)
    logits[:, [9, 40]] = 2
    first, second = advance([each, other], logits)
    assert [(0, first.logprobs[0].token_id)] == list(first.emitted) == list(second.emitted) == [(0, 9)]
    assert [token for token, _ in first.logprobs[0].top] == [9, 40, 0]
    assert list(second.logprobs) == []
    failing = decoder(PROMPT, top_logprobs=1, seed=1)
    (step,) = advance([failing], np.full((1, VOCABULARY), np.nan, np.float32))
    assert failing.error is not None
    assert list(step.logprobs) == [], "a request that fails has none"


# -- ends: end tokens, lengths, stop strings, time


TEXTS: list[str | None] = [None, "", "a", "b", "ab", "ba", "c", " ", "abc", "ca"]


def forced(*tokens: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return logits that allow one token in each row."""
    logits = np.full((len(tokens), VOCABULARY), -np.inf, dtype=np.float32)
    logits[range(len(tokens)), tokens] = 0
    return logits


@cases
def test_stop_strings(tokens: list[int], strings: list[str], found: bool) -> None:
    assert StopStrings(strings, TEXTS).matches(np.array(tokens, dtype=np.int32)) is found


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.text("abc ", min_size=1, max_size=4))
def test_a_stop_string_is_found_exactly_when_it_ends_in_the_newest_token(tokens: list[int], string: str) -> None:
    text = "".join(TEXTS[token] or "" for token in tokens)
    newest = len(TEXTS[tokens[-1]] or "")
    ends = [at + len(string) for at in range(len(text)) if text.startswith(string, at)]
    expected = any(end > len(text) - newest for end in ends)
    assert StopStrings([string], TEXTS).matches(np.array(tokens, dtype=np.int32)) is expected


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_return_sequences": 2}, {"num_beams": 2}])
def test_time_runs_out_after_the_step_that_passes_it(options: dict[str, Any]) -> None:
    # The clock is read when the request is made, and after each step.
    times = iter((100.0, 101.0, 102.0, 102.5))
    result = answer(table_model(1), PROMPT, max_time=2.0, clock=lambda: next(times), eos_token_id=[], **options)
    assert set(result.finish_reasons) == {"time"}
    assert {len(tokens) for tokens in result.sequences} == {len(PROMPT) + 3}


def test_an_end_token_at_the_last_step_is_a_stop_and_no_end_token_ends_nothing() -> None:
    stories: list[tuple[int, object, int, str]]
    stories = [(END, END, 1, "stop"), (END + 1, END, 1, "length"), (END, [], 3, "length"), (END, -1, 3, "length")]
    for token, ends, count, reason in stories:
        each = decoder(PROMPT, do_sample=False, max_new_tokens=count, eos_token_id=ends)
        for _ in range(count):
            advance([each], forced(token))
        assert each.result().finish_reasons == [reason]
        assert each.result().sequences[0].tolist() == [*PROMPT, *[token] * count]


RECORDED = data.read_answers("replay")


@functools.cache
def logits() -> dict[Prefix, NDArray[np.float32]]:
    return data.read_logits()


def recorded_logits(prefix: Prefix) -> NDArray[np.float32]:
    assert prefix in logits(), f"transformers never came to {prefix}"
    return logits()[prefix]


@pytest.mark.parametrize("mode", [*MODES, None])
def test_requests_alone_or_together_give_the_tokens_and_scores_of_transformers(mode: str | None) -> None:
    recorded = [pair for pair in RECORDED if mode in {pair[0].mode, None}]
    given: dict[str, Any] = {"vocabulary": data.replay_texts(), "output_scores": True, "return_dict_in_generate": True}
    running = [
        (decoder(request.prompt, data.REPLAY_DEFAULTS, **request.kwargs, **given), request.prompt)
        for request, _ in recorded
    ]
    for together in [running] if mode is None else [[one] for one in running]:
        run(recorded_logits, *together)
    found = [
        data.differences(each.result(), request, answer, request.kwargs.get("pad_token_id", 2))
        for (each, _), (request, answer) in zip(running, recorded, strict=True)
    ]
    assert {number: differing for number, differing in enumerate(found) if differing} == {}
    reasons = {reason for each, _ in running for reason in each.result().finish_reasons}
    assert mode or reasons == {"stop", "stop_string", "length"}, "answers end in every way"


def test_the_recorded_requests_cover_every_mode_and_parameter() -> None:
    requests = [request for request, _ in RECORDED]
    assert len(requests) >= 400
    assert {request.mode for request in requests} == set(MODES)
    recorded = {name for request in requests for name in request.kwargs}
    elsewhere = {"max_time", "prompt_lookup_num_tokens", "bos_token_id", "output_scores", "return_dict_in_generate"}
    assert recorded == PARAMETERS.keys() - elsewhere
