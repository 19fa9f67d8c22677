"""pydantic-ai, the Agents SDK, LangChain, LiteLLM, `llm` and Instructor ask a service, each as its users do.

The first two are always there; the others are asked with the marker "parity".
lm-evaluation-harness, of TORCH_PYTHON, finds the log-likelihoods on it that its own Hugging Face backend finds.

pip install langchain-openai litellm llm instructor    # into one of their own
CLIENTS_PYTHON=~/clients/bin/python pytest -m parity tests/parity/test_clients.py
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_phi3.bench.quants import evaluation_text
from edge_phi3.conversion.convert import convert
from edge_phi3.demo import DEMO_CHECKPOINT
from tests.golden.checkpoints import long_context, write_checkpoint
from tests.parity.conftest import Peers
from tests.support.cases import cases, tables
from tests.support.service_requests import WORDS
from tests.support.services import Server, serving

QUESTION = "What does json.dumps do?"
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


def printed(server: Server, python: str, program: str, folder: Path) -> str:
    """Return the last line that a client's program prints."""
    head = f"import json\nurl, question = {server.url + '/v1'!r}, {QUESTION!r}\n"
    environment = os.environ | {"LLM_USER_PATH": str(folder), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([python, "-c", head + program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def other_clients() -> str:
    """Return the interpreter that has the other clients; a test that wants it is skipped where there is none."""
    python = os.environ.get("CLIENTS_PYTHON")
    if python is None:
        pytest.skip("name an interpreter that has langchain-openai, litellm and others in CLIENTS_PYTHON")
    return python


def assert_is_pair(arguments: dict[str, int]) -> None:
    assert arguments["left"] in {1, 2, 3}
    assert arguments["right"] in {4, 5}


@cases
def test_an_agent_gets_a_call(server: Server, name: str, program: str, tmp_path: Path) -> None:
    assert_is_pair(json.loads(printed(server, sys.executable, PAIR + program, tmp_path)))


@pytest.mark.parity
@cases
def test_a_client_gets_a_call(server: Server, name: str, program: str, tmp_path: Path) -> None:
    assert_is_pair(json.loads(printed(server, other_clients(), PAIR + program, tmp_path)))


@pytest.mark.parity
@cases
def test_a_client_gets_the_answer_of_chat(server: Server, name: str, program: str, tmp_path: Path) -> None:
    found = json.loads(printed(server, other_clients(), program, tmp_path))
    kwargs = {"do_sample": False, "max_new_tokens": 8}
    messages = [{"role": "user", "content": QUESTION}]
    text = server.post("/chat", messages=messages, generate_kwargs=kwargs).json()["Result"]
    assert found == [text, text]


TASK: str = tables(__file__)["TASK"]
TEXTS, TOLERANCE = 200, 1e-3
LONG, LONG_TOLERANCE = {"demo": (900, 1000, 1150, 1250), "128k": (2500, 4000, 4030, 4150, 5000)}, 1e-2
"""Words of contexts that end far behind the window, or the original context, after the `TEXTS` of up to 150 words; the
demo model's words have 2.5 tokens, the other's one. The difference grows
with the position, window or not: at 3,000 tokens the demo model's log-probabilities differ by 2e-4 on average."""
EXACT = ("--kv-cache-type", "f32", "--window-chunk", "1", "--threads", "1")


def texts_of(kind: str) -> Iterator[dict[str, str]]:
    """Yield contexts and continuations of up to 30 words."""
    chance = random.Random(kind)
    words = evaluation_text().split(" ") if kind == "demo" else chance.choices(WORDS, k=6000)
    for length in (*(chance.randint(1, 150) for _ in range(TEXTS)), *LONG[kind]):
        start = chance.randint(0, len(words) - length - 30)
        end = start + length
        continuation = " ".join(words[end : end + chance.randint(1, 30)])
        yield {"context": " ".join(words[start:end]), "continuation": " " + continuation}


def evaluate(peers: Peers, folder: Path, name: str, backend: str, **options: Any) -> list[tuple[float, bool]]:
    """Return the log-likelihood of each continuation, and whether its tokens are the likeliest."""
    given = ",".join(f"{key}={value}" for key, value in options.items())
    arguments = ["-m", "lm_eval", "--model", backend, "--model_args", given, "--tasks", "texts", "--include_path", "."]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    ended = subprocess.run(
        [peers.torch(), *arguments, "--output_path", name, "--log_samples", "--batch_size", "1"],
        cwd=folder, env=offline, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    (samples,) = (folder / name).rglob("samples_texts_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    return [(float(logprob), greedy in {True, "True"}) for line in lines for ((logprob, greedy),) in line["resps"]]


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["demo", "128k"])
def test_loglikelihoods_are_those_of_its_own_backend(kind: str, peers: Peers, tmp_path: Path) -> None:
    """On texts that end before and behind the window, or the original context, with F32 weights on both sides.

    The interpreter needs lm-eval[api] beside torch and transformers 4.49.0 (0.4.9.1: later ones want a later one).
    """
    if subprocess.run([peers.torch(), "-c", "import lm_eval.models"], capture_output=True, check=False).returncode:
        pytest.skip("lm-eval is missing; pip install 'lm-eval[api]' for the interpreter that TORCH_PYTHON names")
    (tmp_path / "texts.yaml").write_text(TASK, encoding="utf-8")
    (tmp_path / "texts.json").write_text(json.dumps([*texts_of(kind)]), encoding="utf-8")
    checkpoint, longest = DEMO_CHECKPOINT, 4096
    if kind != "demo":
        checkpoint, longest = write_checkpoint(tmp_path / "checkpoint", gain=2.0, **long_context()), 8192
    theirs = evaluate(
        peers, tmp_path, "theirs", "hf", pretrained=checkpoint, dtype="float32", attn_implementation="eager",
        max_length=longest, device="cpu",
    )  # fmt: skip
    model = convert(checkpoint, tmp_path / "model.gguf", outtype="f32").path
    with serving(tmp_path, str(model), "--ctx-size", str(longest), *EXACT) as server:
        address = f"{server.url}/v1/completions"
        ours = evaluate(
            peers, tmp_path, "ours", "local-completions", model="phi-3", base_url=address, tokenizer=checkpoint,
            max_length=longest, num_concurrent=4,
        )  # fmt: skip
    assert len(ours) == len(theirs) == TEXTS + len(LONG[kind])
    apart = [abs(one - other) for (one, _), (other, _) in zip(ours, theirs, strict=True)]
    usual, long = max(apart[:TEXTS]), max(apart[TEXTS:])
    print(f"{kind}: log-likelihoods differ by {usual:.1e} at most, those of long texts by {long:.1e}")
    assert usual < TOLERANCE
    assert long < LONG_TOLERANCE
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
