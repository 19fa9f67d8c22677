"""Builds the software device and gives it to programs: llama.cpp's CUDA backend, unmodified, on a runtime of our own.

See README.md. The runtime is compiled with a C++ compiler and CUDA's headers; no GPU, driver or CUDA library is needed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from benchmarks.peers import wheel_libraries

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).parent

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    # Sums in any order, for vector instructions. Not -ffast-math: a library linked with it changes the arithmetic of
    # the whole process, where numbers next to zero then are zero.
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wextra",
)
_HEADERS = ("cuda_runtime_api.h", "cublas_v2.h")
_PLACES = ("", "include", "targets/x86_64-linux/include", "nvidia/cu13/include")


class Trace:
    """What the runtime was asked to do, line by line.

    Args:
        path: the file that it wrote.
    """

    def __init__(self, path: Path) -> None:
        self._lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def copies(self, direction: str) -> Counter[int]:
        """Count copies by their bytes; `direction` is ``device-to-host`` and the like."""
        found = (re.fullmatch(rf"copy {direction}(?: pinned)? (\d+)", line) for line in self._lines)
        return Counter(int(match[1]) for match in found if match)

    def count(self, start: str) -> int:
        """Count the lines with a beginning."""
        return sum(line.startswith(start) for line in self._lines)

    def peak(self) -> int:
        """Give the most bytes of device memory that were taken at once."""
        now = most = 0
        for line in self._lines:
            if match := re.fullmatch(r"(malloc|free) (\d+)", line):
                now += int(match[2]) if match[1] == "malloc" else -int(match[2])
                most = max(most, now)
        return most


@dataclass(frozen=True, slots=True)
class SoftwareDevice:
    """The device.

    Attributes:
        runtime: the folder of our libcudart and libcublas.
        programs: the folder of a CUDA build of llama.cpp: libraries and programs.
        site: a folder with a llama_cpp whose libraries are those of the build.
        memory: bytes that the device has, whole MiB.
    """

    runtime: Path
    programs: Path
    site: Path
    memory: int

    def environment(self, trace: Path | None = None, *, kernels: bool = True) -> dict[str, str]:
        """Give the environment in which programs have the device, and no option of edge-phi3.

        Args:
            trace: where the runtime is to write what it was asked to do.
            kernels: whether kernels are executed; without them memory is taken all the same, and results are garbage.
        """
        clean = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_PHI3_")}
        path = os.pathsep.join(filter(None, [str(self.site), str(ROOT), clean.get("PYTHONPATH")]))
        given = {
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(self.runtime), clean.get("LD_LIBRARY_PATH")])),
            "PYTHONPATH": path,
            "CUDA_VISIBLE_DEVICES": "0",
            "SOFTWARE_CUDA_MEMORY": str(self.memory >> 20),
            "SOFTWARE_CUDA_KERNELS": "run" if kernels else "skip",
        }
        return clean | given | ({"SOFTWARE_CUDA_TRACE": str(trace)} if trace else {})

    def run(
        self,
        *command: str | Path,
        trace: Path | None = None,
        kernels: bool = True,
        given: str | None = None,
        more: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program with the device, in the repository's folder; see `environment`.

        Args:
            command: the program and its arguments.
            trace: see `environment`.
            kernels: see `environment`.
            given: its stdin.
            more: more variables of the environment.
        """
        return subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=self.environment(trace, kernels=kernels) | (more or {}),
            input=given,
            capture_output=True,
            text=True,
            check=False,
        )


def build_runtime(cache: Path, given: Sequence[Path]) -> Path:
    """Give the folder of libcudart and libcublas, compiled the first time.

    Args:
        cache: where they are kept.
        given: where CUDA's headers may be: toolkits, or folders of headers.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        sys.exit("g++ is needed to compile the software device: apt-get install g++")
    headers = [f"-I{_headers(name, given)}" for name in _HEADERS]
    known = hashlib.sha256(" ".join([compiler, *_FLAGS, *headers]).encode())
    sources = sorted(path for path in SOURCE.iterdir() if path.suffix in {".cpp", ".h", ".map"})
    for path in sources:
        known.update(path.read_bytes())
    output = cache / f"software-cuda-{known.hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "software-cuda.lock"):
        if not output.exists():
            unfinished = output.with_suffix(".unfinished")
            unfinished.mkdir(exist_ok=True)
            names = [path for path in sources if path.suffix == ".cpp"]
            runtime = [path for path in names if path.stem != "cublas"]
            _compile(compiler, headers, runtime, unfinished, "cudart")
            _compile(compiler, headers, [SOURCE / "cublas.cpp"], unfinished, "cublas", "-l:libcudart.so.13")
            unfinished.rename(output)
    return output


def _headers(name: str, given: Sequence[Path]) -> Path:
    usual = [Path(os.environ[each]) for each in ("CUDA_HOME", "CUDA_PATH") if each in os.environ]
    for folder in [*given, *usual, Path("/usr/local/cuda"), wheel_libraries().parents[1]]:
        for place in _PLACES:
            if (folder / place / name).exists():
                return folder / place
    sys.exit(
        f"{name} is not found; name the folder of a CUDA 13 toolkit, or of its headers, with --cuda. Those of cuBLAS"
        " are in the package nvidia-cublas too."
    )


def _compile(
    compiler: str, headers: Sequence[str], sources: Sequence[Path], folder: Path, name: str, *libraries: str
) -> None:
    library = f"lib{name}.so.13"
    # Symbols have versions, as in the libraries that programs were linked with.
    linked = ["-z,defs", f"-soname,{library}", f"--version-script={SOURCE / name}.map", "-rpath,$ORIGIN"]
    command = [compiler, *_FLAGS, *headers, *map(str, sources), "-o", str(folder / library), f"-L{folder}", *libraries]
    command += [f"-Wl,{option}" for option in linked]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        sys.exit(f"{library} cannot be compiled:\n{finished.stderr[:4000]}")


def python_package(folder: Path, programs: Path) -> Path:
    """Write a llama_cpp like the installed one, with the libraries of a build; give the folder for PYTHONPATH."""
    package = folder / "llama_cpp"
    package.mkdir(parents=True)
    for module in wheel_libraries().parent.glob("*.py"):
        shutil.copy(module, package)
    (package / "lib").symlink_to(programs.resolve())
    return folder
