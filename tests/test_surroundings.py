"""What surrounds a verb: streams, descriptors, names of files, proxies, kills, cgroups: it ends in a sentence."""

import contextlib
import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from edge_phi3 import system_resources
from edge_phi3.conversion.convert import convert
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.files import DiskFullError, OutputExistsError, atomic_output, read_bounded
from edge_phi3.llama import backend
from edge_phi3.settings import SettingsError, read_toml
from tests.conversion.conftest import write_model
from tests.support.cases import cases
from tests.support.services import COMMAND, PATIENCE, serving

LATIN = b"mod\xe8le.gguf"


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell's line in which ``edge-phi3`` is the command."""
    line = line.replace("edge-phi3", shlex.quote(COMMAND), 1)
    return subprocess.run(
        ["sh", "-c", line], check=False, cwd=folder, capture_output=True, env=os.environ | environment, errors="replace"
    )


@cases
def test_a_verb_ends_in_a_sentence(line: str, code: int, sentence: str, tmp_path: Path) -> None:
    result = shell(line, tmp_path)
    assert (result.returncode, "Traceback" in result.stderr) == (code, False), result.stderr
    assert (result.stderr.splitlines() or [""])[-1].endswith(sentence), result.stderr


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "nonsense://127.0.0.1:9", "http://127.0.0.1:9"])
def test_a_proxy_of_any_kind(proxy: str, tmp_path: Path) -> None:
    empty = dict.fromkeys(("HF_ENDPOINT", "NO_PROXY", "HF_HUB_OFFLINE"), "")
    result = shell("edge-phi3 pull owner/name", tmp_path, ALL_PROXY=proxy, EDGE_PHI3_STORE=str(tmp_path), **empty)
    assert result.returncode == 1
    assert "edge-phi3: " in result.stderr.splitlines()[-1], result.stderr
    assert "should not have" not in result.stderr
    assert "https://" in result.stderr, "an empty HF_ENDPOINT is none"


def test_what_nobody_foresaw_is_a_sentence_that_says_where(tmp_path: Path) -> None:
    code = "import edge_phi3.commands.fit as fit, edge_phi3.cli as cli\n" \
        "fit._machine = lambda *a: {}['x']\ncli.app(['fit', 'demo'], prog_name='edge-phi3')"  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("edge-phi3: This should not have happened: KeyError('x') (commands/fit.py:")
    assert "Traceback" not in result.stderr


def test_names_that_are_no_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    write_model(tmp_path / "model.gguf", layers=1).rename(os.fsdecode(os.path.join(folder, LATIN)))  # noqa: PTH118 - bytes
    commands = (b"quantize X -o q-X --type q8_0", b"imatrix X -o i-X --chunks 1", b"fit X --quant q8_0 --device cpu")
    lines = [command.replace(b"X", LATIN).split() for command in commands]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([COMMAND, *line], cwd=tmp_path, **pipes) for line in lines]
    for line, process in zip(lines, started, strict=True):
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr
        assert line[0] == b"fit" or stdout == line[3] + b"\n", "scripts can go on with it"
    with serving(tmp_path, os.fsdecode(os.path.join(folder, LATIN))) as server:  # noqa: PTH118 - bytes
        assert server.get("/v1/models").json()["data"][0]["id"] == "mod\ufffdle"


@pytest.mark.parametrize("end", ["2>&-", "2>/dev/full", "2>&1 | head -c1 >first"])
def test_a_service_needs_no_stderr(end: str, tmp_path: Path, store: Path) -> None:
    script = tmp_path / "command"
    script.write_text(f'#!/bin/sh\ncd {shlex.quote(str(tmp_path))}\nexec {shlex.quote(COMMAND)} "$@" {end}\n')
    script.chmod(0o700)
    with serving(tmp_path, "demo", command=[str(script)], store=store) as server:
        assert server.get("/healthz").status_code == 200
        for child in psutil.Process(server.process.pid).children():
            child.terminate()  # behind a pipe the shell stays in front


