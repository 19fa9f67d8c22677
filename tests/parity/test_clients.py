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

import httpx
import pytest

from tests.support.services import Server, serving

pytestmark = pytest.mark.parity

QUESTION = "What does json.dumps do?"
CLIENTS = {
    "langchain": """
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(base_url=url, api_key="none", model="m", temperature=0, max_tokens=8, max_retries=0,
                  extra_body={"top_k": 5, "min_p": 0.1})
print(json.dumps([chat.invoke(question).content, "".join(piece.content for piece in chat.stream(question))]))
""",
    "litellm": """
import litellm
def ask(model, question, **more):
    messages = [{"role": "user", "content": question}]
    answer = litellm.completion(model=model, api_base=url, api_key="none", messages=messages, max_tokens=8,
                                temperature=0, num_retries=0, **more)
    return answer.choices[0].message.content
texts = [ask("openai/m", question), ask("hosted_vllm/m", question, top_k=3, repetition_penalty=1.0)]
try:
    ask("openai/m", question * 2000)
except litellm.ContextWindowExceededError:
    print(json.dumps(texts))
""",
    "llm": """
import llm, llm.default_plugins.openai_models as models
chat = models.Chat("m", model_name="m", api_base=url, key="none")
print(json.dumps([chat.prompt(question, temperature=0, max_tokens=8, stream=stream, key="none").text()
                  for stream in (False, True)]))
""",
}


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
    body = {"messages": [{"role": "user", "content": QUESTION}], "generate_kwargs": kwargs}
    text = httpx.post(f"{server.url}/chat", json=body, trust_env=False).json()["Result"]
    assert json.loads(done.stdout.splitlines()[-1]) == [text, text]
