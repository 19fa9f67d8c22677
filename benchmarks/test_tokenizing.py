"""Our tokenizer against Hugging Face's ``tokenizers`` library, on the demo model's vocabulary.

    pytest benchmarks/test_tokenizing.py

Both read the same checkpoint; each case first checks that they agree. The library is timed in the same run, before and
after ours, and the fastest of many rounds counts on both sides. Times are processor seconds of this process, which has
one thread at work on either side: waiting for a busy machine is not counted.
"""

import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.timings import timings
from edge_phi3.bench.quants import evaluation_text
from edge_phi3.conversion.convert import convert
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama.model import Model

QUESTION = "<|user|>\nWhat does json.dumps do?<|end|>\n<|assistant|>\n"
pytestmark = pytest.mark.benchmark(timer=time.process_time)

TEXTS = {"a question": QUESTION, "16 KB of conversations": evaluation_text()}
ROUNDS = 50


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """The demo model."""
    path: Path = tmp_path_factory.mktemp("tokenizing") / "demo.gguf"
    model = Model(convert(DEMO_CHECKPOINT, path).path, n_gpu_layers=0)
    yield model
    model.close()


@pytest.fixture(scope="module")
def ours(model: Model) -> Tokenizer:
    """Its tokenizer as the service has it, which has seen the texts before."""
    return Tokenizer(model)


@pytest.fixture(scope="module")
def theirs() -> tokenizers.Tokenizer:
    """The library's, from the checkpoint's tokenizer.json."""
    return tokenizers.Tokenizer.from_file(str(DEMO_CHECKPOINT / "tokenizer.json"))


def least_seconds(call: Callable[[], object], number: int) -> float:
    """Time a call: the fastest of many rounds."""
    return min(timeit.repeat(call, time.process_time, number=number, repeat=ROUNDS)) / number


def measure(
    benchmark: BenchmarkFixture,
    case: str,
    tokens: int,
    mine: Callable[..., Any],
    other: Callable[[], Any],
    **options: Any,
) -> None:
    """Time both, and record the ratio."""
    number = 20 if tokens < 100 else 1
    before = least_seconds(other, number)
    benchmark.pedantic(mine, rounds=ROUNDS, iterations=number, warmup_rounds=2, **options)
    library = min(before, least_seconds(other, number))
    least = timings(benchmark).min
    benchmark.extra_info |= {
        "case": case,
        "tokens": tokens,
        "our_tokens_per_second": round(tokens / least),
        "tokenizers'_tokens_per_second": round(tokens / library),
        "ratio": round(library / least, 2),
    }
    print(f"\n{case}: {tokens} tokens, {library / least:.2f} times as long in the tokenizers library")


@pytest.mark.parametrize("name", TEXTS)
def test_encode(name: str, ours: Tokenizer, theirs: tokenizers.Tokenizer, benchmark: BenchmarkFixture) -> None:
    """Text to tokens, special tokens read as such."""
    text = TEXTS[name]
    tokens = ours.encode(text).tolist()
    assert tokens == theirs.encode(text, add_special_tokens=False).ids
    measure(
        benchmark,
        f"encode {name}",
        len(tokens),
        lambda: ours.encode(text),
        lambda: theirs.encode(text, add_special_tokens=False),
    )


def test_encode_new_words(model: Model, theirs: tokenizers.Tokenizer, benchmark: BenchmarkFixture) -> None:
    """The longer text, none of whose words was seen before."""
    name, text = list(TEXTS.items())[-1]
    tokens = len(theirs.encode(text, add_special_tokens=False).ids)
    measure(
        benchmark,
        f"encode {name}, all words new",
        tokens,
        lambda tokenizer: tokenizer.encode(text),
        lambda: theirs.encode(text, add_special_tokens=False),
        setup=lambda: ((Tokenizer(model),), {}),
    )


@pytest.mark.parametrize("name", TEXTS)
def test_decode(name: str, ours: Tokenizer, theirs: tokenizers.Tokenizer, benchmark: BenchmarkFixture) -> None:
    """Tokens to text, special tokens left out."""
    tokens = ours.encode(TEXTS[name]).tolist()
    assert ours.decode(tokens) == theirs.decode(tokens)
    measure(benchmark, f"decode {name}", len(tokens), lambda: ours.decode(tokens), lambda: theirs.decode(tokens))
