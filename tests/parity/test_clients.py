"""LangChain, LiteLLM, `llm`, Instructor, pydantic-ai and the Agents SDK ask a service, each as its users do.

pip install langchain-openai litellm llm instructor 'pydantic-ai-slim[openai]' openai-agents    # into one of their own
CLIENTS_PYTHON=~/clients/bin/python pytest -m parity tests/parity/test_clients.py
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

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
CALLERS = {
    "langchain": """
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(base_url=url, api_key="none", model="m", max_retries=0)
(call,) = chat.bind_tools([add], tool_choice="required", parallel_tool_calls=False).invoke(question).tool_calls
print(json.dumps(call["args"]))
""",
    "litellm": """
import litellm
tools = [{"type": "function", "function": {"name": "add", "parameters": Pair.model_json_schema()}}]
answer = litellm.completion(model="openai/m", api_base=url, api_key="none", tools=tools, tool_choice="required",
                            messages=[{"role": "user", "content": question}], num_retries=0)
print(answer.choices[0].message.tool_calls[0].function.arguments)
""",
    "instructor": """
import instructor, openai
client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none"))
print(client.chat.completions.create(model="m", response_model=Pair, max_retries=0,
                                     messages=[{"role": "user", "content": question}]).model_dump_json())
""",
    "pydantic-ai": """
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
model = OpenAIChatModel("m", provider=OpenAIProvider(base_url=url, api_key="none"))
print(Agent(model, output_type=Pair).run_sync(question).output.model_dump_json())
""",
    "agents": """
import agents, openai
agents.set_tracing_disabled(True)
model = agents.OpenAIResponsesModel("m", openai.AsyncOpenAI(base_url=url, api_key="none"))
called = []
@agents.function_tool
def add(left: Literal[1, 2, 3], right: Literal[4, 5]) -> int:
    called.append({"left": left, "right": right})
    return left + right
agent = agents.Agent("a", model=model, tools=[add], tool_use_behavior="stop_on_first_tool",
                     model_settings=agents.ModelSettings(tool_choice="required"))
agents.Runner.run_sync(agent, question)
print(json.dumps(called[0]))
""",
}
"""How each gets a call, at its defaults: it prints the arguments."""
PAIR = """
from typing import Literal
import pydantic
class Pair(pydantic.BaseModel):
    left: Literal[1, 2, 3]
    right: Literal[4, 5]
def add(left: Literal[1, 2, 3], right: Literal[4, 5]) -> int:
    'Add.'
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("clients")) as it:
        yield it


def printed(server: Server, program: str, folder: Path) -> str:
    """Return the last line that a client's program prints."""
    python = os.environ.get("CLIENTS_PYTHON")
    if python is None:
        pytest.skip("name an interpreter that has langchain-openai, litellm and others in CLIENTS_PYTHON")
    head = f"import json\nurl, question = {server.url + '/v1'!r}, {QUESTION!r}\n"
    environment = os.environ | {"LLM_USER_PATH": str(folder), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([python, "-c", head + program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", CALLERS)
def test_a_client_gets_a_call(server: Server, name: str, tmp_path: Path) -> None:
    arguments = json.loads(printed(server, PAIR + CALLERS[name], tmp_path))
    assert arguments["left"] in {1, 2, 3}
    assert arguments["right"] in {4, 5}


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_gets_the_answer_of_chat(server: Server, name: str, tmp_path: Path) -> None:
    found = json.loads(printed(server, CLIENTS[name], tmp_path))
    kwargs = {"do_sample": False, "max_new_tokens": 8}
    messages = [{"role": "user", "content": QUESTION}]
    text = server.post("/chat", messages=messages, generate_kwargs=kwargs).json()["Result"]
    assert found == [text, text]
