"""``edge-phi3 fit``: the table, JSON, the command that it recommends, and what it refuses."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_phi3 import system_resources
from edge_phi3.catalog import PRESETS
from edge_phi3.commands import fit as module
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.quantize import quantize
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.planning.source import PRESET_CONFIGS
from edge_phi3.system_resources import Gpu
from tests.catalog.hub_server import HubServer, Repository
from tests.golden.checkpoints import longrope, write_checkpoint
from tests.support.cases import cases
from tests.test_cli import Result, edge_phi3

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(module, "gpus", list)
    monkeypatch.chdir(tmp_path)


def answer(*arguments: str) -> Any:
    result = edge_phi3("fit", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def recommended(result: Result) -> list[str]:
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.splitlines() if "edge-phi3 " in line]


def run(command: str, *more: str) -> str:
    """Run a recommended command, and return what it prints."""
    program, *arguments = shlex.split(command)
    assert program == "edge-phi3"
    result = edge_phi3(*arguments, *more)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_demo_fits_and_the_command_serves_it_as_planned() -> None:
    result = edge_phi3("fit", "demo", "--memory", "1GiB", "--ctx-size", "2048", "--kv-cache-type", "f32")
    assert "Q8_0" in result.stdout
    assert "KV cache" in result.stdout
    assert "context of 2,048 tokens for up to 16 sequences" in result.stderr
    (command,) = recommended(result)
    assert command == "edge-phi3 serve demo --quant Q8_0 --ctx-size 2048 --kv-cache-type f32"
    assert "ctx-size = 2048" in run(command, "--print-config")


def test_presets_need_neither_weights_nor_network_and_types_may_need_a_matrix() -> None:
    found = answer("phi-3-mini-4k-instruct", "--memory", "6GiB", "--reserve", "0")
    assert found["contexts"] == [4096]
    types = {row["type"]: row for row in found["types"]}
    assert (types["Q4_K_M"]["fits"], types["F16"]["fits"]) == (True, False)
    # 384 KiB a token, as docs/deployment.md has it.
    assert types["Q4_K_M"]["main_memory"]["kv_cache"] == 4096 * 384 * 1024
    assert found["recommended"]["commands"] == [
        f"edge-phi3 serve phi-3-mini-4k-instruct --quant {found['recommended']['type']}"
    ]
    result = edge_phi3("fit", "phi-3-mini-4k-instruct", "--memory", "8GiB", "--quant", "IQ2_M")
    first, second = recommended(result)
    assert first == "edge-phi3 pull phi-3-mini-4k-instruct --quant IQ2_M --imatrix auto --output-dir models"
    assert second.startswith("edge-phi3 serve models/phi-3-mini-4k-instruct-IQ2_M.gguf")
    both = answer("phi-3-mini-128k-instruct", "--memory", "24GiB", "--ctx-size", "16384", "--quant", "Q4_K_M")
    assert both["contexts"] == [8192, 16384]


def test_a_gpu_that_is_not_here_gets_the_layers_that_fit() -> None:
    options = ("--device", "gpu", "--memory", "2GiB", "--quant", "Q4_K_M")
    result = edge_phi3("fit", "phi-3-mini-4k-instruct", *options)
    assert "compute buffers are those of its CPU backend" in result.stderr
    found = answer("phi-3-mini-4k-instruct", *options)
    (row,) = found["types"]
    assert 0 < row["layers_on_gpu"] < found["layers"] == 33
    assert row["gpu"]["total"] <= 2 * GIB - found["machine"]["reserve"]
    (command,) = recommended(result)
    assert f"--n-gpu-layers {row['layers_on_gpu']}" in command
    assert f"n-gpu-layers = {row['layers_on_gpu']}" in run(command, "--print-config")


def test_this_machines_gpu_is_taken_and_one_of_several_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Gpu(index=0, name="A2", total=16 * GIB, used=4 * GIB, free=12 * GIB, load=0, temperature=40)
    monkeypatch.setattr(module, "gpus", lambda: [first])
    result = edge_phi3("fit", "phi-3-mini-4k-instruct", "--quant", "Q8_0")
    assert "For A2, 12,288.0 of 16,384.0 MiB free" in result.stderr
    assert "33 of 33" in result.stdout
    assert recommended(result) == ["edge-phi3 serve phi-3-mini-4k-instruct --quant Q8_0"]
    monkeypatch.setattr(module, "gpus", lambda: [first, first])
    several = edge_phi3("fit", "phi-3-mini-4k-instruct", "--quant", "Q8_0")
    assert recommended(several)[0].startswith("CUDA_VISIBLE_DEVICES=0 edge-phi3 serve")


def test_files_are_planned_as_they_are_or_as_they_could_be(tmp_path: Path) -> None:
    plain, small = tmp_path / "demo-f16.gguf", tmp_path / "demo-small.gguf"
    convert(DEMO_CHECKPOINT, plain, outtype="f16")
    quantize(plain, small, type="Q4_0")
    (row,) = answer(str(small))["types"]
    assert row["type"] == "demo-small"
    assert row["bits_per_weight"] == pytest.approx(4.81, abs=0.01)
    assert recommended(edge_phi3("fit", str(small))) == [f"edge-phi3 serve {small}"]
    refused = edge_phi3("fit", str(small), "--quant", "Q8_0")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is quantised already and is planned as it is; leave out --quant." in refused.stderr
    assert recommended(edge_phi3("fit", str(plain), "--quant", "F16")) == [f"edge-phi3 serve {plain}"]
    make, serve = recommended(edge_phi3("fit", str(plain)))
    assert make == f"edge-phi3 quantize {plain} -o {tmp_path}/demo-f16-Q8_0.gguf --type Q8_0"
    assert serve == f"edge-phi3 serve {tmp_path}/demo-f16-Q8_0.gguf"
    run(make)
    run(serve, "--print-config")


def test_of_a_repository_only_the_configuration_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", max_position_embeddings=131072, rope_scaling=longrope(16))
    with HubServer() as hub:
        hub.repositories["owner/tiny"] = Repository.of(checkpoint)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
        monkeypatch.delenv("HF_HUB_OFFLINE")
        assert answer("owner/tiny", "--ctx-size", "8192", "--parallel", "1")["contexts"] == [4096, 8192]
    files = {request.path.rsplit("/", 1)[-1] for request in hub.requests if request.sent}
    assert "config.json" in files
    assert not any(name.endswith(".safetensors") for name in files)
    assert not (tmp_path / "tiny" / "base.gguf").exists()


@cases
def test_what_cannot_be_planned_is_refused_in_a_sentence(arguments: list[str], code: int, words: str) -> None:
    Path("damaged.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    result = edge_phi3("fit", *arguments)
    assert result.returncode == code, result.stderr
    assert words in " ".join(result.stderr.split())


def test_main_memory_is_within_the_cgroups_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_resources, "_CGROUP", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    assert system_resources.available_memory() == 8 * GIB
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {GIB}\ninactive_file {GIB}\n")
    for limit, available in (("max", 8 * GIB), (str(4 * GIB), 2 * GIB)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert system_resources.available_memory() == available


def test_the_page_of_models_has_each_preset_as_it_is_planned() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+)` \| [\d.]+ B \| ([\d,]+) \| ([\d.]+) GiB \| ([\d.]+) GiB \|", page, re.MULTILINE)
    assert [row[0] for row in rows] == list(PRESETS)
    known: dict[str, list[float]] = {}
    for name, context, *sizes in rows:
        assert PRESET_CONFIGS[PRESETS[name]]["max_position_embeddings"] == int(context.replace(",", ""))
        shape = json.dumps(PRESET_CONFIGS[PRESETS[name]])
        if shape not in known:
            options = ("--device", "gpu", "--memory", "24GiB", "--ctx-size", "8192", "--quant", "Q4_K_M")
            (planned,) = answer(name, *options)["types"]
            known[shape] = [planned["gpu"][part] / GIB for part in ("weights", "total")]
        # Compute buffers differ a little from one CPU to another.
        assert [float(size) for size in sizes] == pytest.approx(known[shape], abs=0.1)


def test_logits_take_room_for_the_rows_that_choose_and_no_more() -> None:
    """Of 200,064 tokens: a row takes 0.76 MiB, so that those of a whole batch of 2,048 would take 1.5 GiB."""

    asked = ["phi-4-mini-instruct", "--memory", "64GiB", "--ctx-size", "4096", "--quant", "Q8_0"]

    def compute(*options: str) -> float:
        (planned,) = answer(*asked, *options)["types"]
        return float(planned["main_memory"]["compute"]) / 2**20

    rows = 200064 * 4 / 2**20
    few = compute("--batch-size", "512", "--parallel", "16")
    assert few < 150 * rows
    assert compute("--batch-size", "512", "--parallel", "200") - few == pytest.approx((200 - 16) * rows, rel=0.1)
