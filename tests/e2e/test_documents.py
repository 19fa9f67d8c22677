"""Every command on the pages that users read runs as it is written, unless the block tells what it needs.

The demo model stands for Phi-3-mini: a server on loopback publishes it under the preset's name, and the folder that the
pages convert holds it. The blocks of a page run in their order, in one folder.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_phi3.catalog import Catalog
from edge_phi3.demo import DEMO_CHECKPOINT
from tests.catalog.hub_server import HubServer, Repository
from tests.support.documents import PAGES, ROOT, Block, blocks, run, run_at
from tests.support.services import Server, serving

PRESET = "microsoft/Phi-3-mini-4k-instruct"
WITH_COMMANDS = [page for page in PAGES if any(block.runs for block in blocks(page.read_text(encoding="utf-8")))]


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


def run_command(command: str, folder: Path, server: Server) -> str:
    """Run a command of a page; a service is started on a free port, asked whether it is ready, and stopped."""
    if command.startswith("edge-phi3 serve") and "--print-config" not in command:
        store = Path(os.environ["EDGE_PHI3_STORE"])
        with serving(folder, *shlex.split(command, comments=True)[2:], store=store) as another:
            assert another.stop(signal.SIGTERM)[0] == 0, another.log.read_text()
        return ""
    return run_at(command, server.url)


def outputs_of(block: Block) -> dict[str, str]:
    """Return what a console block shows under each of its commands."""
    found: dict[str, str] = {}
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found[command := line.removeprefix("$ ")] = ""
        else:
            found[command] += line + "\n"
    return found


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page: Path, folder: Path, server: Server) -> None:
    printed = ""
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "text" and printed:
            assert block.text == printed
        printed = ""
        if not block.runs:
            continue
        if block.language == "python":
            printed = run(sys.executable, "-c", block.text)
        expected = outputs_of(block) if block.language == "console" else {}
        for command in block.commands():
            answer = run_command(command, folder, server)
            if expected.get(command):
                assert json.loads(answer) == json.loads(expected[command])


def test_a_command_that_fails_is_found(folder: Path, server: Server) -> None:
    with pytest.raises(AssertionError, match="does not exist"):
        run_command("edge-phi3 pull ./nothing", folder, server)
    with pytest.raises(AssertionError, match="404"):
        run_command("curl http://127.0.0.1:8080/nothing", folder, server)
