"""docs/deployment.md walked without a cluster: its commands, values and claims, and what the chart makes of them."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from edge_phi3.catalog.reference import LocalCheckpoint, parse_reference
from edge_phi3.catalog.store import shelf_name
from tests.catalog.hub_server import HubServer, Repository
from tests.golden.checkpoints import write_checkpoint
from tests.helm.chart import Object, pod_of, preparer, render, render_texts, server
from tests.helm.processes import NOWHERE, command_of, environment_of, prepare, served
from tests.support.documents import blocks, run_at
from tests.support.services import PATIENCE, free_port

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")
REPOSITORY = "microsoft/Phi-3-mini-4k-instruct"
SMALL: Object = {"gpu": {"enabled": False}, "serve": {"options": {"ctx-size": 512, "parallel": 2}}}
"""What a machine without a GPU needs beside the values on the page."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("hub") / "tiny", hidden_size=256, dtype="bfloat16", shards=2)
    with HubServer() as server_:
        server_.repositories[REPOSITORY] = Repository.of(checkpoint)
        yield server_


def curl_of(text: str) -> str:
    """Return the one command that posts to /chat, its continued lines with it."""
    (command,) = re.findall(r"^ *(curl (?:.*\\\n)*.*/chat(?:.*\\\n)*.*)$", text, re.MULTILINE)
    return str(command)


def ask(command: str, address: str) -> set[str]:
    """Return the names in the answer to a curl command."""
    return set(json.loads(run_at(command, address)))


def test_the_default_release_downloads_once_and_the_curl_commands_work(hub: HubServer, tmp_path: Path) -> None:
    values = SMALL | {"model": {"endpoint": hub.endpoint}, "storage": {"mountPath": str(tmp_path)}}
    objects = render(values)
    assert server(objects)["args"][1] == server(render())["args"][1], "the model of a release without values"
    prepare(objects, 2)
    assert len(hub.gets("config.json")) == 1, "one downloads, the other waits"
    asked = len(hub.requests)
    with served(objects, HF_ENDPOINT=hub.endpoint) as first, served(objects, HF_ENDPOINT=hub.endpoint) as second:
        for address in (first, second):
            assert ask(curl_of(TEXT), address) == {"Result"}
        assert ask(curl_of(render_texts(values)["NOTES.txt"]), first) == {"Result"}
    assert len(hub.requests) == asked, "the service itself never asks the Hub"


