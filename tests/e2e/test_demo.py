"""The main job, end to end: the demo model converted, quantised and served by the installed command."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_phi3.demo import DEMO_CHECKPOINT
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
    command = command.replace("http://127.0.0.1:8080", server.url)
    result = subprocess.run([*shlex.split(command), "-sS"], capture_output=True, check=True, timeout=PATIENCE)
    assert json.loads(result.stdout) == json.loads(answer)


def test_the_prompt_stands_before_the_answer_unless_it_is_not_wanted(server: Server) -> None:
    prompt = question("What does len do?")
    options: dict[str, Any] = {"generate_kwargs": {"do_sample": False}}
    full = chat(server, prompt=prompt, **options)
    new = chat(server, prompt=prompt, return_full_text=False, **options)
    assert full.status_code == new.status_code == 200
    assert full.json()["Result"] == prompt + new.json()["Result"]


def test_a_seed_repeats_and_another_differs(server: Server) -> None:
    def answer(seed: int) -> str:
        kwargs = {
            "do_sample": True,
            "seed": seed,
            "temperature": 2.0,
            "top_k": 200,
            "top_p": 0.99,
            "max_new_tokens": 24,
        }
        response = chat(server, prompt=question("What does print do?"), generate_kwargs=kwargs)
        assert response.status_code == 200
        text: str = response.json()["Result"]
        return text

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(6)}) > 1


def test_max_length_counts_the_prompt_and_max_new_tokens_does_not(server: Server) -> None:
    kwargs = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": []}
    prompt = question("What does len do?")
    total = chat(server, prompt=prompt, generate_kwargs=kwargs | {"max_length": 30}).json()
    assert sum(total["usage"].values()) == 30
    new = chat(server, prompt=prompt, generate_kwargs=kwargs | {"max_new_tokens": 30}).json()
    assert new["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "^Text generation parameter prompt required$"),
        ({"prompt": ""}, "^Text generation parameter prompt required$"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a", "promt": "b"}, "promt"),
        ({"prompt": "a", "generate_kwargs": {"max_lenght": 5}}, "max_lenght.*max_length"),
        ({"prompt": "a", "generate_kwargs": {"temperature": 0}}, "temperature"),
        ({"prompt": "a", "generate_kwargs": {"penalty_alpha": 0.6}}, "penalty_alpha"),
        ({"prompt": "a", "generate_kwargs": {"max_length": 1}}, "max_length"),
    ],
)
def test_wrong_requests_are_refused_by_name(server: Server, body: dict[str, Any], sentence: str) -> None:
    response = chat(server, **body)
    assert response.status_code == 400
    assert response.json().keys() == {"detail"}
    assert re.search(sentence, response.json()["detail"])


def test_a_body_that_is_no_json_is_refused(server: Server) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/chat", content=b'{"prompt":', headers=headers, timeout=PATIENCE)
    assert response.status_code == 400
    assert response.json().keys() == {"detail"}


def test_the_original_health_routes(server: Server) -> None:
    assert server.get("/").json() == {"message": "Server is running"}
    assert server.get("/healthz").json() == {"status": "Healthy"}


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
