"""The command line: help, exit codes, what goes where, what imports what, and signals."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import grimp
import pytest
from click.testing import CliRunner

from edge_phi3 import __version__
from edge_phi3.cli import VERBS, app
from edge_phi3.conversion.convert import convert
from edge_phi3.options import flag_of
from edge_phi3.settings import Settings
from tests.golden.checkpoints import write_checkpoint
from tests.support.cases import cases, tables

HEAVY = {"litestar", "pydantic", "numpy", "llama_cpp", "uvicorn", "gguf"}
WAITING: str = tables(__file__)["WAITING"]
SERVE = ("serve", "--port", "0")


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def edge_phi3(*arguments: str, **environment: str) -> Result:
    """Run the command in this process, with no option in the environment but those given."""
    clean = {name: None for name in os.environ if name.startswith("EDGE_PHI3_")}
    result = CliRunner().invoke(app, arguments, env=clean | {"COLUMNS": "200"} | environment, prog_name="edge-phi3")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Result(result.exit_code, result.stdout, result.stderr)


def test_version() -> None:
    command = [sys.executable, "-m", "edge_phi3", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"edge-phi3, version {__version__}\n"


@pytest.mark.parametrize(("verb", "text"), VERBS.items())
def test_each_verb_is_listed_documented_and_explained_with_an_example(verb: str, text: str) -> None:
    listed, explained = edge_phi3("--help"), edge_phi3(verb, "--help")
    assert listed.returncode == explained.returncode == 0
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert verb in listed.stdout
    assert f"`edge-phi3 {verb}" in page
    assert f"Example: `edge-phi3 {verb}" in explained.stdout
    for place in (listed.stdout, page):
        assert text in place


def test_serve_has_a_flag_for_every_option() -> None:
    text = edge_phi3("serve", "--help").stdout
    for name in Settings.model_fields:
        assert flag_of(name) in text
    assert "[default: 8080]" in text


@cases
def test_wrong_usage_has_exit_code_2(arguments: str, sentence: str | None) -> None:
    result = edge_phi3(*arguments.split())
    assert result.returncode == 2
    assert not arguments or result.stdout == ""
    assert sentence is None or result.stderr == f"edge-phi3: {sentence}\n"


def test_print_config_goes_to_stdout_and_comes_back_through_config(tmp_path: Path) -> None:
    flags = (
        "--lora c.gguf --cors-origin https://a.example --cors-origin https://b.example --max-body-size 1MiB "
        "--rate-limit 5/second --store models --log-prompts --metrics-prefix vllm:"
    )
    first = edge_phi3(
        "serve", "phi-3-mini-4k-instruct", "--print-config", "--lora", "a b.gguf=0.5", *flags.split(),
        EDGE_PHI3_PORT="1234",
    )  # fmt: skip
    assert (first.returncode, first.stderr) == (0, "")
    for line in ("port = 1234", 'lora = ["a b.gguf=0.5", "c.gguf=1"]', "log-prompts = true"):
        assert f"\n{line}\n" in first.stdout
    for name in Settings.model_fields:
        assert f"{name.replace('_', '-')} =" in first.stdout
    config = tmp_path / "config.toml"
    config.write_text(first.stdout)
    assert edge_phi3("serve", "--config", str(config), "--print-config").stdout == first.stdout
    assert edge_phi3("serve", "--print-config", EDGE_PHI3_CONFIG=str(config)).stdout == first.stdout
    changed = edge_phi3("serve", "--config", str(config), "--print-config", "--no-log-prompts").stdout
    assert "log-prompts = false" in changed


def test_convert_and_quantize_print_the_file_they_made(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=1)
    converted, quantised = tmp_path / "model-f16.gguf", tmp_path / "model-q8_0.gguf"
    quantize = ("quantize", str(converted), "-o", str(quantised), "--type", "q8_0")
    result = edge_phi3("convert", str(checkpoint), "-o", str(converted), "--outtype", "f16")
    assert (result.returncode, result.stdout) == (0, f"{converted}\n"), result.stderr
    assert "f16" in result.stderr
    result = edge_phi3(*quantize)
    assert (result.returncode, result.stdout) == (0, f"{quantised}\n"), result.stderr
    assert quantised.stat().st_size < converted.stat().st_size
    again = edge_phi3(*quantize)
    assert (again.returncode, again.stdout) == (1, "")
    refusal = f"edge-phi3: {quantised} exists; give --force to replace it, or another output path."
    assert again.stderr.splitlines()[-1] == refusal


def test_no_module_imports_itself_through_others() -> None:
    graph = grimp.build_graph("edge_phi3", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert imports["edge_phi3.__main__"] == {"edge_phi3.cli"}, "the graph is that of the package"
    TopologicalSorter(imports).prepare()  # raises an error that names the modules of a circle


@pytest.mark.parametrize("start", ["import edge_phi3", "from edge_phi3.cli import app; app(['--help'], 'edge-phi3')"])
def test_the_public_names_and_help_import_nothing_heavy(start: str) -> None:
    code = f"import atexit, sys; atexit.register(lambda: print({HEAVY} & {{*sys.modules}})); {start}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"


# -- signals: a service that is told to stop has not failed, and other verbs leave nothing unfinished


@contextlib.contextmanager
def running(patch: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command, changed, and wait until it says that it is where it should be."""
    command = [sys.executable, "-c", WAITING.format(patch=patch, arguments=arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as popen:
        try:
            assert popen.stdout is not None
            assert popen.stdout.readline() == "here\n"
            yield popen
        finally:
            popen.kill()


@cases
def test_a_service_that_is_told_to_stop_before_it_serves_exits_with_0(patch: str, number: int) -> None:
    with running(patch, *SERVE) as popen:
        popen.send_signal(number)
        assert popen.communicate(timeout=300)[1] == ""
    assert popen.returncode == 0


@pytest.mark.parametrize(
    "delay", [0.05, 0.5, *(pytest.param(each, marks=pytest.mark.soak) for each in (0.0, 0.2, 0.9))]
)
def test_a_service_that_is_told_to_stop_while_it_starts_exits_with_0(delay: float) -> None:
    with running("os.write(1, b'here\\n')", *SERVE) as popen:
        time.sleep(delay)
        # It may still be one step before the first line of `main`.
        while popen.poll() is None and not _catches(popen.pid, signal.SIGTERM):
            time.sleep(0.005)
        popen.send_signal(signal.SIGTERM)
        popen.communicate(timeout=300)
    assert popen.returncode == 0


def _catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


TERM, INT = (signal.SIGTERM, 143), (signal.SIGINT, 1)


@pytest.mark.parametrize(("verb", "number", "code"), [("convert", *TERM), ("quantize", *INT), ("pull", *TERM)])
def test_verbs_that_write_leave_no_unfinished_file(tmp_path: Path, verb: str, number: int, code: int) -> None:
    source, output = write_checkpoint(tmp_path / "checkpoint", layers=1), tmp_path / "out"
    if verb == "quantize":
        source = convert(source, tmp_path / "f32.gguf", outtype="f32").path
    options = {
        "convert": ["-o", f"{output}/model.gguf"],
        "quantize": ["-o", f"{output}/model.gguf", "--type", "q8_0"],
        "pull": ["--store", f"{output}", "--quant", "q8_0"],
    }

    def unfinished() -> list[Path]:
        return list(output.rglob(".*.partial"))

    # It stops where the file has been written and is still to be renamed.
    patch = "import edge_phi3.files\nedge_phi3.files._fsync = block"
    with running(patch, verb, str(source), *options[verb]) as popen:
        assert unfinished()
        popen.send_signal(number)
        errors = popen.communicate(timeout=300)[1]
    assert popen.returncode == code, errors
    assert "Traceback" not in errors
    assert unfinished() == []
    assert not list(output.rglob("*.gguf"))
