"""llama.cpp's own programs and a Python with torch, which tests and benchmarks compare this product with.

The wheel of llama-cpp-python lacks the programs. They are built from the very same source with the same options (those
of CMAKE_ARGS too), and run on the wheel's own libraries, so that not two compilations of llama.cpp are compared.

    python -m tests.support.peers                            # builds them; downloads the source package with pip
    python -m tests.support.peers --program llama-quantize   # builds this one only
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import platformdirs

from edge_phi3.system_resources import usable_cores

CACHE = platformdirs.user_cache_path("edge-phi3") / "benchmarks"
"""Where models, sources and programs are kept."""

TORCH_PYTHON = "TORCH_PYTHON"
"""Environment variable: an interpreter with torch and transformers."""

PROGRAMS = tuple(f"llama-{name}" for name in ("server", "bench", "batched-bench", "quantize", "perplexity", "imatrix"))

# The wheel's own choices, and nothing that a comparison does not run.
_LEFT_OUT = ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_APP", "USE_PREBUILT_UI")
_OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", *(f"-DLLAMA_{part}=OFF" for part in _LEFT_OUT))


class PeerError(RuntimeError):
    """A program of llama.cpp is missing, or ended with an error."""


@dataclass(frozen=True, slots=True)
class Peers:
    """A folder of llama.cpp's programs, whether they are built or not."""

    folder: Path

    def program(self, name: str) -> Path:
        """Return the path of one of `PROGRAMS`; `PeerError` when it is not built."""
        path = self.folder / name
        if not path.exists():
            raise PeerError(f"{name} is not built; `python -m tests.support.peers` builds it.")
        return path

    def environment(self) -> dict[str, str]:
        """Return the environment in which a program finds the wheel's libraries before its own."""
        paths = [str(wheel_libraries()), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return os.environ | {"LD_LIBRARY_PATH": ":".join(paths)}

    def run(self, name: str, *arguments: str | Path) -> str:
        """Run a program to its end, and return what it wrote to stdout; `PeerError` when it is not built, or fails."""
        return run_peer([self.program(name), *arguments], environment=self.environment())


def run_peer(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> str:
    """Run a command to its end, and return what it wrote to stdout; `PeerError` when it fails."""
    words = [str(word) for word in command]
    finished = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise PeerError(f"{shlex.join(words)[:500]} failed:\n{finished.stderr[-2000:]}")
    return finished.stdout


def find_peers(cache: Path = CACHE) -> Peers:
    return Peers(cache / f"llama.cpp-{version('llama-cpp-python')}" / "bin")


def torch_python() -> Path | None:
    """Return the interpreter that `TORCH_PYTHON` names, or this one if it has torch; None without either."""
    if named := os.environ.get(TORCH_PYTHON):
        return Path(named)
    return Path(sys.executable) if find_spec("torch") and find_spec("transformers") else None


def wheel_libraries() -> Path:
    """Return the folder of llama.cpp's libraries inside the installed llama-cpp-python."""
    spec = find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "lib"


def build_peers(
    cache: Path = CACHE, source: Path | None = None, jobs: int | None = None, programs: Sequence[str] = PROGRAMS
) -> Peers:
    """Return the programs, built the first time; that takes about as long as building the wheel.

    `source` is the unpacked source package of llama-cpp-python; None downloads it with pip. `PeerError` when cmake is
    missing, or the build failed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    llama_cpp = llama_cpp_source(cache, source)
    peers = find_peers(cache)
    if all((peers.folder / name).exists() for name in programs):
        return peers
    if shutil.which("cmake") is None:
        raise PeerError("cmake is not installed; pip install cmake ninja, or take your system's packages.")
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    given = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    build = peers.folder.parent
    _build_step("cmake", "-S", llama_cpp, "-B", build, *generator, *_OPTIONS, *given)
    count = str(jobs or usable_cores())
    _build_step("cmake", "--build", build, "--parallel", count, "--target", *programs)
    return peers


def _build_step(*command: str | Path) -> None:
    print(f"$ {shlex.join(map(str, command))}", file=sys.stderr)
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        raise PeerError("llama.cpp could not be built; its output above says why.")


def llama_cpp_source(cache: Path = CACHE, given: Path | None = None) -> Path:
    """Return the folder of llama.cpp's source as the installed llama-cpp-python was built from it.

    `given` is the unpacked source package; None for that in the cache, where it is downloaded the first time, whole or
    not at all. `PeerError` when it holds no source of this version.
    """
    package = f"llama_cpp_python-{version('llama-cpp-python')}"
    folder = given or cache / package
    if given is None and not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            # Of what pip needs to look into the package, wheels will do.
            options = ("--no-deps", "--no-binary", "llama-cpp-python", "--disable-pip-version-check", "-d", unfinished)
            requirement = f"llama-cpp-python=={version('llama-cpp-python')}"
            command = [sys.executable, "-m", "pip", "download", *options, requirement]
            subprocess.run(command, stdout=sys.stderr, check=True)
            with tarfile.open(Path(unfinished, f"{package}.tar.gz")) as packed:
                packed.extractall(unfinished, filter="data")
            Path(unfinished, package).rename(folder)
    inside = folder / "vendor" / "llama.cpp"
    if not (inside / "CMakeLists.txt").exists():
        raise PeerError(f"{folder} does not hold the source of {package} with its vendor/llama.cpp.")
    return inside


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where source and programs are kept")
    parser.add_argument("--source", type=Path, help="llama-cpp-python's unpacked source package; default: pip")
    parser.add_argument("--jobs", type=int, help="compilers at once; default: one on each core")
    parser.add_argument("--program", action="append", choices=PROGRAMS, help="build this one only; repeatable")
    arguments = parser.parse_args()
    try:
        peers = build_peers(arguments.cache, arguments.source, arguments.jobs, arguments.program or PROGRAMS)
    except PeerError as error:
        print(error, file=sys.stderr)
        return 1
    print(peers.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
