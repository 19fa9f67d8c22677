"""Adapters that requests choose: PEFT's own answers alone and beside others, turns, and prefixes that stay apart."""

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.model_runner import TURN
from edge_phi3.llama import ModelLoadError
from edge_phi3.llama.options import Lora
from tests.golden import adapters
from tests.golden.family import write_member
from tests.support.engines import Asked, running_engine
from tests.support.models import write_adapter

NAMES = ["", *adapters.ADAPTERS]
CASES = list(itertools.product(range(len(NAMES)), range(len(adapters.PROMPTS))))
GOLDEN = {case: adapters.recorded()["answers"][NAMES[case[0]]][case[1]] for case in CASES}


@pytest.fixture(scope="module")
def demo(model_file: Callable[[str, str], Path]) -> Path:
    """The demo model, with the adapters beside it."""
    demo = model_file("demo", "F32")
    for name in adapters.ADAPTERS:
        convert(adapters.FOLDER / name, demo.with_name(name))
    return demo


@pytest.fixture(scope="module")
def engine(demo: Path) -> Iterator[Engine]:
    with running_engine(demo, lora=[Lora(demo.with_name(name), name=name) for name in NAMES[1:]]) as engine:
        yield engine


def asked(engine: Engine, adapter: int, prompt: int, **kwargs: Any) -> Asked:
    tokens = engine.model.tokenizer.encode(adapters.PROMPTS[prompt])
    return Asked(engine, tokens, adapter=adapter, **{"max_new_tokens": adapters.TOKENS} | kwargs)


def answer(one: Asked) -> list[int]:
    result = one.finished().result
    return list(result.sequences[0][result.prompt_length :].tolist())


def test_answers_are_pefts_own_alone_and_beside_others(engine: Engine) -> None:
    assert len({str(GOLDEN[adapter, 0]) for adapter in range(len(NAMES))}) == len(NAMES), "each has an effect"
    assert {case: answer(asked(engine, *case)) for case in CASES} == GOLDEN
    together = {case: asked(engine, *case) for case in CASES}
    assert {case: answer(one) for case, one in together.items()} == GOLDEN


def test_an_adapter_without_a_name_is_everybodys_and_a_scale_of_0_is_none(demo: Path) -> None:
    lora = [Lora(demo.with_name("attention")), Lora(demo.with_name("mlp"), 0.0, "mlp")]
    with running_engine(demo, lora=lora) as engine:
        assert [answer(asked(engine, adapter, 0)) for adapter in (0, 1)] == [GOLDEN[1, 0]] * 2


def test_prefixes_are_shared_with_the_same_adapter_alone(engine: Engine) -> None:
    for turn in range(2):
        cached = [asked(engine, adapter, 2, max_new_tokens=turn + 1).finished() for adapter in range(len(NAMES))]
    assert all(event.cached_tokens > 0 for event in cached)
    with running_engine(engine.settings.model_path, lora=engine.settings.lora) as fresh:
        assert [asked(fresh, adapter, 2).finished().cached_tokens for adapter in range(len(NAMES))] == [0, 0, 0]


def test_an_adapter_goes_on_for_so_many_batches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, batches, everybody_is_there = engine.model.runners[0], list[int](), threading.Event()
    decode = runner.decode

    def watched(*given: Any, **options: Any) -> Any:
        everybody_is_there.wait()
        batches.append(runner._adapter)
        return decode(*given, **options)

    monkeypatch.setattr(runner, "decode", watched)
    asks = [asked(engine, adapter, 0, max_new_tokens=3 * TURN, eos_token_id=[]) for adapter in range(len(NAMES))]
    everybody_is_there.set()
    for one in asks:
        one.finished()
    turns = [(adapter, len([*batch])) for adapter, batch in itertools.groupby(batches)]
    several = turns[1:]  # the first began alone
    assert [adapter for adapter, _ in several[:6]] == [adapter for adapter, _ in several[:3]] * 2, turns
    assert all(count == TURN for _, count in several[:5]), turns


def test_an_adapter_that_would_end_the_process_is_refused(tmp_path: Path) -> None:
    tied = convert(write_member(tmp_path, "phi-4-mini-instruct", layers=1), tmp_path / "tied.gguf", outtype="f32").path
    embedding = write_adapter(tmp_path / "e.gguf", {"token_embd.weight": (np.ones((2, 1), np.float32),) * 2})
    refused = pytest.raises(ModelLoadError, match=r"which tied\.gguf shares with its output")
    with refused, running_engine(tied, lora=[Lora(embedding)]):
        pass


def test_an_activated_adapter_is_refused(demo: Path, tmp_path: Path) -> None:
    """It would change what stands before its invocation too, as if it were any other."""
    factors = {"blk.0.ffn_down.weight": (np.ones((2, 768), np.float32), np.ones((256, 2), np.float32))}
    activated = write_adapter(tmp_path / "a.gguf", factors, invocation=[5, 6])
    with pytest.raises(ModelLoadError, match="is an activated LoRA"), running_engine(demo, lora=[Lora(activated)]):
        pass
