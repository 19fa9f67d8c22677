"""The places of tokens are those at which the answer's text holds them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from edge_phi3.engine.token_offsets import TokenOffsets
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.generation.decoding import TokenLogprobs
from edge_phi3.llama.model import Model
from tests.engine.conftest import MakeModel


@pytest.fixture(scope="module")
def tokenizer(make_model: MakeModel) -> Iterator[Tokenizer]:
    model = Model(make_model("4k"), n_gpu_layers=0)
    yield Tokenizer(model)
    model.close()


def placed(tokenizer: Tokenizer, prompt: list[int], answer: list[int]) -> list[tuple[int, int]]:
    placer = TokenOffsets(tokenizer, tokenizer.decode_prompt(np.array(prompt, np.int32), whole_runs=False))
    found = [each for token in answer if (each := placer.push(TokenLogprobs(token, -1.0, ())))]
    return [(each.logprobs.token_id, each.start) for each in found]


def test_words_characters_and_broken_bytes(tokenizer: Tokenizer) -> None:
    byte = {value: token for token, value in tokenizer.byte_of.items()}
    word, other = tokenizer.encode("json the", parse_special=False)[-2:].tolist()
    snowman = [byte[value] for value in "☃".encode()]
    newline = byte[10]
    end = next(iter(tokenizer.special_ids))
    answer = [word, newline, newline, *snowman, other, end, byte[0xE2], newline, other, byte[0xFF]]
    whole = tokenizer.decode([word, *answer])
    text = whole[len(tokenizer.decode([word])) :]
    size, after = len(tokenizer.bytes_of(word).decode()), len(tokenizer.bytes_of(other).decode())
    starts = [0, size, size + 1, *[size + 2] * 3, size + 3]
    broken = size + 3 + after
    starts += [broken, broken + 1, broken + 2, broken + 2 + after]
    assert placed(tokenizer, [word], answer) == [
        (token, start) for token, start in zip([t for t in answer if t != end], starts, strict=True)
    ]
    for token, start in placed(tokenizer, [word], answer)[:7]:
        if token not in tokenizer.byte_of:
            assert text[start:].startswith(tokenizer.bytes_of(token).decode())


def test_a_prompt_may_end_inside_a_run_of_bytes(tokenizer: Tokenizer) -> None:
    byte = {value: token for token, value in tokenizer.byte_of.items()}
    word = int(tokenizer.encode("json", parse_special=False)[-1])
    assert placed(tokenizer, [word, byte[10]], [byte[10], word]) == [(byte[10], 0), (word, 1)]
    first, *rest = [byte[value] for value in "é".encode()]
    assert placed(tokenizer, [word, first], rest)[0][0] == rest[0]
