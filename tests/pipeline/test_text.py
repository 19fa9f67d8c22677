"""Tokens to text, at its edges: characters of several tokens, bytes that are none, and stops that are spelt in them."""

import codecs
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tokenizers

from edge_phi3.api.openai.shown import ShownText
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.engine.token_offsets import TokenOffsets
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.generation.decoding import TokenLogprobs
from edge_phi3.generation.stopping import StopTexts
from edge_phi3.pipeline import PreparedPrompt
from edge_phi3.pipeline.answer import TextStream

REFERENCE = tokenizers.Tokenizer.from_file(str(DEMO_CHECKPOINT / "tokenizer.json"))


def sequences(tokenizer: Tokenizer, count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield prompts and answers: words, special tokens, characters in bytes, whole and cut, and bytes that are none."""
    chance = random.Random(count)
    # Of the tokens that stand for the same byte, the one that is nothing else.
    tokens = [*range(tokenizer.vocab_size), *tokenizer.raw_of]
    byte = {data[0]: token for token in tokens if len(data := tokenizer.bytes_of(token)) == 1}
    special = sorted(tokenizer.special_ids)
    word = int(tokenizer.encode("json")[-1])

    def some() -> list[int]:
        kind = chance.randrange(6)
        if kind == 0:
            return [chance.choice(special)]
        if kind == 1:
            return [byte[chance.randrange(256)]]
        if kind <= 3:
            spelt = chance.choice("é☃漢😀\n").encode()
            return [byte[value] for value in spelt[chance.choice((0, 0, 1)) : chance.choice((None, None, -1))] or spelt]
        return [chance.randrange(tokenizer.vocab_size)]

    for _ in range(count):
        prompt = [word, *[token for _ in range(chance.randrange(3)) for token in some()]]
        more = [word] * chance.randrange(2)
        yield prompt, [*some(), *more, *[token for _ in range(chance.randrange(12)) for token in some()]]


def prepared(tokenizer: Tokenizer, prompt: list[int], **options: Any) -> PreparedPrompt:
    text = tokenizer.decode_prompt(np.array(prompt, np.int32), **options)
    return cast("PreparedPrompt", SimpleNamespace(text=text, clean_up=False))


def complete(data: bytes) -> str:
    """Return the text of bytes without a character that more of them may complete."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


@pytest.mark.parametrize("skip", [True, False])
def test_a_character_goes_out_when_it_is_whole_and_only_a_part_is_lost(tokenizer: Tokenizer, skip: bool) -> None:
    shown = tokenizer.shown_bytes[skip]
    cut = 0
    for prompt, answer in sequences(tokenizer, 1000):
        ready = prepared(tokenizer, prompt, whole_runs=tokenizer.byte_level, skip_special_tokens=skip)
        stream, data, told = TextStream(ready), b"".join(shown[token] for token in prompt), ""
        begun = data.decode("utf-8", "replace")
        for token in answer:
            data += shown[token]
            told += stream.push([token])
            assert told == complete(data).removeprefix(" ")[len(begun.removeprefix(" ")) :]
        at_once = ready.text.decoder.copy()
        whole = ready.text.certain + at_once.push(answer) + at_once.finish()
        assert whole == data.decode("utf-8", "replace").removeprefix(" ")
        assert whole[len(ready.text.whole) :].removeprefix(told) in {"", "\ufffd"}
        cut += whole != ready.text.whole + told
    assert cut > 50


@pytest.mark.parametrize("tokenizer", ["demo", "real"], indirect=True)
def test_a_run_of_bytes_is_held_back_while_transformers_may_make_something_else_of_it(tokenizer: Tokenizer) -> None:
    broken, bytes_of = 0, {raw[0]: token for token, raw in tokenizer.raw_of.items()}
    for prompt, answer in sequences(tokenizer, 1000):
        ready = prepared(tokenizer, prompt)
        stream, told = TextStream(ready), ""
        for count in range(1, len(answer) + 1):
            told += stream.push(answer[count - 1 : count])
            certain = [token for token in prompt + answer[:count] if ready.text.decoder.shows(token)]
            run = bytearray()
            while certain[-1] in tokenizer.raw_of:
                run.insert(0, tokenizer.raw_of[certain.pop()][0])
            try:
                codecs.utf_8_decode(run, "strict", False)
            except UnicodeDecodeError:  # whatever comes next, each of its bytes is lost
                certain += [bytes_of[value] for value in run]
                broken += 1
            assert told == tokenizer.decode(certain)[len(ready.text.whole) :]
        if tokenizer.vocab_size == REFERENCE.get_vocab_size():
            assert tokenizer.decode([*prompt, *answer]) == REFERENCE.decode([*prompt, *answer])
    assert broken > 50


def test_each_token_is_placed_where_the_character_of_its_first_byte_begins(tokenizer: Tokenizer) -> None:
    for prompt, answer in sequences(tokenizer, 1000):
        ready = prepared(tokenizer, prompt, whole_runs=False, hidden=frozenset({answer[-1]}))
        placer, decoder = TokenOffsets(tokenizer, ready.text), ready.text.decoder
        placed = [each for token in answer if (each := placer.push(TokenLogprobs(token, -1.0, ())))]
        assert [each.logprobs.token_id for each in placed] == [token for token in answer if decoder.shows(token)]
        data = ready.text.certain.encode() + decoder.held
        for start, token in ((each.start, tokenizer.bytes_of(each.logprobs.token_id)) for each in placed):
            # The characters up to and with the first byte, of which it is the last one's.
            assert start == max(0, len((data + token[:1]).decode(errors="replace")) - 1 - len(ready.text.whole))
            data += token


def test_a_stop_ends_generation_with_the_token_that_completes_it(tokenizer: Tokenizer) -> None:
    chance = random.Random(3)
    shown = tokenizer.shown_bytes[True]
    found = 0
    for prompt, answer in sequences(tokenizer, 2000):
        text = complete(b"".join(shown[token] for token in answer))
        at = chance.randrange(max(1, len(text)))
        stops = [text[at : at + chance.randint(1, 4)] or "never", chance.choice(["😀", "\ufffd", "漢字"])]
        ends = StopTexts(stops, shown, len(prompt))
        tokens = np.array(prompt + answer, np.int32)
        shows = ShownText(stops)
        for count in range(1, len(answer) + 1):
            seen = complete(b"".join(shown[token] for token in answer[:count]))
            stopped = any(stop in seen for stop in stops)
            assert ends.matches(tokens[: len(prompt) + count]) is stopped
            if stopped:
                found += 1
                break
        if stopped:
            assert shows.push(seen) == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    assert found > 1000
