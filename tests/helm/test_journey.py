"""docs/deployment.md walked without a cluster: its commands, values and claims, and what the chart's containers run."""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from edge_phi3.catalog.manifest import MANIFEST_NAME
from edge_phi3.catalog.reference import LocalCheckpoint, parse_reference
from edge_phi3.catalog.store import shelf_name
from tests.catalog.hub_server import HubServer, Repository
from tests.golden.checkpoints import write_checkpoint
from tests.helm import chart
from tests.support.documents import ROOT, blocks, run_at
from tests.support.services import PATIENCE, Server, free_port, serving

TEXT = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
REPOSITORY = "microsoft/Phi-3-mini-4k-instruct"
SMALL: chart.Object = {"gpu": {"enabled": False}, "serve": {"options": {"ctx-size": 512, "parallel": 2}}}
"""What a machine without a GPU needs beside the values on the page."""

NOWHERE = "http://127.0.0.1:9"
"""Where nobody listens: the Hub of a site without internet."""

CONTENT = bytes(range(256)) * 40_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def command_of(container: chart.Object) -> list[str]:
    """Return the command of a container as it is on this machine: the image's programs are those of this Python."""
    command = [*container.get("command", ["edge-phi3"]), *container.get("args", [])]
    return [sys.executable, *(["-m", "edge_phi3"] if command[0] == "edge-phi3" else []), *command[1:]]


def environment_of(container: chart.Object, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDGE_PHI3_", "HF_"))}
    return kept | chart.environment(container) | more


def run_together(command: list[str], env: dict[str, str], count: int) -> list[tuple[int, str, str]]:
    """Run a command `count` times at once; return the exit code, stdout and stderr of each."""
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True) for _ in range(count)]
    ended = [process.communicate(timeout=PATIENCE) for process in running]
    return [(process.returncode, *written) for process, written in zip(running, ended, strict=True)]


def prepare(objects: list[chart.Object], count: int = 1, **env: str) -> tuple[str, list[str]]:
    """Run the init container that makes the model, `count` times at once; return what all printed, and their logs."""
    container = chart.preparer(objects)
    ended = run_together(command_of(container), environment_of(container, **env), count)
    assert {code for code, _, _ in ended} == {0}, ended
    (printed,) = {printed for _, printed, _ in ended}
    return printed.strip(), [log for _, _, log in ended]


@contextlib.contextmanager
def served(objects: list[chart.Object], keys: Path | None = None, **env: str) -> Iterator[Server]:
    """Run the container of the service, with `keys` for the Secret's file; its probes are content once it is ready."""
    container = chart.server(objects)
    arguments = [str(keys) if keys and part.startswith("/etc/edge-phi3/keys/") else part for part in container["args"]]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), *arguments[1:], environment=environment_of(container, **env)) as running,
    ):
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert running.get(container[probe]["httpGet"]["path"]).status_code == 200
        yield running
        assert running.stop()[0] == 0, running.log.read_text()


def times_of(volume: Path) -> dict[Path, int]:
    """Return when each file was written. The time of a manifest, where it can be changed, is that of its last use."""
    return {path: path.stat().st_mtime_ns for path in volume.rglob("*") if path.name != MANIFEST_NAME}


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


def assert_answers(running: Server, text: str = TEXT) -> None:
    """The page's request to /chat is answered."""
    assert set(json.loads(run_at(curl_of(text), running.url))) == {"Result"}


def test_replicas_that_start_together_make_the_default_model_once_and_all_serve(hub: HubServer, tmp_path: Path) -> None:
    volume, keys = tmp_path / "volume", tmp_path / "api-keys"
    volume.mkdir()
    keys.write_text("ci first\nsecond\n")
    storage = {"mountPath": str(volume), "accessMode": "ReadWriteMany"}
    values = SMALL | {"replicas": 2, "model": {"endpoint": hub.endpoint}, "storage": storage}
    objects, closed = chart.render(values), chart.render(values | {"auth": {"keys": ["ci first", "second"]}})
    assert chart.server(objects)["args"][1] == chart.server(chart.render())["args"][1], (
        "the model of a release without values"
    )
    printed, logs = prepare(objects, 2)
    assert Path(printed).is_relative_to(volume)
    assert len([log for log in logs if re.search("quantis|convert", log, re.IGNORECASE)]) == 1, "the other waited"
    assert len(hub.gets("config.json")) == 1
    requested, made = len(hub.requests), times_of(volume)
    (test_pod,) = chart.of_kind(closed, "Pod", "-test")
    (asking,) = chart.containers(test_pod)
    env = {"HF_ENDPOINT": hub.endpoint}
    with served(objects, None, **env) as first, served(closed, keys, **env) as second:
        for text in (TEXT, chart.render_texts(values)["NOTES.txt"]):
            assert_answers(first, text)
        # The test pod of `helm test` itself, with the service's address in place of the cluster's.
        wrong = tmp_path / "wrong"
        wrong.write_text("wrong")
        for given, status in ((keys, 0), (wrong, 1)):
            here = {"http://edge-phi3.ai.svc": second.url, "/etc/edge-phi3/keys/api-keys": str(given)}
            command = [here.get(part, part) for part in command_of(asking)]
            assert len(set(command) - set(command_of(asking))) == 2
            ((code, printed, log),) = run_together(command, environment_of(asking), 1)
            assert (code, bool(printed.strip())) == (status, status == 0), log
    assert len(hub.requests) == requested, "the service itself never asks the Hub"
    assert times_of(volume) == made, "serving changed nothing on the volume"


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


