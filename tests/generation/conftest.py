"""Small models made of tables, and a loop that runs decoders on them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation import Decoder, GenerationConfig, GenerationResult, ModelDefaults, advance, make_decoder
from edge_phi3.generation.sampling import SequenceDecoder

Prefix = tuple[int, ...]
Model = Callable[[Prefix], NDArray[np.float32]]

VOCABULARY = 200
END = 3
DEFAULTS = ModelDefaults(
    vocab_size=VOCABULARY, bos_token_id=1, eos_token_ids=(END,), pad_token_id=0, context_length=4096
)


def table_model(seed: int, size: int = VOCABULARY, spread: float = 2.0) -> Model:
    """Return a model whose logits depend on the last two tokens."""
    table = np.random.Generator(np.random.PCG64(seed)).standard_normal((2, size, size)).astype(np.float32)

    def logits(prefix: Prefix) -> NDArray[np.float32]:
        before = prefix[-2] if len(prefix) > 1 else 0
        scores: NDArray[np.float32] = (table[0, before] + table[1, prefix[-1]]) * np.float32(spread)
        return scores

    return logits


def decoder(prompt: Sequence[int], defaults: ModelDefaults = DEFAULTS, **options: Any) -> Decoder:
    """Return a decoder; `options` are ``generate_kwargs``, arguments of `make_decoder`, or what OpenAI's API sets."""

    def taken(*names: str) -> dict[str, Any]:
        return {name: options.pop(name) for name in names if name in options}

    arguments = taken("vocabulary", "clock", "constraint")
    replaced = taken("presence_penalty", "frequency_penalty", "top_logprobs")
    config = dataclasses.replace(GenerationConfig.resolve(options, defaults), **replaced)
    return make_decoder(config, np.array(prompt, dtype=np.int32), **arguments)


def answer(model: Model, prompt: Sequence[int], **options: Any) -> GenerationResult:
    """Return what one request generates alone; `options` as in `decoder`."""
    each = decoder(prompt, **options)
    run(model, (each, prompt))
    return each.result()


def run(model: Model, *decoders: tuple[Decoder, Sequence[int]]) -> None:
    """Run decoders together until all have finished; each step must name the rows and emit the tokens of the result."""
    rows: list[list[Prefix]] = [[tuple(prompt)] for _, prompt in decoders]
    emitted: list[list[tuple[int, int]]] = [[] for _ in decoders]
    while going := [index for index, (each, _) in enumerate(decoders) if not each.finished]:
        for index in going:
            assert decoders[index][0].rows == len(rows[index])
            assert decoders[index][0].row_tokens()[: len(rows[index])].tolist() == [[*prefix] for prefix in rows[index]]
        logits = np.stack([model(prefix) for index in going for prefix in rows[index]])
        for index, step in zip(going, advance([decoders[index][0] for index in going], logits), strict=True):
            parents, tokens = list(step.parents), list(step.tokens)
            rows[index] = [(*rows[index][p], t) for p, t in zip(parents, tokens, strict=True)]
            emitted[index] += step.emitted
    for (each, prompt), found in zip(decoders, emitted, strict=True):
        if not isinstance(each, SequenceDecoder):
            assert found == [], "beams emit nothing before the end"
        elif each.error is None:
            for index, sequence in enumerate(each.result().sequences):
                assert [token for of, token in found if of == index] == sequence[len(prompt) :].tolist()
