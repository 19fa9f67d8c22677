"""The code blocks of the pages that users read, and what their commands name.

A block of the language ``sh`` is run by `tests/e2e/test_documents.py`, unless its first line tells the reader what it
needs that a test does not have: ``# Needs a cluster.`` What such a block names is checked all the same.
"""

import re
import shlex
import subprocess
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich_click as click

from edge_phi3.cli import app
from tests.support.services import PATIENCE

ROOT = Path(__file__).resolve().parents[2]

PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    *sorted(path for path in ROOT.glob("docs/*.md") if path.name != "benchmarks.md"),
    ROOT / "helm/edge-phi3/README.md",
]
"""The pages whose blocks are run or checked. ``docs/benchmarks.md`` is made by a program."""

LANGUAGES = {"sh", "console", "python", "text", "json", "yaml", "mermaid"}

NEEDS = re.compile(
    r"# Needs (?:a cluster|Docker|a GPU|a Jetson|the Hub|a C\+\+ compiler|a release of the stock preset|"
    r"a checkout's development installation|minutes)\b.*"
)
"""The first line of a block that is not run, with its reason."""

PROGRAMS = {
    "curl", "docker", "edge-phi3", "gunzip", "gzip", "helm", "kubectl", "lm_eval", "make", "mkdir", "pip", "printf",
    "python", "sudo",
}  # fmt: skip
"""What the commands of the pages may start with."""

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w+-]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(edge-phi3 [^`]+)`")
_VARIABLE = re.compile(r"[A-Z_]+=")
_FLAG = re.compile(r"--?[a-zA-Z][\w-]*")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language and text, dedented."""

    language: str
    text: str

    @property
    def runs(self) -> bool:
        """Whether a test runs it as it is written."""
        return self.language in {"sh", "console", "python"} and not NEEDS.match(self.text)

    def commands(self) -> list[str]:
        """Return its shell commands, continued lines joined, without comments, prompts and outputs."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        elif self.language != "sh":
            return []
        return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def blocks(text: str, language: str | None = None) -> list[Block]:
    """Return the fenced blocks of a page, in order; of one language only when it is named."""
    found = [Block(match["language"], textwrap.dedent(match["text"])) for match in _FENCE.finditer(text)]
    return [block for block in found if language in {None, block.language}]


def unfenced(text: str) -> str:
    return _FENCE.sub("", text)


def parts_of(command: str) -> Iterator[list[str]]:
    """Yield the words of each program that a command runs, one after another, without the variables in front."""
    words: list[str] = []
    for word in [*shlex.split(command, comments=True), ";"]:
        if word in {"|", "&&", "&", ";"}:
            if words:
                yield words
            words = []
        elif words or not _VARIABLE.match(word):
            words.append(word)


def mistakes(command: str) -> list[str]:
    """Return what is wrong with a command: its syntax, or a verb, flag, target, file or argument that is not there."""
    syntax = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
    if syntax.returncode:
        return [syntax.stderr.strip()]
    found: list[str] = []
    for words in parts_of(command):
        program = words[0]
        if program not in PROGRAMS:
            found.append(f"{program!r} is not one of the programs that the pages use")
        elif check := _CHECKS.get(program):
            found += check(words[1:])
    return found


def commands_of(text: str) -> Iterator[list[str]]:
    """Yield the words of each program that the blocks of a page run."""
    for block in blocks(text):
        for command in block.commands():
            yield from parts_of(command)


def page_mistakes(text: str) -> list[str]:
    """Return the `mistakes` of a page's commands, and of those `edge-phi3` commands that stand in its sentences."""
    inline = [command for command in _INLINE.findall(unfenced(text).replace("\n", " ")) if "VERB" not in command]
    named = [*inline, *(command for block in blocks(text) for command in block.commands())]
    return [f"{command}: {mistake}" for command in named for mistake in mistakes(command)]


def run(*arguments: str) -> str:
    """Run a program, which must not fail, and return what it printed."""
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.returncode == 0, f"{shlex.join(arguments)}\n{result.stdout}{result.stderr}"
    return result.stdout


def run_at(command: str, url: str) -> str:
    """Run a command of a page as it is written, but for the service's address; return what it printed."""
    here = command.replace("http://127.0.0.1:8080", url)
    return run(
        "bash", "-o", "pipefail", "-c", re.sub(r"\bcurl ", "curl --silent --show-error --fail --noproxy '*' ", here)
    )


def _edge_phi3_mistakes(words: list[str]) -> list[str]:
    command: Any = app
    context = click.Context(app)
    for word in words:
        if not isinstance(command, click.Group):
            break
        if word.startswith("-"):
            return []
        command = command.get_command(context, word)
        if command is None:
            return [f"edge-phi3 has no verb {word!r}"]
        command = command.make_context(word, [], resilient_parsing=True).command
    flags = {"-h", "--help"}
    for parameter in command.params:
        flags |= {*parameter.opts, *parameter.secondary_opts}
    given = [word.partition("=")[0] for word in words if _FLAG.fullmatch(word.partition("=")[0])]
    return [f"edge-phi3 {words[0]} has no flag {flag}" for flag in given if flag not in flags]


def _make_mistakes(words: list[str]) -> list[str]:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    return [f"make has no target {word}" for word in words if "=" not in word and word not in targets]


def _python_mistakes(words: list[str]) -> list[str]:
    if words[0] == "-m":
        module = ROOT.joinpath(*words[1].split("."))
        known = words[1] == "venv" or module.is_dir() or module.with_suffix(".py").is_file()
        return [] if known else [f"there is no module {words[1]}"]
    return [] if words[0] == "-c" or (ROOT / words[0]).is_file() else [f"there is no script {words[0]}"]


def _pip_mistakes(words: list[str]) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {extra for word in words for found in re.findall(r"\[(.*)\]", word) for extra in found.split(",")}
    return [f"edge-phi3 has no extra {extra}" for extra in extras - set(project["optional-dependencies"])]


def _docker_mistakes(words: list[str]) -> list[str]:
    if words[0] == "build":
        dockerfile = (ROOT / "Dockerfile.cuda").read_text(encoding="utf-8")
        arguments = [words[at + 1].partition("=")[0] for at, word in enumerate(words) if word == "--build-arg"]
        known = set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))
        return [f"Dockerfile.cuda has no argument {name}" for name in arguments if name not in known]
    if words[0] == "run":
        image = next(at for at, word in enumerate(words) if re.search(r"(^|/)edge-phi3:", word))
        return _edge_phi3_mistakes(words[image + 1 :])
    return []


_CHECKS = {
    "edge-phi3": _edge_phi3_mistakes,
    "make": _make_mistakes,
    "python": _python_mistakes,
    "pip": _pip_mistakes,
    "docker": _docker_mistakes,
}