def program_of(objects: list[chart.Object]) -> str:
    """Return the chart's own program, which downloads a model from a URL."""
    (scripts,) = chart.of_kind(objects, "ConfigMap")
    return str(scripts["data"]["fetch_model.py"])


def values_of_the_site(kind: str, replaced: dict[str, str]) -> chart.Object:
    """Return one of the blocks for `site.yaml`, with what an operator fills in."""
    (text,) = [block.text for block in blocks(TEXT, "yaml") if kind in block.text and "kind:" not in block.text]
    for name, value in replaced.items():
        assert name in text
        text = text.replace(name, value)
    values: chart.Object = yaml.safe_load(text)
    return values


def test_a_site_without_internet_with_a_claim(carried: Path, tmp_path: Path) -> None:
    volume = tmp_path / "models"
    # What `kubectl cp models/. loader:/models` does: tar on this side, tar in the pod.
    archive = subprocess.run(["tar", "-cf", "-", "models"], cwd=carried.parent, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-xmf", "-", "-C", tmp_path], input=archive, check=True)
    values = SMALL | values_of_the_site("existingClaim", {})
    values["storage"]["mountPath"] = str(volume)
    objects = chart.render(values)
    assert "initContainers" not in chart.pod_of(objects)
    before = times_of(volume)
    with served(objects, HF_ENDPOINT=NOWHERE) as running:
        assert_answers(running)
    assert times_of(volume) == before, "the volume may be read-only"


def test_a_site_without_internet_with_an_image(carried: Path) -> None:
    (file,) = carried.rglob("*.gguf")
    path = file.relative_to(carried).as_posix()
    assert re.fullmatch(r"[^/]+/Q4_K_M/[^/]+\.gguf", path), "the shape that the page gives"
    values = SMALL | values_of_the_site("imageReference", {"FOLDER/Q4_K_M/FILE.gguf": path})
    values["storage"]["mountPath"] = str(carried)
    values["model"]["name"] = values["model"]["name"].replace("/models", str(carried), 1)
    with served(chart.render(values), HF_ENDPOINT=NOWHERE) as running:
        assert_answers(running)


def test_a_site_without_internet_with_a_file_server(hub: HubServer, carried: Path, tmp_path: Path) -> None:
    (file,) = carried.rglob("*.gguf")
    hub.repositories["site/files"] = Repository({file.name: file.read_bytes()})
    url = f"{hub.endpoint}/site/files/resolve/main/{file.name}?x=/y.gguf"
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    replaced = {"https://files.site.example/phi3.gguf": f'"{url}"', "THE_SUM": checksum}
    values = SMALL | values_of_the_site("sha256", replaced)
    values["storage"] = {"mountPath": str(tmp_path)}
    objects = chart.render(values)
    assert chart.server(objects)["args"][1] == str(tmp_path / "url" / f"{checksum[:12]}-{file.name}")
    chart.preparer(objects)["command"][1:2] = ["-c", program_of(objects)]
    prepare(objects, HF_ENDPOINT=NOWHERE)
    with served(objects, HF_ENDPOINT=NOWHERE) as running:
        assert_answers(running)


def test_a_pod_says_how_it_is_before_and_after_it_is_ready(tmp_path: Path) -> None:
    (program,) = re.findall(r'-- python -c "(.*)"$', TEXT, re.MULTILINE)
    values = SMALL | {"model": {"name": "demo", "prepare": {"mode": "none"}}, "storage": {"mountPath": str(tmp_path)}}
    container = chart.server(chart.render(values))
    port = str(free_port())
    command, env = command_of(container), environment_of(container)
    command[command.index("--port") + 1] = port
    # Until it has answered once, it waits for another process that makes the model.
    demo, locks = parse_reference("demo"), Path(env["EDGE_PHI3_STORE"]) / ".locks"
    assert isinstance(demo, LocalCheckpoint)
    locks.mkdir()
    making = FileLock(locks / f"{shelf_name(demo)}.lock")
    said: list[chart.Object] = []
    with making, subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        try:
            while not said or said[-1] != {"status": "Healthy"}:
                assert process.poll() is None
                question = [sys.executable, "-c", program.replace("8080", port)]
                ((code, printed, log),) = run_together(question, dict(os.environ), 1)
                if "ConnectionRefusedError" not in log:
                    assert code == 0, log
                    said.append(json.loads(printed))
                    making.release()
        finally:
            process.terminate()
        assert process.wait(timeout=PATIENCE) == 0
    assert "detail" in said[0], "it answers while it converts and loads"


@pytest.fixture
def files() -> Iterator[HubServer]:
    with HubServer() as running:
        running.repositories["site/files"] = Repository({"model.gguf": CONTENT})
        yield running


def fetch(files: HubServer, target: Path, *, name: str = "model", sha256: str = SHA256, count: int = 1) -> list[Any]:
    """Run the chart's program `count` times at once, without patience between attempts; return exit codes and logs."""
    url = f"{files.endpoint}/site/files/resolve/main/{name}.gguf"
    objects = chart.render({"model": {"url": "https://h.example/model.gguf", "sha256": sha256}})
    command = [sys.executable, "-c", program_of(objects), *chart.preparer(objects)["command"][2:4], url, str(target)]
    ended = run_together(command, os.environ | {"FETCH_PATIENCE": "0"}, count)
    return [(code, log) for code, _, log in ended]


def ranges_of(files: HubServer) -> list[str | None]:
    """Return which part of the file each request asked for."""
    return [request.range for request in files.requests if request.server == "cdn"]


def test_a_file_is_downloaded_once(files: HubServer, tmp_path: Path) -> None:
    target = tmp_path / "url" / "m.gguf"
    together = fetch(files, target, count=3)
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
    ((code, log),) = fetch(files, target)
    assert code == 0, log
    assert target.read_bytes() == CONTENT
    rest = "bytes=4000000-" if ranges else "bytes=2000000-"
    assert ranges_of(files) == ([f"bytes={there}-"] if there else [None, "bytes=2000000-", rest])


def test_another_content_or_none_is_refused_and_not_kept(files: HubServer, tmp_path: Path) -> None:
    for name, sha256, sentence in (
        ("model", "0" * 64, f"has the SHA-256 {SHA256}, not 0000"),
        ("other", SHA256, "other.gguf cannot be downloaded: HTTP Error 404"),
    ):
        ((code, log),) = fetch(files, tmp_path / "m.gguf", name=name, sha256=sha256)
        assert (code, sentence in log) == (1, True), log
        assert [path.name for path in tmp_path.iterdir()] == ["m.gguf.lock"]


# -- a model behind a certificate of the site's own: what `model.caBundle` mounts is what the programs trust


@pytest.fixture(scope="module")
def private_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Path]]:
    """A mirror of the Hub with a certificate that nobody knows, and that certificate."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("authority")
    words = f"{openssl} req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out ca.crt -subj /CN=site"
    command = [*words.split(), "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.crt", folder / "key.pem")
    with HubServer() as private:
        private._server.socket = context.wrap_socket(private._server.socket, server_side=True)
        private.endpoint, private.cdn = (url.replace("http:", "https:") for url in (private.endpoint, private.cdn))
        checkpoint = write_checkpoint(folder / "tiny", hidden_size=256)
        private.repositories[REPOSITORY] = Repository.of(checkpoint)
        private.repositories["site/files"] = Repository({"model.gguf": CONTENT})
        yield private, folder / "ca.crt"


@pytest.mark.parametrize("way", ["the Hub", "a URL"])
@pytest.mark.parametrize("known", [True, False])
def test_a_private_authority_is_trusted_where_it_is_given(
    private_hub: tuple[HubServer, Path], tmp_path: Path, way: str, known: bool
) -> None:
    private, certificate = private_hub
    model: chart.Object = {"caBundle": {"existingConfigMap": "trust"}} if known else {}
    if way == "the Hub":
        model["endpoint"] = private.endpoint
    else:
        model |= {"url": f"{private.endpoint}/site/files/resolve/main/model.gguf", "sha256": SHA256}
    objects = chart.render(SMALL | {"model": model, "storage": {"mountPath": str(tmp_path)}})
    container = chart.preparer(objects)
    if way == "a URL":
        container["command"][1:2] = ["-c", program_of(objects)]
    # Its mount: the file that the ConfigMap of the site holds.
    env = environment_of(container, FETCH_PATIENCE="0")
    env |= {name: str(certificate) for name, value in env.items() if value == "/etc/edge-phi3/ca/ca.crt"}
    ((code, _, log),) = run_together(command_of(container), env, 1)
    assert (code == 0) is known, log
    assert known or "CERTIFICATE_VERIFY_FAILED" in log
