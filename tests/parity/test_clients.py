"""LangChain, LiteLLM and `llm` ask a service, each as its users do.

pip install langchain-openai litellm llm    # into an environment of their own
CLIENTS_PYTHON=~/clients/bin/python pytest -m parity tests/parity/test_clients.py
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cases import tables
from tests.support.services import Server, serving

pytestmark = pytest.mark.parity

QUESTION = "What does json.dumps do?"
CLIENTS: dict[str, str] = tables(__file__)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("clients")) as it:
        yield it


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_gets_the_answer_of_chat(server: Server, name: str, tmp_path: Path) -> None:
    python = os.environ.get("CLIENTS_PYTHON")
    if python is None:
        pytest.skip("name an interpreter that has langchain-openai, litellm and llm in CLIENTS_PYTHON")
    head = f"import json\nurl, question = {server.url + '/v1'!r}, {QUESTION!r}\n"
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, "-c", head + CLIENTS[name]], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    kwargs = {"do_sample": False, "max_new_tokens": 8}
    messages = [{"role": "user", "content": QUESTION}]
    text = server.post("/chat", messages=messages, generate_kwargs=kwargs).json()["Result"]
    assert json.loads(done.stdout.splitlines()[-1]) == [text, text]
