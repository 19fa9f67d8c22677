"""The command line: help, exit codes, what goes where."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_phi3 import __version__
from edge_phi3.cli import VERBS, app
from edge_phi3.settings import Settings
from edge_phi3.settings_text import flag_of
from tests.golden import attention


@dataclass
class Result:
    """What a run of the command left."""

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


def test_help_names_every_verb_and_imports_none_of_the_heavy_parts() -> None:
    result = edge_phi3("--help")
    assert result.returncode == 0
    for verb, text in VERBS.items():
        assert verb in result.stdout
        assert text in result.stdout
    code = (
        "import sys\nfrom edge_phi3.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'litestar', 'pydantic', 'numpy', 'llama_cpp', 'uvicorn', 'gguf'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_an_example(verb: str) -> None:
    result = edge_phi3(verb, "--help")
    assert result.returncode == 0
    assert f"Example: `edge-phi3 {verb}" in result.stdout


def test_serve_has_a_flag_for_every_option() -> None:
    text = edge_phi3("serve", "--help").stdout
    for name in Settings.model_fields:
        assert flag_of(name) in text
    assert "[default: 8080]" in text


def test_the_documentation_has_every_verb() -> None:
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    for verb, text in VERBS.items():
        assert f"`edge-phi3 {verb}" in page
        assert text in page


@pytest.mark.parametrize("arguments", [["serv"], ["serve", "--prot", "1"], ["convert"], []])
def test_wrong_usage_has_exit_code_2(arguments: list[str]) -> None:
    result = edge_phi3(*arguments)
    assert result.returncode == 2
    if arguments:
        assert result.stdout == ""


def test_a_wrong_value_is_one_sentence_and_exit_code_2() -> None:
    result = edge_phi3("serve", "--port", "99999")
    assert result.returncode == 2
    assert result.stderr == "edge-phi3: --port: '99999' is not allowed; give a whole number from 0 to 65535.\n"
    result = edge_phi3("serve", EDGE_PHI3_FLASH_ATTN="maybe")
    assert result.returncode == 2
    assert result.stderr == "edge-phi3: EDGE_PHI3_FLASH_ATTN: 'maybe' is not allowed; give one of auto, on, off.\n"


def test_print_config_goes_to_stdout_and_comes_back_through_config(tmp_path: Path) -> None:
    first = edge_phi3(
        "serve", "phi-3-mini-4k-instruct", "--print-config", "--lora", "a.gguf", "--log-prompts", EDGE_PHI3_PORT="1234"
    )
    assert first.returncode == 0
    assert first.stderr == ""
    assert "port = 1234" in first.stdout
    assert 'lora = ["a.gguf=1"]' in first.stdout
    config = tmp_path / "config.toml"
    config.write_text(first.stdout)
    assert edge_phi3("serve", "--config", str(config), "--print-config").stdout == first.stdout
    assert edge_phi3("serve", "--print-config", EDGE_PHI3_CONFIG=str(config)).stdout == first.stdout
    changed = edge_phi3("serve", "--config", str(config), "--print-config", "--no-log-prompts").stdout
    assert "log-prompts = false" in changed


def test_convert_and_quantize_print_the_file_they_made(tmp_path: Path) -> None:
    checkpoint = attention.write_model(tmp_path / "checkpoint", "4k")
    converted = tmp_path / "model-f16.gguf"
    result = edge_phi3("convert", str(checkpoint), "-o", str(converted), "--outtype", "f16")
    assert (result.returncode, result.stdout) == (0, f"{converted}\n"), result.stderr
    assert "f16" in result.stderr
    quantised = tmp_path / "model-q8_0.gguf"
    result = edge_phi3("quantize", str(converted), "-o", str(quantised), "--type", "q8_0")
    assert (result.returncode, result.stdout) == (0, f"{quantised}\n"), result.stderr
    assert quantised.stat().st_size < converted.stat().st_size
    again = edge_phi3("quantize", str(converted), "-o", str(quantised), "--type", "q8_0")
    assert again.returncode == 1
    assert again.stdout == ""
    refusal = f"edge-phi3: {quantised} exists; give --force to replace it, or another output path."
    assert again.stderr.splitlines()[-1] == refusal


def test_a_wrong_tensor_type_is_wrong_usage(tmp_path: Path) -> None:
    result = edge_phi3("quantize", "a.gguf", "-o", str(tmp_path / "b.gguf"), "--tensor-type", "attn_v")
    assert result.returncode == 2
    assert result.stderr == "edge-phi3: --tensor-type: 'attn_v' is not allowed; give PATTERN=TYPE, as in attn_v=q8_0.\n"


def test_the_types_are_listed_on_stdout() -> None:
    result = edge_phi3("quantize", "--list")
    assert result.returncode == 0
    assert "Q4_K_M" in result.stdout
