"""Logits processors: what changes scores because of the tokens before. Built once per request, in transformers' order.

A processor that is off is not built.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.logits import Rows, Scores, log_softmax

Tokens = NDArray[np.int32]

_LARGEST: Final = np.finfo(np.float32).max

Processor = Callable[[Tokens, Scores], None]
"""Changes scores, shape (rows, vocabulary), in place, given the tokens so far, shape (rows, length)."""


class SequenceBias:
    """Adds a bias to the token that would complete a phrase. Follows ``SequenceBiasLogitsProcessor``."""

    def __init__(self, biases: Sequence[tuple[tuple[int, ...], float]]) -> None:
        # Of equal phrases the last counts.
        singles: dict[int, float] = {}
        self._phrases: dict[int, list[tuple[Tokens, int, np.float32]]] = {}
        for phrase, bias in dict(biases).items():
            if len(phrase) == 1:
                singles[phrase[0]] = bias
            else:
                start = np.array(phrase[:-1], dtype=np.int32)
                self._phrases.setdefault(phrase[-2], []).append((start, phrase[-1], np.float32(bias)))
        self._tokens = np.array(list(singles), dtype=np.intp)
        with np.errstate(over="ignore"):
            self._biases = np.array(list(singles.values()), dtype=np.float32)
        self._singles = dict(zip(singles, self._biases, strict=True))

    def __call__(self, tokens: Tokens, scores: Scores) -> None:
        """Bias the single tokens, and the last tokens of phrases whose start has just been generated."""
        completed = self._completed(tokens) if self._phrases else {}
        biased = {place: scores[place] + bias for place, bias in completed.items()}
        if len(self._tokens):
            scores[:, self._tokens] += self._biases
        for place, score in biased.items():
            scores[place] = score

    def _completed(self, tokens: Tokens) -> dict[tuple[int, int], np.float32]:
        """Sum the biases of phrases that could be completed, for each (row, token)."""
        found: dict[tuple[int, int], np.float32] = {}
        length = tokens.shape[1]
        for row, newest in enumerate(tokens[:, -1].tolist()):
            for start, last, bias in self._phrases.get(newest, ()):
                # A phrase longer than all tokens so far is passed over even where all but its last token match.
                if len(start) < length and np.array_equal(tokens[row, length - len(start) :], start):
                    so_far = found.get((row, last), self._singles.get(last, np.float32(0)))
                    found[row, last] = so_far + bias
        return found


@dataclass(eq=False, slots=True)
class HammingDiversity:
    """Penalises the tokens that earlier beam groups chose in this step. Follows ``HammingDiversityLogitsProcessor``.

    The penalty is subtracted once for each beam that chose a token. `chosen` are the tokens of the earlier groups; the
    beam search sets them before each group. Vijayakumar et al., Diverse Beam Search, https://arxiv.org/abs/1610.02424.
    """

    penalty: float
    chosen: Tokens = field(default_factory=lambda: np.empty(0, dtype=np.int32))

    def __call__(self, _tokens: Tokens, scores: Scores) -> None:
        """Subtract the penalties."""
        if len(self.chosen):
            chosen, counts = np.unique(self.chosen, return_counts=True)
            scores[:, chosen] -= self.penalty * counts.astype(np.float32)


def penalize_repetition(penalty: float, prompt: Rows, prompt_length: int, tokens: Tokens, scores: Scores) -> None:
    """Penalise the tokens that have occurred, prompt included. Follows ``RepetitionPenaltyLogitsProcessor``.

    The penalty divides positive scores, and multiplies negative ones. `prompt` holds the prompt's different tokens.
    Keskar et al., CTRL, https://arxiv.org/abs/1909.05858.
    """
    for generated, line in zip(tokens[:, prompt_length:], scores, strict=True):
        # Both are worked out before either is written: a token may be in both.
        after = _penalized(line, generated, penalty) if len(generated) else None
        line[prompt] = _penalized(line, prompt, penalty)
        if after is not None:
            line[generated] = after


def penalize_recent(penalty: float, count: int, tokens: Tokens, scores: Scores) -> None:
    """Penalise each of the last tokens, prompt included; all where the count is -1: llama.cpp's ``repeat_penalty``."""
    for recent, line in zip(tokens[:, -count if count > 0 else 0 :], scores, strict=True):
        line[recent] = _penalized(line, recent, penalty)


