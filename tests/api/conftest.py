"""The real service in a thread, on a free port, with a small random model or with none."""

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace as Clock
from typing import Any

import openai
import pytest
import structlog

from edge_phi3.api.service import Loader, Say
from edge_phi3.conversion.convert import convert
from edge_phi3.engine import engine as engine_module
from edge_phi3.engine.core import EngineCore
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.pipeline import TextGenerationPipeline
from tests.golden import attention
from tests.support.in_process import Running, ready
from tests.support.services import PATIENCE

__all__ = ["GREEDY", "PATIENCE", "PROMPT", "Clock", "Running", "loader", "ready"]


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    """Only errors are logged: requests of a test are not news."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


@pytest.fixture
def _logging() -> Iterator[None]:
    """Let a test change how is logged."""
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.configure(**before)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi-3 of two layers: it answers at once, and nothing sensible."""
    folder = tmp_path_factory.mktemp("model")
    attention.write_model(folder, "4k")
    return convert(folder, folder / "random-4k.gguf", outtype="f32").path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the time, `now`, that the limits of requests go by in engines that the test makes."""
    clock = Clock(now=1000.0)
    monkeypatch.setattr(engine_module, "EngineCore", functools.partial(EngineCore, clock=lambda: clock.now))
    return clock


def loader(path: Path, **options: Any) -> Loader:
    """Return what loads a model with exact settings."""

    def load(_: Say) -> TextGenerationPipeline:
        settings: dict[str, Any] = {"kv_cache_type": "f32", "threads": 1, "parallel": 4, "ctx_size": 2048} | options
        engine = Engine(EngineSettings(path, **settings))
        engine.load()
        return TextGenerationPipeline(engine)

    return load


@pytest.fixture(scope="session")
def api(model_path: Path) -> Iterator[Running]:
    """A ready service with every option at its default."""
    with ready(loader(model_path)) as it:
        yield it


def openai_client(api: Running, key: str = "none") -> openai.OpenAI:
    """OpenAI's own client of a service, which does not try again."""
    return openai.OpenAI(base_url=f"http://127.0.0.1:{api.port}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(api: Running) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of the ready service."""
    with openai_client(api) as client:
        yield client


@pytest.fixture(scope="module")
def ask(client: openai.OpenAI) -> Callable[..., Any]:
    """What asks the ready service one question through OpenAI's client, greedily unless it is told otherwise."""

    def ask(**arguments: Any) -> Any:
        if "generate_kwargs" in arguments:
            arguments["extra_body"] = {"generate_kwargs": arguments.pop("generate_kwargs")}
        return client.chat.completions.create(**{"model": "any", "messages": USER, "temperature": 0} | arguments)

    return ask


@pytest.fixture(scope="module")
def ask_for(api: Running) -> Callable[..., dict[str, Any]]:
    """Ask the ready service for the first choice of an answer, with its usage; greedily unless told otherwise."""

    def ask(path: str = CHAT, **body: Any) -> dict[str, Any]:
        given = {"messages": USER} if path == CHAT else {"prompt": PROMPT}
        response = api.client.post(path, json={**given, "temperature": 0, "max_tokens": 12, **body})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        choice = answer["choices"][0]
        return {"text": choice.get("text", choice.get("message", {}).get("content")), **answer, **choice}

    return ask


def greedy(api: Running, **kwargs: Any) -> str:
    """Ask `/chat` the same question, and read its tokens character by character."""
    wanted = {"do_sample": False, "return_dict_in_generate": True, **kwargs}
    answer = api.chat(messages=USER, generate_kwargs=wanted).json()
    shown = api.service.pipeline.engine.model.tokenizer.shown_bytes[True]
    tokens = answer["sequences"][0][answer["usage"]["prompt_tokens"] :]
    return b"".join(shown[token] for token in tokens).decode("utf-8", "replace")


def spelling(api: Running, text: str) -> dict[str, Any]:
    """Return what makes a model begin its answer with a text, in tokens that have one character each."""
    pipeline = api.service.pipeline
    byte = {pipeline.tokenizer.bytes_of(token): token for token in reversed(range(pipeline.model.vocab_size))}
    tokens = [byte[bytes([value])] for value in text.encode()]
    return {"sequence_bias": [[tokens[:length], 1e3 * 2**length] for length in range(1, len(tokens) + 1)]}


def joined(answer: Any) -> list[tuple[str, str | None, list[Any]]]:
    """Return text, finish reason and tokens of each choice of an answer of OpenAI's API, whole or streamed."""
    found: dict[int, tuple[str, str | None, list[Any]]] = {}
    for part in [answer] if hasattr(answer, "choices") else answer:
        for choice in part.choices:
            message = getattr(choice, "message", None) or getattr(choice, "delta", None)
            text = (choice.text if message is None else message.content) or ""
            tokens = getattr(getattr(choice, "logprobs", None), "content", None) or []
            assert text or not tokens, "tokens come with their text"
            before, reason, earlier = found.get(choice.index, ("", None, []))
            found[choice.index] = (before + text, choice.finish_reason or reason, earlier + tokens)
    return [found[index] for index in sorted(found)]


USER: Any = [{"role": "user", "content": "What does json.dumps do?"}]
GREEDY = {"do_sample": False, "max_new_tokens": 8}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENDLESS = {"generate_kwargs": {"eos_token_id": -1}}
PROMPT = "<|user|>\nWhat does json.dumps do?<|end|>\n<|assistant|>\n"
