"""Single logits processors and the inputs they are compared on. ``make.py`` records what transformers makes of them."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS, PROMPT_LENGTH, LENGTH, VOCABULARY = 4, 5, 11, 80

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "repetition_penalty-up": ("RepetitionPenaltyLogitsProcessor", {"penalty": 1.3}),
    "repetition_penalty-down": ("RepetitionPenaltyLogitsProcessor", {"penalty": 0.7}),
    "no_repeat_ngram_size-1": ("NoRepeatNGramLogitsProcessor", {"ngram_size": 1}),
    "no_repeat_ngram_size-2": ("NoRepeatNGramLogitsProcessor", {"ngram_size": 2}),
    "no_repeat_ngram_size-3": ("NoRepeatNGramLogitsProcessor", {"ngram_size": 3}),
    "no_repeat_ngram_size-12": ("NoRepeatNGramLogitsProcessor", {"ngram_size": 12}),
    "no_repeat_ngram_size-20": ("NoRepeatNGramLogitsProcessor", {"ngram_size": 20}),
    "sequence_bias": (
        "SequenceBiasLogitsProcessor",
        {"sequence_bias": [[[3], 1.5], [[4], -2.0], [[1, 3], 0.5], [[2, 3], 0.25], [[1, 2, 5], 3.0], [[3], 2.0]]},
    ),
    "bad_words_ids": ("NoBadWordsLogitsProcessor", {"bad_words_ids": [[3], [1, 4], [2, 5], [3, 1, 6]]}),
    "min_length": ("MinLengthLogitsProcessor", {"min_length": LENGTH + 1, "eos_token_id": [7, 8]}),
    "min_length-reached": ("MinLengthLogitsProcessor", {"min_length": LENGTH, "eos_token_id": [7, 8]}),
    "forced_eos_token_id": ("ForcedEOSTokenLogitsProcessor", {"max_length": LENGTH + 1, "eos_token_id": [7, 8]}),
    "forced_eos_token_id-later": ("ForcedEOSTokenLogitsProcessor", {"max_length": LENGTH + 2, "eos_token_id": [7]}),
    "remove_invalid_values": ("InfNanRemoveLogitsProcessor", {}),
    "exponential_decay_length_penalty": (
        "ExponentialDecayLengthPenalty",
        {"exponential_decay_length_penalty": (2, 1.3), "eos_token_id": [7, 8], "input_ids_seq_length": 5},
    ),
    "exponential_decay_length_penalty-later": (
        "ExponentialDecayLengthPenalty",
        {"exponential_decay_length_penalty": (6, 1.3), "eos_token_id": [7, 8], "input_ids_seq_length": 5},
    ),
    "suppress_tokens": ("SuppressTokensLogitsProcessor", {"suppress_tokens": [3, 9, 1000]}),
    "begin_suppress_tokens": (
        "SuppressTokensAtBeginLogitsProcessor",
        {"begin_suppress_tokens": [3, 9], "begin_index": LENGTH},
    ),
    "begin_suppress_tokens-later": (
        "SuppressTokensAtBeginLogitsProcessor",
        {"begin_suppress_tokens": [3, 9], "begin_index": LENGTH + 1},
    ),
    "renormalize_logits": ("LogitNormalization", {}),
    "temperature-0.3": ("TemperatureLogitsWarper", {"temperature": 0.3}),
    "temperature-3": ("TemperatureLogitsWarper", {"temperature": 3.0}),
    "top_k-1": ("TopKLogitsWarper", {"top_k": 1}),
    "top_k-7": ("TopKLogitsWarper", {"top_k": 7}),
    "top_k-1-keep-3": ("TopKLogitsWarper", {"top_k": 1, "min_tokens_to_keep": 3}),
    "top_k-1000": ("TopKLogitsWarper", {"top_k": 1000}),
    "top_p-0": ("TopPLogitsWarper", {"top_p": 0.0}),
    "top_p-0.3": ("TopPLogitsWarper", {"top_p": 0.3}),
    "top_p-0.95": ("TopPLogitsWarper", {"top_p": 0.95}),
    "top_p-0.1-keep-4": ("TopPLogitsWarper", {"top_p": 0.1, "min_tokens_to_keep": 4}),
    "min_p-0.05": ("MinPLogitsWarper", {"min_p": 0.05}),
    "min_p-1": ("MinPLogitsWarper", {"min_p": 1.0}),
    "min_p-0.5-keep-3": ("MinPLogitsWarper", {"min_p": 0.5, "min_tokens_to_keep": 3}),
    "typical_p-0.2": ("TypicalLogitsWarper", {"mass": 0.2}),
    "typical_p-0.9": ("TypicalLogitsWarper", {"mass": 0.9}),
    "typical_p-0.1-keep-4": ("TypicalLogitsWarper", {"mass": 0.1, "min_tokens_to_keep": 4}),
    "epsilon_cutoff-0.02": ("EpsilonLogitsWarper", {"epsilon": 0.02}),
    "epsilon_cutoff-0.9": ("EpsilonLogitsWarper", {"epsilon": 0.9}),
    "epsilon_cutoff-0.5-keep-3": ("EpsilonLogitsWarper", {"epsilon": 0.5, "min_tokens_to_keep": 3}),
    "eta_cutoff-0.02": ("EtaLogitsWarper", {"epsilon": 0.02}),
    "eta_cutoff-0.5": ("EtaLogitsWarper", {"epsilon": 0.5}),
    "eta_cutoff-0.5-keep-3": ("EtaLogitsWarper", {"epsilon": 0.5, "min_tokens_to_keep": 3}),
}
"""By name: the class in transformers and its arguments. The part of a name before "-" is the parameter."""

ENCODER_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder_repetition_penalty": ("EncoderRepetitionPenaltyLogitsProcessor", {"penalty": 1.3}),
    "encoder_no_repeat_ngram_size-1": ("EncoderNoRepeatNGramLogitsProcessor", {"encoder_ngram_size": 1}),
    "encoder_no_repeat_ngram_size-2": ("EncoderNoRepeatNGramLogitsProcessor", {"encoder_ngram_size": 2}),
    "encoder_no_repeat_ngram_size-3": ("EncoderNoRepeatNGramLogitsProcessor", {"encoder_ngram_size": 3}),
}
"""Those that are given the prompt."""

GROUP_CASE = ("diversity_penalty", 0.7, [3, 4, 3, 9])
"""The penalty, and the tokens that the groups before have chosen."""

PROMPT = np.array([1, 2, 3, 1, 4, 1, 2, 5], dtype=np.int32)


def inputs(name: str) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the tokens, shape (rows, length), and scores, shape (rows, vocabulary), of a case."""
    random = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    rows = 1 if name == "encoder_repetition_penalty" else ROWS
    tokens = random.integers(1, 6, (rows, LENGTH), dtype=np.int32)
    tokens[:, :PROMPT_LENGTH] = tokens[0, :PROMPT_LENGTH]
    scores = (random.standard_normal((rows, VOCABULARY)) * np.array([[1.0], [3.0], [0.1], [8.0]])[:rows]).astype(
        np.float32
    )
    # Tokens that were banned before.
    scores[random.random(scores.shape) < 0.1] = -np.inf
    if name == "remove_invalid_values":
        scores[0, :3] = np.inf, -np.inf, np.nan
    return tokens, scores
