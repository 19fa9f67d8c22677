"""Build llama.cpp's own programs from the source package of llama-cpp-python, to compare ours with.

The wheel of llama-cpp-python holds llama.cpp's libraries without its programs. This builds the programs from the very
same source with the same options (those of CMAKE_ARGS included), and has them run on the wheel's own libraries: what
is compared is then what surrounds llama.cpp, and not two compilations of it.

    python -m benchmarks.peers                            # downloads the source package with pip
    python -m benchmarks.peers --source llama_cpp_python-0.3.36.tar.gz
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.models import CACHE
from edge_phi3.llama.options import usable_cores

PROGRAMS = (
    "llama-server",
    "llama-bench",
    "llama-batched-bench",
    "llama-quantize",
    "llama-perplexity",
    "llama-imatrix",
)

# The wheel's own choices, and nothing that a benchmark does not run.
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


@dataclass(frozen=True, slots=True)
class Peers:
    """Built programs.

    Attributes:
        folder: where they lie.
        source: llama.cpp's source.
    """

    folder: Path
    source: Path

    def program(self, name: str) -> Path:
        """Give the path of one of `PROGRAMS`."""
        return self.folder / name

    def environment(self) -> dict[str, str]:
        """Give the environment in which a program finds the wheel's libraries before its own."""
        libraries = wheel_libraries()
        before = os.environ.get("LD_LIBRARY_PATH")
        return os.environ | {"LD_LIBRARY_PATH": f"{libraries}:{before}" if before else str(libraries)}

    def run(self, name: str, *arguments: str | Path) -> str:
        """Run a program to its end and give what it wrote to stdout; its failure ends the script."""
        command = [str(self.program(name)), *map(str, arguments)]
        finished = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            sys.exit(f"{shlex.join(command)} failed:\n{finished.stderr[-2000:]}")
        return finished.stdout


def wheel_libraries() -> Path:
    """Give the folder of llama.cpp's libraries inside the installed llama-cpp-python."""
    spec = find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "lib"


def build_peers(cache: Path = CACHE, source: Path | None = None, jobs: int | None = None) -> Peers:
    """Give the programs, built the first time; that takes about as long as building the wheel.

    Args:
        cache: where source and build are kept.
        source: the source package of llama-cpp-python, or its unpacked folder; None downloads it with pip.
        jobs: compilers at once; None for one on each core.
    """
    cache.mkdir(parents=True, exist_ok=True)
    llama_cpp = llama_cpp_source(cache, source)
    build = cache / f"llama.cpp-{version('llama-cpp-python')}"
    peers = Peers(build / "bin", llama_cpp)
    if all(peers.program(name).exists() for name in PROGRAMS):
        return peers
    if shutil.which("cmake") is None:
        sys.exit("cmake is not installed; pip install cmake ninja, or take your system's packages.")
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    given = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    _build_step("cmake", "-S", llama_cpp, "-B", build, *generator, *_OPTIONS, *given)
    count = str(jobs or usable_cores())
    _build_step("cmake", "--build", build, "--parallel", count, "--target", *PROGRAMS)
    return peers


def _build_step(*command: str | Path) -> None:
    print(f"$ {shlex.join(map(str, command))}", file=sys.stderr)
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        sys.exit("llama.cpp could not be built; its output above says why.")


def llama_cpp_source(cache: Path = CACHE, given: Path | None = None) -> Path:
    """Give llama.cpp's source as the installed llama-cpp-python was built from it.

    Args:
        cache: where the source package is kept, and unpacked the first time.
        given: the source package, or its unpacked folder; None downloads it with pip.
    """
    package = f"llama_cpp_python-{version('llama-cpp-python')}"
    folder = given if given is not None and given.is_dir() else cache / package
    inside = folder / "vendor" / "llama.cpp"
    if not inside.exists() and folder == cache / package:
        _unpack(given or _download(cache, package), folder)
    if not (inside / "CMakeLists.txt").exists():
        sys.exit(f"{folder} does not hold the source of {package} with its vendor/llama.cpp.")
    return inside


def _download(cache: Path, package: str) -> Path:
    archive = cache / f"{package}.tar.gz"
    if not archive.exists():
        requirement = package.replace("_", "-").replace("python-", "python==", 1)
        # Of what pip needs to look into the package, wheels will do.
        options = ("--no-deps", "--no-binary", "llama-cpp-python", "-d", cache)
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options, requirement]
        subprocess.run(command, stdout=sys.stderr, check=True)
    return archive


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        with tarfile.open(archive) as packed:
            packed.extractall(unfinished, filter="data")
        (Path(unfinished) / folder.name).rename(folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a script the options that find or build the peers."""
    parser.add_argument("--cache", type=Path, default=CACHE, help="where models and peers are kept")
    parser.add_argument("--source", type=Path, help="llama-cpp-python's source package or folder; default: pip")


def main() -> None:
    """Build, and say where the programs are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--jobs", type=int, help="compilers at once; default: one on each core")
    arguments = parser.parse_args()
    peers = build_peers(arguments.cache, arguments.source, arguments.jobs)
    for name in PROGRAMS:
        print(peers.program(name))


if __name__ == "__main__":
    main()
