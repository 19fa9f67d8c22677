"""The main job, end to end: the demo model converted, quantised and served by the installed command."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_phi3.demo import DEMO_CHECKPOINT
from tests.support.documents import run_at
from tests.support.services import PATIENCE, Server, serving

ROOT = Path(__file__).parents[2]
QUESTIONS = json.loads((DEMO_CHECKPOINT / "questions.json").read_text(encoding="utf-8"))
ASK = re.compile(r"^\$ (curl .*)\n(.*)$", re.MULTILINE)


def chat(server: Server, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/chat", json=body, timeout=PATIENCE)


def question(text: str) -> str:
    return f"<|user|>\n{text}<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("quant", ["Q4_K_M", "F16"])
def test_the_card_questions_are_answered(tmp_path: Path, store: Path, quant: str) -> None:
    with serving(tmp_path, "--quant", quant, store=store) as server:
        right = [
            entry["question"]
            for entry in QUESTIONS
            if chat(
                server,
                prompt=question(entry["question"]),
                return_full_text=False,
                generate_kwargs={"do_sample": False},
            )
            .json()["Result"]
            .strip()
            == entry["answer"]
        ]
    assert len(QUESTIONS) == 10
    assert len(right) >= 8, f"answered only {right}"
    assert "What does json.dumps do?" in right


@pytest.mark.parametrize("index", [0, 1])
def test_the_readme_commands_give_the_readme_answers(server: Server, index: int) -> None:
    command, answer = ASK.findall((ROOT / "README.md").read_text(encoding="utf-8"))[index]
    assert json.loads(run_at(command, server.url)) == json.loads(answer)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_at_once_and_leaves_no_process(tmp_path: Path, store: Path, how: signal.Signals) -> None:
    with serving(tmp_path, "--grace-period", "3600", store=store) as server:
        assert chat(server, prompt="a", generate_kwargs={"max_new_tokens": 2}).status_code == 200
        assert server.stop(how)[0] == 0, server.log.read_text()
        children = subprocess.run(
            ["ps", "--ppid", str(server.process.pid), "-o", "pid="], capture_output=True, check=False
        )
        assert children.stdout.strip() == b""


def test_the_second_start_makes_nothing_anew(tmp_path: Path, server: Server, store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.gguf")}
    assert before
    with serving(tmp_path, store=store):
        pass
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.gguf")} == before