def favour_the_prompt(penalty: float, prompt: Rows, _tokens: Tokens, scores: Scores) -> None:
    """Favour the prompt's tokens. Follows ``EncoderRepetitionPenaltyLogitsProcessor``; the prompt is its encoder."""
    for line in scores:
        line[prompt] = _penalized(line, prompt, 1 / penalty)


def _penalized(line: Scores, tokens: Rows | Tokens, penalty: float) -> Scores:
    found = line[tokens]
    return np.where(found < 0, found * penalty, found / penalty)


def penalize_occurrences(presence: float, frequency: float, prompt_length: int, tokens: Tokens, scores: Scores) -> None:
    """Penalise the tokens that have been generated, the prompt left out: OpenAI's presence and frequency penalties.

    The formula is that of OpenAI's API reference: a token's score loses its number of occurrences times the frequency
    penalty, and the presence penalty once.
    """
    for generated, line in zip(tokens[:, prompt_length:], scores, strict=True):
        found, counts = np.unique(generated, return_counts=True)
        line[found] -= counts.astype(np.float32) * np.float32(frequency) + np.float32(presence)


def ban_repeated_ngrams(size: int, prompt: Tokens | None, tokens: Tokens, scores: Scores) -> None:
    """Ban what follows the last n - 1 tokens of each row anywhere in its text.

    Follows ``NoRepeatNGramLogitsProcessor`` and, where the text is the prompt, shape (1, n), instead of each row,
    ``EncoderNoRepeatNGramLogitsProcessor``.
    """
    texts = tokens if prompt is None else prompt
    starts = texts.shape[1] - size + 1
    if starts <= 0 or tokens.shape[1] < size - 1:
        return
    if size == 1:
        followers = np.broadcast_to(texts, (len(tokens), starts))
        np.put_along_axis(scores, followers, -np.inf, axis=1)
        return
    found = (texts[:, size - 2 : -1] == tokens[:, -1:]).ravel().nonzero()[0]
    rows, places = np.divmod(found, starts)
    lines = rows if len(texts) > 1 else np.zeros_like(rows)
    for back in range(2, size):
        same = texts[lines, places + (size - 1 - back)] == tokens[rows, -back]
        rows, lines, places = rows[same], lines[same], places[same]
    scores[rows, texts[lines, places + size - 1]] = -np.inf


def ban_tokens(banned: Rows, lengths: range, tokens: Tokens, scores: Scores) -> None:
    """Ban tokens at certain lengths of the rows, prompt included.

    Follows ``MinLengthLogitsProcessor`` with its "NewTokens" sibling, and ``SuppressTokensLogitsProcessor`` with its
    "AtBegin" sibling.
    """
    if tokens.shape[1] in lengths:
        scores[:, banned] = -np.inf


def force_tokens(length: int, forced: Sequence[int], tokens: Tokens, scores: Scores) -> None:
    """Leave only certain tokens, with the score 0, at one length of the rows.

    Follows ``ForcedBOSTokenLogitsProcessor`` and its EOS sibling.
    """
    if tokens.shape[1] == length:
        scores.fill(-np.inf)
        scores[:, list(forced)] = 0


def make_finite(_tokens: Tokens, scores: Scores) -> None:
    """Replace NaN by 0 and infinities by the largest numbers. Follows ``InfNanRemoveLogitsProcessor``."""
    np.maximum(scores, -_LARGEST, out=scores)
    if not scores.max() <= _LARGEST:
        np.minimum(scores, _LARGEST, out=scores)
        scores[np.isnan(scores)] = 0


