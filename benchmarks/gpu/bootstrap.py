"""From a bare machine to one that can run ``benchmarks.gpu.run``: an environment out of the bundle, without network.

Only the standard library, for nothing else is there yet. The bindings of llama-cpp-python are installed without
libraries; the part "build" compiles those, once for the bindings and the programs to compare with.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from benchmarks.gpu.options import Options, parse

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Make the environment unless it is there, and run in it."""
    if sys.version_info < (3, 11):  # noqa: UP036 - it runs before anything has checked
        sys.exit("edge-phi3 needs Python 3.11 or newer; name one with PYTHON=/path/to/python3.11.")
    options = parse()
    python = _python_for(options)
    # One search path for all that runs: this product's own folder, which is not installed.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PATH"] = f"{Path(python).parent}:{os.environ['PATH']}"
    os.execve(python, [python, "-m", "benchmarks.gpu.run", *sys.argv[1:]], environment)


def _python_for(options: Options) -> str:
    """Return the interpreter that runs everything."""
    if options.bundle is not None:
        return str(environment_of_bundle(options.bundle, options.work, options.python or sys.executable))
    own = ROOT / ".venv" / "bin" / "python"
    return options.python or (str(own) if own.exists() else sys.executable)


def environment_of_bundle(bundle: Path, work: Path, python: str) -> Path:
    """Return the interpreter of a virtual environment with all wheels of the bundle, made the first time.

    Args:
        bundle: folder that ``prepare.sh`` made.
        work: where environment and source go.
        python: what makes it; of the version that the bundle was made for.
    """
    folder = work / "environment"
    found = folder / "bin" / "python"
    done = folder / "done"
    if done.exists():
        return found
    _refuse_other_python(bundle, python)
    shutil.rmtree(folder, ignore_errors=True)
    wheels = sorted(str(path) for path in (bundle / "wheels").glob("*.whl"))
    pip = next((path for path in wheels if Path(path).name.startswith("pip-")), None)
    if pip is None:
        sys.exit(f"{bundle}/wheels holds no pip; make the bundle anew.")
    work.mkdir(parents=True, exist_ok=True)
    # Debian's python3 has no ensurepip, so that the bundle's own pip installs; it runs out of its wheel.
    _run(python, "-m", "venv", "--without-pip", str(folder))
    install = [str(found), f"{pip}/pip", "install", "--no-index", "--no-deps", "--quiet", "--disable-pip-version-check"]
    _run(*install, *wheels)
    source = unpack_source(bundle, work)
    # Without the libraries, which the part "build" compiles and links here.
    bindings = {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF", "PATH": f"{found.parent}:{os.environ['PATH']}"}
    _run(*install, "--no-build-isolation", str(source), environment=bindings)
    done.touch()
    return found


def _refuse_other_python(bundle: Path, python: str) -> None:
    """End the program when the bundle's wheels are for another Python or another architecture."""
    made_for = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    code = "import platform, sys; print(*sys.version_info[:2], sep='.'); print(platform.machine())"
    here = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    if here != [made_for["python"], made_for["machine"]]:
        sys.exit(
            f"{bundle} is for Python {made_for['python']} on {made_for['machine']}, not for {' on '.join(here)}. "
            "Name another with PYTHON=, or make the bundle with one like this."
        )


def unpack_source(bundle: Path, work: Path) -> Path:
    """Return the folder of llama-cpp-python's source, unpacked the first time."""
    archive = next(bundle.glob("llama_cpp_python-*.tar.xz"), None)
    if archive is None:
        sys.exit(f"{bundle} holds no source of llama-cpp-python; make the bundle anew.")
    folder = work / archive.name.removesuffix(".tar.xz")
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        with tarfile.open(archive) as packed:
            packed.extractall(work, filter="data")
        (folder / "done").touch()
    return folder


def _run(*command: str, environment: dict[str, str] | None = None) -> None:
    finished = subprocess.run(command, env=os.environ | (environment or {}), stdout=sys.stderr, check=False)
    if finished.returncode != 0:
        sys.exit(f"{' '.join(command[:3])} ... failed with status {finished.returncode}; its output above says why.")


if __name__ == "__main__":
    main()
