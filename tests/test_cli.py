"""The command line: help, exit codes, what goes where."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge_phi3 import __version__
from edge_phi3.cli import VERBS, app
from edge_phi3.settings import Settings
from edge_phi3.settings_text import flag_of
from tests.golden import attention


def edge_phi3(*arguments: str, **environment: str) -> Result:
    """Run the command in this process, with no option in the environment but those given."""
    clean = {name: None for name in os.environ if name.startswith("EDGE_PHI3_")}
    result = CliRunner().invoke(app, arguments, env=clean | {"COLUMNS": "200"} | environment, prog_name="edge-phi3")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_version() -> None:
    command = [sys.executable, "-m", "edge_phi3", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"edge-phi3, version {__version__}\n"


@pytest.mark.parametrize(("verb", "text"), VERBS.items())
def test_each_verb_is_listed_documented_and_explained_with_an_example(verb: str, text: str) -> None:
    listed, explained = edge_phi3("--help"), edge_phi3(verb, "--help")
    assert listed.exit_code == explained.exit_code == 0
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", None),
        ("serv", None),
        ("serve --prot 1", None),
        ("convert", None),
        ("serve --port 99999", "--port: '99999' is not allowed; give a whole number from 0 to 65535."),
        (
            "quantize a.gguf -o b.gguf --tensor-type attn_v",
            "--tensor-type: 'attn_v' is not allowed; give PATTERN=TYPE, as in attn_v=q8_0.",
        ),
    ],
)
def test_wrong_usage_has_exit_code_2(arguments: str, sentence: str | None) -> None:
    result = edge_phi3(*arguments.split())
    assert result.exit_code == 2
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
    assert (first.exit_code, first.stderr) == (0, "")
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
    checkpoint = attention.write_model(tmp_path / "checkpoint", "4k")
    converted, quantised = tmp_path / "model-f16.gguf", tmp_path / "model-q8_0.gguf"
    quantize = ("quantize", str(converted), "-o", str(quantised), "--type", "q8_0")
    result = edge_phi3("convert", str(checkpoint), "-o", str(converted), "--outtype", "f16")
    assert (result.exit_code, result.stdout) == (0, f"{converted}\n"), result.stderr
    assert "f16" in result.stderr
    result = edge_phi3(*quantize)
    assert (result.exit_code, result.stdout) == (0, f"{quantised}\n"), result.stderr
    assert quantised.stat().st_size < converted.stat().st_size
    again = edge_phi3(*quantize)
    assert (again.exit_code, again.stdout) == (1, "")
    refusal = f"edge-phi3: {quantised} exists; give --force to replace it, or another output path."
    assert again.stderr.splitlines()[-1] == refusal