def favour_the_end(start: int, factor: float, ends: Rows, tokens: Tokens, scores: Scores) -> None:
    """Favour end tokens ever more past a length, prompt included. Follows ``ExponentialDecayLengthPenalty``.

    Their scores are raised by a multiple of their size, which grows by `factor` per token.
    """
    past = tokens.shape[1] - start
    if past > 0:
        found = scores[:, ends]
        try:
            growth = factor**past - 1
        except OverflowError:
            growth = np.inf
        scores[:, ends] = found + np.abs(found) * growth


def renormalize(_tokens: Tokens, scores: Scores) -> None:
    """Turn scores into log-probabilities. Follows ``LogitNormalization``."""
    log_softmax(scores)


def build_processors(config: GenerationConfig, prompt: Tokens) -> tuple[Processor, ...]:
    """Return the processors that a request switches on, in the order of ``GenerationMixin._get_logits_processor``.

    OpenAI's penalties, which transformers has not, stand behind the repetition penalty. `prompt` is of shape (n,).
    """
    length = len(prompt)
    ends = _inside(config.eos_token_id, config)
    built: list[Processor] = []
    if config.sequence_bias:
        built.append(SequenceBias(config.sequence_bias))
    if config.is_beam_search and config.num_beam_groups > 1 and (config.diversity_penalty or 0) > 0:
        built.append(HammingDiversity(config.diversity_penalty or 0))
    if config.encoder_repetition_penalty != 1:
        built.append(partial(favour_the_prompt, config.encoder_repetition_penalty, np.unique(prompt).astype(np.intp)))
    if config.repetition_penalty != 1:
        built.append(partial(penalize_repetition, config.repetition_penalty, np.unique(prompt).astype(np.intp), length))
    if config.repeat_penalty != 1 and config.repeat_last_n:
        built.append(partial(penalize_recent, config.repeat_penalty, config.repeat_last_n))
    if config.presence_penalty or config.frequency_penalty:
        built.append(partial(penalize_occurrences, config.presence_penalty, config.frequency_penalty, length))
    if config.no_repeat_ngram_size:
        built.append(partial(ban_repeated_ngrams, config.no_repeat_ngram_size, None))
    if config.encoder_no_repeat_ngram_size:
        built.append(partial(ban_repeated_ngrams, config.encoder_no_repeat_ngram_size, prompt[None]))
    if config.bad_words_ids:
        bannable = [
            phrase for phrase in config.bad_words_ids if len(phrase) > 1 or phrase[0] not in config.eos_token_id
        ]
        built.append(SequenceBias([(phrase, -np.inf) for phrase in bannable]))
    if len(ends) and config.least_length(length) > length:
        built.append(partial(ban_tokens, ends, range(config.least_length(length))))
    if config.forced_bos_token_id is not None and length == 1:
        built.append(partial(force_tokens, 1, [config.forced_bos_token_id]))
    if config.forced_eos_token_id:
        built.append(partial(force_tokens, config.total_length(length) - 1, config.forced_eos_token_id))
    if config.remove_invalid_values:
        built.append(make_finite)
    if config.exponential_decay_length_penalty is not None:
        start, factor = config.exponential_decay_length_penalty
        built.append(partial(favour_the_end, start + length, factor, ends))
    if config.suppress_tokens:
        built.append(partial(ban_tokens, _inside(config.suppress_tokens, config), range(sys.maxsize)))
    if config.begin_suppress_tokens:
        begin = length + 1 if length == 1 and config.forced_bos_token_id is not None else length
        built.append(partial(ban_tokens, _inside(config.begin_suppress_tokens, config), range(begin, begin + 1)))
    if config.renormalize_logits and not config.do_sample:
        built.append(renormalize)
    return tuple(built)


def _inside(tokens: Sequence[int], config: GenerationConfig) -> Rows:
    """Return the token ids that exist; others name nothing, as in transformers."""
    return np.array([token for token in dict.fromkeys(tokens) if 0 <= token < config.vocab_size], dtype=np.intp)