def test_with_64_files_and_no_home_a_service_serves_and_lets_idle_connections_go(tmp_path: Path) -> None:
    script = tmp_path / "command"
    script.write_text(f'#!/bin/sh\nulimit -n 64\nHOME=/proc exec {shlex.quote(COMMAND)} "$@"\n')
    script.chmod(0o700)
    model = convert(DEMO_CHECKPOINT, tmp_path / "demo.gguf", outtype="bf16").path
    with serving(tmp_path, str(model), command=[str(script)]) as server, contextlib.ExitStack() as stack:
        assert "raise `ulimit -n`" in server.log.read_text()
        for _ in range(100):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        body = {"prompt": "a", "generate_kwargs": {"max_new_tokens": 4, "do_sample": False}}
        with ThreadPoolExecutor(8) as pool:
            statuses = [*pool.map(lambda _: server.post("/chat", **body).status_code, range(60))]
        assert statuses == [200] * 60


def test_a_file_that_is_cut_short_while_it_is_mapped(tmp_path: Path) -> None:
    code = "import mmap, os, edge_phi3.process as process; process.prepare(); file = open('x', 'r+b')\n" \
        "file.truncate(1 << 16); m = mmap.mmap(file.fileno(), 0); file.truncate(0); print(m[9000])"  # fmt: skip
    (tmp_path / "x").touch()
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("edge-phi3: A file was cut short while it was in use")


def test_what_a_killed_run_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    left, held, other = (tmp_path / f".{name}.partial" for name in ("out.0123abcd", "out.89abcdef", "out2.0123abcd"))
    for path in (left, held, other):
        path.touch()
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with atomic_output(tmp_path / "out") as temporary:
            temporary.write_text("x")
    assert sorted(tmp_path.iterdir()) == sorted([held, other, tmp_path / "out"])
    code = "import sys, os, pathlib, edge_phi3.files as files\n" \
        "with files.atomic_output(pathlib.Path('out'), force=True): os.kill(os.getpid(), 9)"  # fmt: skip
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert (killed.returncode, len([*tmp_path.glob(".out.*")])) == (-signal.SIGKILL, 1)
    with atomic_output(tmp_path / "out", force=True) as temporary:
        temporary.write_text("y")
        assert sorted(tmp_path.glob(".out.*")) == [temporary]


def test_a_signal_that_comes_while_llama_cpp_logs_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def terminate(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        monkeypatch.setattr(backend.logger, "log", lambda *_: signal.raise_signal(signal.SIGTERM))
        backend._LOG_CALLBACK(2, b"a line", None)
        with pytest.raises(SystemExit):
            time.sleep(PATIENCE)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("count", [30, pytest.param(800, marks=pytest.mark.soak)])
def test_no_mutant_of_a_file_ends_a_verb_but_by_a_sentence(count: int) -> None:
    """In a process of its own: one that forks must not have threads."""
    command = f"{sys.executable} -m tests.support.hostile_files --mutants {count} --jobs 2 --seed 7".split()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == f"{count} mutants, 0 failed\n", result.stdout + result.stderr


def test_no_output_takes_the_place_of_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for force in (False, True):
        with (
            pytest.raises(OutputExistsError, match="is a device or a pipe"),
            atomic_output(tmp_path / "pipe", force=force),
        ):
            raise DiskFullError("it would have been written to")


def test_reading_has_bounds(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    assert read_bounded(tmp_path / "file", 5) == b"12345"
    for path, limit in ((tmp_path / "file", 4), (tmp_path / "pipe", 9), (Path("/dev/zero"), 9), (tmp_path, 9)):
        with pytest.raises(OSError):  # noqa: PT011 - of several kinds
            read_bounded(path, limit)


@pytest.mark.parametrize(
    "text", [f"port = {'9' * 5000}", f"lora = {'[' * 50_000}", 'store = "a\\u0000b"', "\0", 'a = "\udc80"']
)
def test_settings_that_are_no_settings(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SettingsError, match=r"x\.toml is not valid TOML"):
        read_toml(tmp_path / "x.toml", ["store", "port", "lora"])


@cases
def test_what_cgroups_leave(
    membership: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "self").write_text(f"{membership}\n")
    monkeypatch.setattr(system_resources, "_CGROUP", tmp_path)
    monkeypatch.setattr(system_resources, "_MEMBERSHIP", tmp_path / "self")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(psutil, "cpu_count", lambda **_: 8)
    of_memory = any("memory" in name for name in files)
    assert (system_resources.available_memory() if of_memory else system_resources.usable_cores()) == expected
