"""`bench quants` on the demo model: what is measured, written, kept for the next time, and refused."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import msgspec
import numpy as np
import pytest

from edge_phi3.bench import BenchError, quants
from edge_phi3.bench.plots import plot_quality
from edge_phi3.bench.quant_worker import Job, measure
from edge_phi3.bench.quants import QuantBench, QuantReport, on_front, read_report
from edge_phi3.conversion import imatrix
from edge_phi3.conversion.quantize import quantize
from tests.support.cases import cases, tables
from tests.test_cli import Result, edge_phi3

FAST: dict[str, Any] = {"ctx_size": 64, "chunks": 3, "threads": 1, "prompt_tokens": 32, "generated_tokens": 8}
FAST |= {"repetitions": 2, "imatrix": "none"}
QUICK: list[str] = tables(__file__)["QUICK"]


@pytest.fixture(scope="module")
def model(model_file: Callable[[str, str], Path]) -> Path:
    return model_file("demo", "F16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results") / "new"


@pytest.fixture(scope="module")
def report(model: Path, folder: Path) -> QuantReport:
    return quants.run(QuantBench(model, folder, types=["Q2_K", "q8_0"], **FAST))


def bench(*arguments: str | Path) -> Result:
    return edge_phi3("bench", "quants", *map(str, arguments))


def test_every_figure_is_measured(report: QuantReport, model: Path) -> None:
    assert [item.type for item in report.measurements] == ["F16", "Q8_0", "Q2_K"]
    assert [item.reference for item in report.measurements] == [True, False, False]
    for item in report.measurements:
        assert item.speed.first_token > 0
        assert item.speed.prompt_per_second == pytest.approx(32 / item.speed.first_token)
        assert len(item.speed.turns) == 2
        assert min(rate for _, rate in item.speed.turns) <= item.speed.generated_per_second
        assert item.load_seconds > 0  # between two readings of a monotonic clock with a whole model's load between
        assert item.memory_peak > item.memory_before > 10e6
        assert item.quality.positions == 3 * 31
        assert item.quality.perplexity > 1
        assert item.quality.perplexity_error > 0
    f16, q8, q2 = report.measurements
    assert f16.bytes == model.stat().st_size
    assert f16.bytes > q8.bytes > q2.bytes
    assert (round(f16.bits_per_weight), round(q8.bits_per_weight, 1)) == (16, 8.5)
    near, far = q8.quality.divergence, q2.quality.divergence
    assert f16.quality.divergence is None
    assert near
    assert far
    assert 0 < near.mean < far.mean / 10
    assert far.mean < far.p99 <= far.max
    assert near.same_top >= far.same_top


def test_peak_memory_is_the_files_own(report: QuantReport, tmp_path: Path, model: Path) -> None:
    """This process, which starts the others, may be as large as it likes."""
    ballast = np.ones(400_000_000, np.uint8)
    again = quants.run(QuantBench(model, tmp_path, types=["Q8_0"], **FAST))
    assert ballast.sum() == 400_000_000
    for item in again.measurements:
        known = next(one for one in report.measurements if one.type == item.type)
        assert item.memory_peak < known.memory_peak + 100e6


def test_results_are_written_as_json_and_csv(report: QuantReport, folder: Path, tmp_path: Path) -> None:
    assert read_report(folder / "quants.json") == report
    with (folder / "quants.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["type"] for row in rows] == ["F16", "Q8_0", "Q2_K"]
    last = msgspec.to_builtins(report.measurements[-1])
    assert float(rows[-1]["divergence_p99"]) == last["quality"]["divergence"]["p99"]
    assert float(rows[-1]["generated_per_second"]) == last["speed"]["generated_per_second"]
    assert rows[0]["divergence_mean"] == ""
    assert not list(folder.glob("*Q8_0.gguf"))
    # A damaged report counts as none.
    for damaged in (json.dumps(json.loads((folder / "quants.json").read_text()) | {"format": 0}), "{"):
        (tmp_path / "quants.json").write_text(damaged)
        assert read_report(tmp_path / "quants.json") is None


def test_nothing_is_done_twice(report: QuantReport, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[str] = []

    def counting(job: Job, *arguments: object) -> object:
        jobs.append(Path(job.model).name)
        return measure(job, *arguments)  # type: ignore[arg-type] # passed on as it came

    monkeypatch.setattr(quants, "measure", counting)
    more = quants.run(QuantBench(model, folder, types=["Q4_0"], **FAST))
    assert jobs == ["demo-F16-Q4_0.gguf"]
    assert [item.type for item in more.measurements] == ["F16", "Q8_0", "Q4_0", "Q2_K"]
    assert [item for item in more.measurements if item.type != "Q4_0"] == report.measurements
    jobs.clear()
    assert quants.run(QuantBench(model, folder, types=["Q4_0"], **FAST)) == more
    assert jobs == []
    anew = quants.run(QuantBench(model, folder, types=["Q4_0"], again=True, **FAST))
    assert jobs == ["demo-F16.gguf", "demo-F16-Q4_0.gguf"]
    qualities = [{item.type: item.quality for item in found.measurements} for found in (more, anew)]
    assert qualities[0] == qualities[1]
    jobs.clear()
    other = quants.run(QuantBench(model, folder, types=["Q4_0"], **FAST | {"chunks": 2}))
    assert jobs == ["demo-F16.gguf", "demo-F16-Q4_0.gguf"]
    assert [item.type for item in other.measurements] == ["F16", "Q4_0"]
    assert len(list(folder.glob("*.npy"))) == 1


def test_the_command_converts_calibrates_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = imatrix.calibration_text()[:6000]
    monkeypatch.setattr(imatrix, "calibration_text", lambda: calibration)
    text = tmp_path / "text.txt"
    text.write_text("<|user|>\nWhat does len do?<|end|>\n<|assistant|>\nReturn the number of items.<|end|>\n" * 20)
    options = ("--type", "Q2_K_S", "--text", str(text), "--output-dir", str(tmp_path / "out"), *QUICK)
    result = bench("demo", *options, "--json")
    assert result.returncode == 0, result.stderr
    report = msgspec.json.decode(result.stdout, type=QuantReport)
    assert [(item.type, item.imatrix) for item in report.measurements] == [("F16", False), ("Q2_K_S", True)]
    assert report.text == "text.txt"
    assert report.model == "phi-3-demo"
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("."))
    assert [name for name in names if name.endswith(".gguf")] == ["phi-3-demo-F16.gguf", "phi-3-demo-imatrix.gguf"]
    for name in ("quality.svg", "speed.svg"):
        assert ET.parse(tmp_path / "out" / name).getroot().tag.endswith("svg")
    table = bench("demo", *options)
    assert table.returncode == 0
    assert "Q2_K_S is measured already" in table.stderr
    assert {"F16", "Q2_K_S"} <= {line.split()[0] for line in table.stdout.splitlines() if line.strip()}


def test_a_plot_is_the_same_bytes_again_and_tells_what_it_shows(report: QuantReport, tmp_path: Path) -> None:
    def drawn(count: int) -> bytes:
        plot_quality(report.measurements[:count], tmp_path / "plot.svg")
        return (tmp_path / "plot.svg").read_bytes()

    assert drawn(3) == drawn(3) != drawn(2)
    # The Pareto front holds what nothing beats.
    f16, q8, q2 = report.measurements
    worse, larger = (msgspec.structs.replace(item, bytes=item.bytes + 1) for item in (q2, q8))
    assert on_front([f16, q8, q2, worse, q2, larger]) == [True, True, True, False, True, False]
    with pytest.raises(BenchError, match="only the reference"):
        plot_quality(report.measurements[:1], tmp_path / "c.svg")
    with pytest.raises(BenchError, match="matplotlib writes"):
        plot_quality(report.measurements, tmp_path / "c.xyz")


@cases
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    quantize(model, tmp_path / "small.gguf", type="Q8_0")
    (tmp_path / "text.gguf").write_text("no model")
    result = bench(*([model] if arguments[0].startswith("-") else []), *arguments)
    assert result.returncode == 1
    assert words in " ".join(result.stderr.split())


def test_a_process_that_dies_is_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONMALLOC", "no-such-allocator")
    job = Job(model=model, text="x", logits=tmp_path / "x", reference=True)
    with pytest.raises(BenchError, match=r"The process that measured demo-F16\.gguf died"):
        measure(job)
