"""`scripts/convert_and_quantize.py`: what is made, what is skipped, and what a killed run leaves."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_phi3.catalog.build import make_files
from edge_phi3.catalog.reference import LocalCheckpoint
from edge_phi3.conversion.imatrix_file import read_imatrix
from edge_phi3.conversion.journey import MANIFEST_NAME
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.files import sha256_of
from edge_phi3.progress import SilentProgress

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_and_quantize.py"
OPTIONS = ("--quant", "Q4_K_M", "--quant", "Q2_K", "--quant", "Q8_0", "--imatrix-chunks", "1", "--threads", "1")
KILLS = int(os.environ.get("EDGE_PHI3_TEST_KILLS", "2"))
"""How often the journey is killed; raise it for a thorough run."""


def command(output: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "demo", *OPTIONS, "--output-dir", str(output), *more]


def run(output: Path, *more: str) -> str:
    """Run it to its end; return what it printed."""
    return subprocess.run(command(output, *more), stdout=subprocess.PIPE, text=True, check=True).stdout


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.glob("*.gguf")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A finished journey, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    started = time.monotonic()
    run(folder)
    return folder, time.monotonic() - started


def test_the_files_are_made_and_a_second_run_makes_none(whole: tuple[Path, float]) -> None:
    folder, _ = whole
    rows = {row["type"]: row for row in json.loads(run(folder, "--json"))}
    assert list(rows) == ["BF16", "imatrix", "Q4_K_M", "Q2_K", "Q8_0"]
    assert not any(row["made_now"] for row in rows.values())
    assert {Path(row["file"]).name: row["sha256"] for row in rows.values()} == hashes(folder)
    assert all(row["size"] == Path(row["file"]).stat().st_size for row in rows.values())
    assert rows["Q2_K"]["bits_per_weight"] < rows["Q4_K_M"]["bits_per_weight"] < rows["Q8_0"]["bits_per_weight"] < 9
    assert read_imatrix(Path(rows["imatrix"]["file"])).chunk_count == 1


def test_killed_at_any_moment_it_goes_on_to_the_same_files(whole: tuple[Path, float], tmp_path: Path) -> None:
    expected = hashes(whole[0])
    dice = random.Random(7)
    for _ in range(KILLS):
        process = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(dice.uniform(0.2, 1.0) * whole[1] / 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        made = hashes(tmp_path)
        assert made.items() <= expected.items()
        if made == expected:
            # Nothing would be left for the next kill to interrupt.
            for name in made:
                (tmp_path / name).unlink()
    run(tmp_path)
    assert hashes(tmp_path) == expected
    assert not list(tmp_path.glob(".*.partial"))


def test_what_changed_is_made_again(whole: tuple[Path, float], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole[0], folder)
    checkpoint = Path(shutil.copytree(DEMO_CHECKPOINT, tmp_path / "phi-3-demo"))

    def made_now() -> set[str]:
        wanted = LocalCheckpoint(checkpoint, "phi-3-demo")
        stops = make_files(wanted, ["Q4_K_M", "Q8_0"], folder, SilentProgress(), imatrix_chunks=1, threads=1)
        return {stop.made.type for stop in stops if stop.fresh}

    assert made_now() == set()
    damaged = folder / "phi-3-demo-Q8_0.gguf"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert made_now() == {"Q8_0"}
    (folder / "phi-3-demo-Q4_K_M.gguf").unlink()
    assert made_now() == {"Q4_K_M"}
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    assert made_now() == {"BF16", "imatrix", "Q4_K_M", "Q8_0"}
    (folder / MANIFEST_NAME).write_text("{")
    assert made_now() == {"BF16", "imatrix", "Q4_K_M", "Q8_0"}
