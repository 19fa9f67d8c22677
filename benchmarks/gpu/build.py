"""llama.cpp for this GPU alone, compiled once: for the bindings and for the programs to compare with."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.bootstrap import unpack_source
from benchmarks.gpu.device import gpu
from benchmarks.gpu.options import Options
from benchmarks.gpu.steps import NotMeasured, OutOfTime, Steps
from tests.support.peers import CACHE, Peers, wheel_libraries

MEASURED_PROGRAMS = ("llama-server", "llama-bench", "llama-batched-bench")
_CUDA = "/usr/local/cuda/bin"
_LAST_SECONDS = 10.0


def build(steps: Steps, options: Options) -> None:
    """Compile, link the bindings to the libraries, and see that they find the GPU."""
    if options.cpu:
        steps.run("build.bindings", _check_bindings)
        return
    steps.run("build.programs", lambda: _compile(options, steps))
    if steps.result("build.programs") is not None:
        steps.run("build.bindings", lambda: _link_bindings(options))


def _compile(options: Options, steps: Steps) -> dict[str, object]:
    """Run the build until it is done or the time is up; what is compiled stays compiled."""
    assert options.bundle is not None
    architecture = options.architecture or gpu().architecture
    arguments = f"-DGGML_CUDA=ON -DGGML_CUDA_NCCL=OFF -DCMAKE_CUDA_ARCHITECTURES={architecture}"
    given = os.environ.get("CMAKE_ARGS", "")
    source = unpack_source(options.bundle, options.work)
    command = [sys.executable, "-m", "tests.support.peers", "--cache", str(_cache(options)), "--source", str(source)]
    command += [word for name in MEASURED_PROGRAMS for word in ("--program", name)]
    if options.jobs:
        command += ["--jobs", str(options.jobs)]
    environment = os.environ | {"CMAKE_ARGS": f"{arguments} {given}".strip()}
    if Path(_CUDA, "nvcc").exists():
        environment["PATH"] = f"{environment['PATH']}:{_CUDA}"
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr, start_new_session=True)
    try:
        status = process.wait(max(_LAST_SECONDS, steps.time_left - _LAST_SECONDS))
    except subprocess.TimeoutExpired:
        raise OutOfTime("The build is not done; it will go on where it stopped.") from None
    finally:
        _end_group(process)
    if status != 0:
        raise RuntimeError(f"the build ended with status {status}; its output above says why")
    return {"cmake_arguments": environment["CMAKE_ARGS"], "folder": str(_programs(options))}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Stop the build's compilers with it: Ninja removes what they had not finished."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LAST_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _link_bindings(options: Options) -> dict[str, object]:
    """Link the bindings to the libraries that were built, so that a process never loads one library twice."""
    libraries = wheel_libraries()
    libraries.mkdir(exist_ok=True)
    built = [*_programs(options).glob("libllama.so*"), *_programs(options).glob("libggml*.so*")]
    if not built:
        raise RuntimeError(f"{_programs(options)} holds no libraries of llama.cpp")
    for path in built:
        link = libraries / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    found = _check_bindings()
    if not found["gpu_offload"]:
        raise RuntimeError("llama.cpp was built, but finds no GPU: is the driver as new as this CUDA?")
    return found


def _check_bindings() -> dict[str, object]:
    """Load the bindings in a process of their own, and ask whether they can use a GPU."""
    code = "from edge_phi3.llama.backend import supports_gpu_offload as s; print(int(s()))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"llama-cpp-python does not load: {finished.stderr.strip()[-500:]}")
    return {"gpu_offload": finished.stdout.split()[-1] == "1", "libraries": str(wheel_libraries())}


def _cache(options: Options) -> Path:
    return options.work / "peers"


def _programs(options: Options) -> Path:
    return next(iter(sorted(_cache(options).glob("llama.cpp-*/bin"))), _cache(options))


def find_peers(options: Options) -> Peers:
    """Return llama.cpp's programs: those named, those of this build, or those that ``tests.support.peers`` made before.

    Raises:
        NotMeasured: there are none.
    """
    places = [_programs(options), *sorted(CACHE.glob("llama.cpp-*/bin"))]
    if options.peers is not None:
        places = [options.peers]
    for folder in places:
        if (folder / MEASURED_PROGRAMS[0]).exists():
            return Peers(folder)
    raise NotMeasured("llama-server is not there")
