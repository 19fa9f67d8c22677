"""Adapters that requests choose: PEFT's own answers alone and beside others, turns, and prefixes that stay apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.model_runner import TURN
from edge_phi3.llama import ModelLoadError
from edge_phi3.llama.options import Lora
from tests.engine.conftest import Asked, running_engine
from tests.golden import adapters
from tests.golden.family import write_member
from tests.support.adapters import write_adapter

NAMES = ["", *adapters.ADAPTERS]
GOLDEN = adapters.recorded()["answers"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO_CHECKPOINT, tmp_path_factory.mktemp("demo") / "demo.gguf", outtype="f32").path


@pytest.fixture(scope="module")
def loras(demo: Path) -> dict[str, Lora]:
    return {
        name: Lora(convert(adapters.FOLDER / name, demo.with_name(f"{name}.gguf")).path, name=name)
        for name in adapters.ADAPTERS
    }


@pytest.fixture(scope="module")
def engine(demo: Path, loras: dict[str, Lora]) -> Iterator[Engine]:
    with running_engine(demo, lora=tuple(loras.values())) as engine:
        yield engine


def asked(engine: Engine, prompt: int, name: str = "", **kwargs: Any) -> Asked:
    tokens = engine.model.tokenizer.encode(adapters.PROMPTS[prompt])
    return Asked(engine, tokens, adapter=NAMES.index(name), **{"max_new_tokens": adapters.TOKENS} | kwargs)


def answer(one: Asked) -> list[int]:
    result = one.finished().result
    return result.sequences[0][result.prompt_length :].tolist()


def test_answers_are_pefts_own_alone_and_beside_others(engine: Engine) -> None:
    assert len({str(GOLDEN[name][0]) for name in NAMES}) == len(NAMES), "the adapters have an effect"
    cases = list(itertools.product(NAMES, range(len(adapters.PROMPTS))))
    for name, prompt in cases:
        assert answer(asked(engine, prompt, name)) == GOLDEN[name][prompt], "alone"
    together = [asked(engine, prompt, name) for name, prompt in cases]
    for (name, prompt), one in zip(cases, together, strict=True):
        assert answer(one) == GOLDEN[name][prompt], "beside others"


def test_an_adapter_without_a_name_is_everybodys_and_a_scale_of_0_is_none(demo: Path, loras: dict[str, Lora]) -> None:
    attention, mlp = loras.values()
    with running_engine(demo, lora=(Lora(attention.path), mlp._replace(scale=0.0))) as engine:
        for number in (0, 1):
            tokens = engine.model.tokenizer.encode(adapters.PROMPTS[0])
            one = Asked(engine, tokens, adapter=number, max_new_tokens=adapters.TOKENS)
            assert answer(one) == GOLDEN["attention"][0]


def test_prefixes_are_shared_with_the_same_adapter_alone(engine: Engine) -> None:
    for name in NAMES:
        cached = [asked(engine, 2, name).finished().cached_tokens for _ in range(2)]
        assert cached[1] > 0, name
    begun = [asked(engine, 1, name, scored_prompt=0, max_new_tokens=1).finished() for name in NAMES]
    assert len({str(event.prompt_logprobs) for event in begun}) == len(NAMES)


def test_a_turn_lasts_so_many_batches_or_until_its_requests_end(engine: Engine) -> None:
    runner = engine.model.runners[0]
    turns: list[tuple[int, int]] = []
    decode = runner.decode

    def watched(*arguments: Any) -> Any:
        turns.append((runner._adapter, len(runner.running)))
        return decode(*arguments)

    runner.decode = watched  # type: ignore[method-assign]
    try:
        short, *long = [asked(engine, 0, name, max_new_tokens=60, eos_token_id=[]) for name in NAMES]
        for one in (short, *long):
            one.finished()
    finally:
        runner.decode = decode  # type: ignore[method-assign]
    runs = [(adapter, len(list(group))) for adapter, group in itertools.groupby(adapter for adapter, _ in turns)]
    several = [(adapter, count) for (adapter, count), (_, left) in zip(runs, turns, strict=False)]
    assert {adapter for adapter, _ in runs[:3]} == {0, 1, 2}, "each waits for one turn of every other"
    assert all(count >= TURN or adapter not in {later for later, _ in runs[place + 1 :]}
               for place, (adapter, count) in enumerate(several))  # fmt: skip


def test_an_adapter_that_would_end_the_process_is_refused(tmp_path: Path) -> None:
    tied = convert(write_member(tmp_path, "phi-4-mini-instruct", layers=1), tmp_path / "tied.gguf", outtype="f32").path
    rows = np.zeros((2, 1), np.float32)
    embedding = write_adapter(tmp_path / "e.gguf", {"token_embd.weight": (rows, rows)})
    refused = pytest.raises(ModelLoadError, match=r"which tied\.gguf shares with its output")
    with refused, running_engine(tied, lora=(Lora(embedding),)):
        pass
