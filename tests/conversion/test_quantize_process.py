"""The quantiser's child process: its log, its end before its time, and that nothing is left of it."""

import functools
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edge_phi3.conversion import quantize as module
from edge_phi3.conversion.quantize import QuantizeError, quantize
from edge_phi3.llama.quantizer import LogReader, TensorType
from tests.conversion.conftest import write_model


def quantisers() -> list[psutil.Process]:
    """Return the child processes that quantise."""
    return [child for child in psutil.Process().children() if "quantize_worker" in " ".join(child.cmdline())]


def kill_quantisers(*_: object) -> None:
    """Kill them, and wait for their end."""
    for child in quantisers():
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


def test_nothing_of_llama_cpps_log_is_printed(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quantize(source, tmp_path / "out.gguf", type="Q4_K_M")
    with pytest.raises(QuantizeError):
        quantize(tmp_path / "out.gguf", tmp_path / "again.gguf", type="Q2_K")
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_leaves_no_file_and_no_process(source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, _: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out.gguf", type="Q4_K_M", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert quantisers() == []


def test_a_killed_parent_takes_the_quantiser_with_it(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model.gguf", layers=2, hidden_size=1024, intermediate_size=2048)
    script = (
        "import sys, time; from pathlib import Path; from edge_phi3.conversion.quantize import quantize\n"
        "def stay(done, total, tensor): print(done, flush=True); time.sleep(3600)\n"
        "quantize(Path(sys.argv[1]), Path(sys.argv[2]), type='Q4_K_M', threads=1, progress=stay)"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "out.gguf")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "0\n"
        (worker,) = psutil.Process(parent.pid).children()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    worker.wait(timeout=300)
    assert not (tmp_path / "out.gguf").exists()


def test_a_disk_that_fills_up_is_told_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    # A limit on file sizes, which the child inherits, makes write() fail half way, as a full disk does.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(QuantizeError, match="the disk may be full"):
            quantize(source, tmp_path / "out.gguf", type="Q8_0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_of_the_quantiser_becomes_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # However fast the quantiser is: with its pipe full it has not said all, so it has not ended at the third tensor.
    source = write_model(tmp_path / "model.gguf", layers=30, intermediate_size=256)
    slow = functools.partial(subprocess.Popen, pipesize=4096)
    monkeypatch.setattr("edge_phi3.llama.child_process.subprocess.Popen", slow)
    told: list[str] = []

    def kill_at_the_third(_done: int, _total: int, tensor: str) -> None:
        told.append(tensor)
        if len(told) == 3:
            kill_quantisers()

    with pytest.raises(QuantizeError, match=r"quantiser died at the tensor .*: SIGKILL"):
        quantize(source, tmp_path / "output" / "out.gguf", type="Q4_K_M", progress=kill_at_the_third)
    assert list((tmp_path / "output").iterdir()) == []


def test_a_quantiser_that_dies_idle_is_told(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # After the dry run, and before the real one.
    monkeypatch.setattr(module, "check_plan", kill_quantisers)
    with pytest.raises(QuantizeError, match=r"could not quantise .*quantiser died before the first tensor: SIGKILL"):
        quantize(source, tmp_path / "out.gguf", type="Q4_K_M")
    assert list(tmp_path.iterdir()) == []
    assert quantisers() == []


LOG = Path(__file__).with_name("quantizer_log.txt").read_text("utf-8")


@pytest.mark.parametrize("piece", [1, 7, 64, 10_000])
def test_the_log_is_read_however_it_is_cut(piece: int) -> None:
    names = ("f32", "f16", "q4_K")
    log = LogReader({name.lower(): TensorType(name, 0, 1, 1, False, True, False) for name in names})
    steps = [step for start in range(0, len(LOG), piece) for step in log.feed(LOG[start : start + piece])]
    made = ("token_embd", "q4_K"), ("a_name_that_is_longer_than_its_column_is_wide", "f32"), ("blk.0.ffn_up", "q4_K")
    found = [(step.name.removesuffix(".weight"), step.target and step.target.name) for step in steps]
    assert found == [each for name, target in made for each in ((name, None), (name, target))] + [("x", None)]
    assert {step.shape[0] for step in steps} == {256}
    assert (log.count, log.fallbacks, log.error) == (1, 2, "disk")
