"""What the chart's containers run, run for real: pods that start together on one volume, and programs of the chart."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.catalog.hub_server import HubServer, Repository
from tests.helm.chart import CHART, containers, of_kind, preparer, render, server
from tests.helm.processes import command_of, environment_of, prepare, served
from tests.support.services import PATIENCE

FETCH = CHART / "files" / "fetch_model.py"
CONTENT = bytes(range(256)) * 40_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_replicas_that_start_together_make_the_model_once_and_both_serve(tmp_path: Path) -> None:
    keys = tmp_path / "api-keys"
    keys.write_text("first\nsecond\n")
    volume = tmp_path / "volume"
    volume.mkdir()
    values = {
        "model": {"name": "demo", "quant": "Q8_0"},
        "replicas": 2,
        "gpu": {"enabled": False},
        "storage": {"mountPath": volume.as_posix(), "accessMode": "ReadWriteMany"},
        "auth": {"keys": ["first", "second"]},
        "serve": {"options": {"parallel": 2, "ctx-size": 512, "log-format": "json"}},
    }
    objects = render(values)
    printed, logs = prepare(objects, 2)
    model = Path(printed)
    assert model.is_relative_to(volume)
    worked = [log for log in logs if re.search("quantis|convert", log, re.IGNORECASE)]
    assert len(worked) == 1, "one of them made the model, the other waited"
    made = {path: path.stat().st_mtime_ns for path in volume.rglob("*") if path.is_file()}

    (test_pod,) = of_kind(objects, "Pod", "-test")
    (ask,) = containers(test_pod)
    with served(objects, keys) as first, served(objects, keys) as second:
        for address in (first, second):
            for name in ("livenessProbe", "readinessProbe"):
                url = address + server(objects)[name]["httpGet"]["path"]
                assert httpx.get(url, timeout=PATIENCE).status_code == 200
            # The test pod of `helm test` itself, with the service's address in place of the cluster's.
            command = [part.replace("http://edge-phi3.ai.svc", address) for part in command_of(ask)]
            assert command != command_of(ask)
            for api_keys, status in ((keys.read_text(), 0), ("wrong", 1)):
                env = environment_of(ask, API_KEYS=api_keys)
                result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
                assert result.returncode == status, result.stderr
                assert (status == 0) == bool(result.stdout.strip())
    after = {path: path.stat().st_mtime_ns for path in volume.rglob("*") if path.is_file()}
    assert after == made, "serving changed nothing on the volume"


@pytest.fixture
def files() -> Iterator[HubServer]:
    with HubServer() as running:
        running.repositories["site/files"] = Repository({"model.gguf": CONTENT})
        yield running


def url_of(files: HubServer, name: str = "model") -> str:
    return f"{files.endpoint}/site/files/resolve/main/{name}.gguf"


def ranges_of(files: HubServer) -> list[str | None]:
    """Return which part of the file each request asked for."""
    return [request.range for request in files.requests if request.server == "cdn"]


def fetch(url: str, target: Path, sha256: str = SHA256, count: int = 1) -> list[tuple[int, str]]:
    """Run the chart's program as its container does, but without its patience between attempts.

    Returns:
        The exit code and the log of each of `count` runs at once.
    """
    values = {"model": {"url": "https://h.example/model.gguf", "sha256": SHA256}}
    prepare = preparer(render(values))
    command = [sys.executable, FETCH.as_posix(), *prepare["command"][2:]]
    assert command[2] == "--sha256"
    command[3:] = [sha256, url, target.as_posix()]
    env = os.environ | {"FETCH_PATIENCE": "0"}
    processes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(count)]
    logs = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    return [(process.returncode, log) for process, log in zip(processes, logs, strict=True)]


def test_the_program_in_the_config_map_is_the_file() -> None:
    (scripts,) = of_kind(render({"model": {"url": "https://h.example/m.gguf", "sha256": SHA256}}), "ConfigMap")
    assert scripts["data"]["fetch_model.py"].rstrip() == FETCH.read_text().rstrip()


def test_the_served_path_is_where_the_file_is_put() -> None:
    objects = render({"model": {"url": "https://h.example/a/m.gguf?x=/y.gguf", "sha256": SHA256}})
    prepare = preparer(objects)
    assert prepare["command"][-1] == server(objects)["args"][1] == f"/models/url/{SHA256[:12]}-m.gguf"


def test_a_file_is_downloaded_once(files: HubServer, tmp_path: Path) -> None:
    target = tmp_path / "url" / "m.gguf"
    together = fetch(url_of(files), target, count=3)
    assert [code for code, _ in together] == [0, 0, 0], together
    assert sum("was downloaded and checked" in log for _, log in together) == 1
    assert sum("is there already" in log for _, log in together) == 2
    assert target.read_bytes() == CONTENT
    assert ranges_of(files) == [None]


@pytest.mark.parametrize(("ranges", "there"), [(True, 0), (False, 0), (True, len(CONTENT))])
def test_a_download_that_was_cut_off_goes_on(files: HubServer, tmp_path: Path, ranges: bool, there: int) -> None:
    files.ranges = ranges
    target = tmp_path / "m.gguf"
    if there:
        target.with_name("m.gguf.partial").write_bytes(CONTENT[:there])
    else:
        files.cuts["model.gguf"] = [2_000_000, 2_000_000]
    ((code, log),) = fetch(url_of(files), target)
    assert code == 0, log
    assert target.read_bytes() == CONTENT
    rest = "bytes=4000000-" if ranges else "bytes=2000000-"
    assert ranges_of(files) == ([f"bytes={there}-"] if there else [None, "bytes=2000000-", rest])


@pytest.mark.parametrize(
    ("name", "sha256", "sentence"),
    [
        ("model", "0" * 64, f"has the SHA-256 {SHA256}, not 0000"),
        ("other", SHA256, "other.gguf cannot be downloaded: HTTP Error 404"),
    ],
)
def test_another_content_or_none_is_refused_and_not_kept(
    files: HubServer, tmp_path: Path, name: str, sha256: str, sentence: str
) -> None:
    ((code, log),) = fetch(url_of(files, name), tmp_path / "m.gguf", sha256)
    assert code == 1
    assert sentence in log
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf.lock"]
