"""The demo model answers as its card says, and every command on the pages runs as written, or tells what it needs.

The demo model stands for Phi-3-mini: a server on loopback publishes it under the preset's name, and the folder that the
pages convert holds it. The blocks of a page run in their order, in one folder.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edge_phi3.catalog import Catalog
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.settings import Settings
from tests.catalog.hub_server import HubServer, Repository
from tests.golden.adapters import FOLDER as ADAPTERS
from tests.support.documents import PAGES, ROOT, blocks, run, run_at
from tests.support.models import write_fine_tune
from tests.support.services import PATIENCE, Server, serving

PRESET = "microsoft/Phi-3-mini-4k-instruct"
FINE_TUNE = "my-fine-tune"
SHOWN = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)+)", re.MULTILINE)
"""A command of a console block, and what the block shows under it."""

WITH_COMMANDS = [page for page in PAGES if any(block.runs for block in blocks(page.read_text(encoding="utf-8")))]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Server]:
    """Yield the demo model, served at its defaults."""
    with serving(tmp_path_factory.mktemp("server"), store=store) as running:
        yield running


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """The Hub, with the demo model under the preset's name."""
    with HubServer() as running:
        running.repositories[PRESET] = Repository.of(DEMO_CHECKPOINT)
        yield running


@pytest.fixture
def folder(tmp_path: Path, store: Path, server: Server, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a page, with the files that it takes for granted."""
    assert server.url, "the server has put the demo model into the store"
    shutil.copytree(DEMO_CHECKPOINT, tmp_path / "Phi-3-mini-4k-instruct")
    write_fine_tune(tmp_path / FINE_TUNE)
    shutil.copytree(ADAPTERS / "mlp", tmp_path / "tales")
    (tmp_path / "model-Q4_K_M.gguf").symlink_to(Catalog(store).resolve("demo").path)
    (tmp_path / "my-texts.txt").write_text("<|user|>\nWhat does len do?<|end|>\n" * 300, encoding="utf-8")
    (tmp_path / "keys.txt").write_text("a-key\n", encoding="ascii")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("EDGE_PHI3_STORE", str(store))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    return tmp_path


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page: Path, folder: Path, server: Server, store: Path) -> None:
    printed, url = "", server.url
    with contextlib.ExitStack() as until_the_end:
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.language == "text" and printed:
                assert block.text == printed
            printed = ""
            if not block.runs:
                continue
            if block.language == "python":
                printed = run(sys.executable, "-c", block.text)
            expected = dict(SHOWN.findall(block.text)) if block.language == "console" else {}
            for command in block.commands():
                if command.startswith("edge-phi3 serve") and "--print-config" not in command:
                    options = shlex.split(command, comments=True)[2:]
                    another = until_the_end.enter_context(serving(folder, *options, store=store))  # on a free port
                    if FINE_TUNE in options:  # it answers what follows
                        url = another.url
                    else:
                        assert another.stop(signal.SIGTERM)[0] == 0, another.log.read_text()
                    continue
                answer = run_at(command, url)
                if command in expected:
                    assert json.loads(answer) == json.loads(expected[command])


@pytest.mark.parametrize("quant", ["Q4_K_M", pytest.param("F16", marks=pytest.mark.soak)])
def test_the_card_questions_are_answered(tmp_path: Path, store: Path, server: Server, quant: str) -> None:
    def answer(question: str) -> str:
        body = {"prompt": f"<|user|>\n{question}<|end|>\n<|assistant|>\n", "return_full_text": False}
        body |= {"generate_kwargs": {"do_sample": False}}
        text: str = httpx.post(f"{another.url}/chat", json=body, timeout=PATIENCE).json()["Result"]
        return text.strip()

    questions = json.loads((DEMO_CHECKPOINT / "questions.json").read_text(encoding="utf-8"))
    default = contextlib.nullcontext(server) if quant == Settings().quant else None
    with default or serving(tmp_path, "--quant", quant, store=store) as another:
        right = [entry["question"] for entry in questions if answer(entry["question"]) == entry["answer"]]
    assert len(questions) == 10
    assert len(right) >= 8, f"answered only {right}"
    assert "What does json.dumps do?" in right


def test_what_the_turns_of_a_chat_share_is_found_again(server: Server) -> None:
    topics = "json.dumps json.loads os.path.join re.sub len math.sqrt time.sleep sorted random.choice shutil.copy"
    system = "You explain, in a sentence or two, what the functions of Python's standard library do."
    messages = [{"role": "system", "content": system}]
    prompts = cached = 0
    for turn, topic in enumerate(topics.split(), 1):
        messages.append({"role": "user", "content": f"What does {topic} do?"})
        body = {"model": "any", "messages": messages, "temperature": 0, "max_tokens": 64}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE).json()
        messages.append(answer["choices"][0]["message"])
        if turn > 1:
            prompts += answer["usage"]["prompt_tokens"]
            cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0.9 * prompts