@pytest.fixture(scope="module")
def carried(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `models/` that steps 1 to 3 make on a machine with internet."""
    store = tmp_path_factory.mktemp("internet") / "models"
    (command,) = re.findall(r"docker run --rm -v \S+ edge-phi3:\S+ (pull .*)", TEXT)
    image = {"name": "pull", "command": ["edge-phi3", *shlex.split(command)]}
    env = environment_of(image, EDGE_PHI3_STORE=str(store), HF_ENDPOINT=hub.endpoint)
    subprocess.run(command_of(image), env=env, check=True, timeout=PATIENCE, capture_output=True)
    # What the page says of it: the GGUF and its manifest, without the checkpoint.
    assert {path.suffix for path in store.rglob("*") if path.is_file()} == {".gguf", ".json", ".lock"}
    return store


def values_of_the_site(kind: str, replaced: dict[str, str]) -> Object:
    """Return one of the blocks for `site.yaml`, with what an operator fills in."""
    (text,) = [block.text for block in blocks(TEXT, "yaml") if kind in block.text and "kind:" not in block.text]
    for name, value in replaced.items():
        assert name in text
        text = text.replace(name, value)
    values: Object = yaml.safe_load(text)
    return values


def test_a_site_without_internet_with_a_claim(carried: Path, tmp_path: Path) -> None:
    volume = tmp_path / "models"
    # What `kubectl cp models/. loader:/models` does: tar on this side, tar in the pod.
    archive = subprocess.run(["tar", "-cf", "-", "models"], cwd=carried.parent, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-xmf", "-", "-C", tmp_path], input=archive, check=True)
    values = SMALL | values_of_the_site("existingClaim", {})
    values["storage"]["mountPath"] = str(volume)
    objects = render(values)
    assert "initContainers" not in pod_of(objects)
    before = {path: path.stat().st_mtime_ns for path in volume.rglob("*")}
    with served(objects, HF_ENDPOINT=NOWHERE) as address:
        assert ask(curl_of(TEXT), address) == {"Result"}
    assert {path: path.stat().st_mtime_ns for path in volume.rglob("*")} == before, "the volume may be read-only"


def test_a_site_without_internet_with_an_image(carried: Path) -> None:
    (file,) = carried.rglob("*.gguf")
    path = file.relative_to(carried).as_posix()
    assert re.fullmatch(r"[^/]+/Q4_K_M/[^/]+\.gguf", path), "the shape that the page gives"
    values = SMALL | values_of_the_site("imageReference", {"FOLDER/Q4_K_M/FILE.gguf": path})
    values["storage"]["mountPath"] = str(carried)
    values["model"]["name"] = values["model"]["name"].replace("/models", str(carried), 1)
    with served(render(values), HF_ENDPOINT=NOWHERE) as address:
        assert ask(curl_of(TEXT), address) == {"Result"}


def test_a_site_without_internet_with_a_file_server(hub: HubServer, carried: Path, tmp_path: Path) -> None:
    (file,) = carried.rglob("*.gguf")
    hub.repositories["site/files"] = Repository({file.name: file.read_bytes()})
    url = f"{hub.endpoint}/site/files/resolve/main/{file.name}"
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    replaced = {"https://files.site.example/phi3.gguf": url, "THE_SUM": checksum}
    values = SMALL | values_of_the_site("sha256", replaced)
    values["storage"] = {"mountPath": str(tmp_path)}
    objects = render(values)
    container = preparer(objects)
    script = tmp_path / "fetch_model.py"
    script.write_text(next(o["data"]["fetch_model.py"] for o in objects if o["kind"] == "ConfigMap"))
    container["command"][1] = str(script)
    prepare(objects, HF_ENDPOINT=NOWHERE)
    with served(objects, HF_ENDPOINT=NOWHERE) as address:
        assert ask(curl_of(TEXT), address) == {"Result"}


def test_a_pod_says_how_it_is_before_and_after_it_is_ready(tmp_path: Path) -> None:
    (program,) = re.findall(r'-- python -c "(.*)"$', TEXT, re.MULTILINE)
    values = SMALL | {"model": {"name": "demo", "prepare": {"mode": "none"}}, "storage": {"mountPath": str(tmp_path)}}
    container = server(render(values))
    port = free_port()
    command = command_of(container)
    command[command.index("--port") + 1] = str(port)
    # Until it has answered once, it waits for another process that makes the model.
    store = Path(environment_of(container)["EDGE_PHI3_STORE"])
    demo = parse_reference("demo")
    assert isinstance(demo, LocalCheckpoint)
    shelf = shelf_name(demo)
    (store / ".locks").mkdir()
    making = FileLock(store / ".locks" / f"{shelf}.lock")
    making.acquire()
    process = subprocess.Popen(command, env=environment_of(container), stderr=subprocess.DEVNULL)
    try:
        said: list[Object] = []
        while not said or said[-1] != {"status": "Healthy"}:
            assert process.poll() is None
            asked = subprocess.run(
                [sys.executable, "-c", program.replace("8080", str(port))], capture_output=True, text=True, check=False
            )
            if "ConnectionRefusedError" in asked.stderr:
                continue
            assert asked.returncode == 0, asked.stderr
            said.append(json.loads(asked.stdout))
            making.release()
    finally:
        making.release()
        process.terminate()
    assert process.wait(timeout=PATIENCE) == 0
    assert "detail" in said[0], "it answers while it converts and loads"
