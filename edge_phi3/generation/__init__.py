"""What ``generate()`` means, in NumPy: knows neither llama.cpp nor HTTP.

A request becomes a `GenerationConfig` (`GenerationConfig.resolve`) and then a `Decoder` (`make_decoder`).
Whoever runs the model calls `advance` once per step with the logits of all running requests.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.beam import BeamDecoder
from edge_phi3.generation.config import GenerationConfig, ModelDefaults
from edge_phi3.generation.constrained import ConstrainedBeamDecoder, ConstrainedDecoder, TokenConstraint
from edge_phi3.generation.decoding import Decoder, GenerationError, GenerationResult, advance
from edge_phi3.generation.parameters import API_DEFAULTS
from edge_phi3.generation.sampling import SequenceDecoder
from edge_phi3.generation.stopping import Stopping, StopTexts
from edge_phi3.generation.values import ParameterError

__all__ = [
    "API_DEFAULTS",
    "Decoder",
    "GenerationConfig",
    "GenerationError",
    "GenerationResult",
    "ModelDefaults",
    "ParameterError",
    "advance",
    "make_decoder",
]


def make_decoder(
    config: GenerationConfig,
    prompt: NDArray[np.int32],
    *,
    vocabulary: Sequence[str | None] | None = None,
    stop_texts: StopTexts | None = None,
    constraint: TokenConstraint | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Decoder:
    """Return the decoder of one request, which wants one row of logits: those of the prompt's last token.

    Args:
        config: what the request asks for.
        prompt: token ids of the prompt, shape (n,), at least one.
        vocabulary: what `StopStrings` takes; needed for ``stop_strings`` only.
        stop_texts: what else ends a sequence by its text, or None.
        constraint: what the sequences are held to; copied.
        clock: seconds that only grow; ``max_time`` counts from this call.

    Raises:
        ParameterError: the prompt leaves no room for a token.
        ValueError: an argument is missing, or not for such a request.
    """
    if len(prompt) == 0:
        raise ValueError("A prompt needs at least one token; an empty text starts with `bos_token_id`.")
    stopping = Stopping(config, len(prompt), vocabulary, clock, stop_texts)
    tokens = np.asarray(prompt, dtype=np.int32)
    if config.is_beam_search:
        if config.top_logprobs is not None:
            raise ValueError("Beam searches return no log-probabilities of the model.")
        if constraint is not None:
            return ConstrainedBeamDecoder(config, tokens, stopping, constraint)
        return BeamDecoder(config, tokens, stopping)
    if constraint is not None:
        return ConstrainedDecoder(config, tokens, stopping, constraint)
    return SequenceDecoder(config, tokens, stopping)
