"""The GPU: its name, its memory while something runs, and how fast it reads that memory."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pynvml

from benchmarks.gpu.steps import NotMeasured

_SOURCE = Path(__file__).with_name("bandwidth.cu")
_POLL_SECONDS = 0.05


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """The first GPU.

    Attributes:
        name: as the driver calls it.
        architecture: for CMAKE_CUDA_ARCHITECTURES, such as ``90-real``.
        memory: bytes in all.
        used: bytes in use before anything was measured.
        driver: version.
        cuda: newest CUDA version that the driver knows.
        power_limit: watts, or None where the driver does not say.
    """

    name: str
    architecture: str
    memory: int
    used: int
    driver: str
    cuda: str
    power_limit: float | None


def gpu() -> Gpu:
    """Describe the first GPU.

    Raises:
        NotMeasured: there is none.
    """
    with _device() as handle:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        power = None
        with contextlib.suppress(pynvml.NVMLError):
            power = pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
        return Gpu(
            name=_text(pynvml.nvmlDeviceGetName(handle)),
            architecture=f"{major}{minor}-real",
            memory=int(memory.total),
            used=int(memory.used),
            driver=_text(pynvml.nvmlSystemGetDriverVersion()),
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
            power_limit=power,
        )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@contextlib.contextmanager
def _device() -> Iterator[object]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NotMeasured(f"there is no NVIDIA GPU here ({error})") from None
    try:
        if pynvml.nvmlDeviceGetCount() == 0:
            raise NotMeasured("the NVIDIA driver knows no GPU")
        yield pynvml.nvmlDeviceGetHandleByIndex(0)
    finally:
        pynvml.nvmlShutdown()


class MemoryWatch:
    """The GPU memory that came into use since the block began, all processes together, CUDA's own included.

    Attributes:
        peak: bytes at most; None without a GPU.
    """

    def __init__(self) -> None:
        self.peak: int | None = None
        self._stop = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[MemoryWatch]:
        """Watch for as long as the block runs. Nothing else may use the GPU meanwhile."""
        with contextlib.ExitStack() as stack:
            try:
                handle = stack.enter_context(_device())
            except NotMeasured:
                yield self
                return
            before = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
            self.peak = 0
            thread = threading.Thread(target=self._poll, args=(handle, before), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                self._stop.set()
                thread.join()

    def _poll(self, handle: object, before: int) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self.peak = max(self.peak or 0, int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) - before)


class Bandwidth(msgspec.Struct, frozen=True, kw_only=True):
    """How fast memory is read and copied.

    Attributes:
        read: bytes per second of a kernel that only reads, as decoding reads weights; None on a CPU.
        copy: bytes per second of a copy, read and written bytes together.
        method: how that was measured.
    """

    read: float | None
    copy: float
    method: str

    @property
    def limit(self) -> float:
        """Bytes per second that decoding can read at most."""
        return max(self.read or 0.0, self.copy)


def gpu_bandwidth(work: Path, architecture: str) -> Bandwidth:
    """Compile ``bandwidth.cu`` and run it.

    Raises:
        NotMeasured: there is no nvcc, or it refuses.
    """
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise NotMeasured("nvcc is not there")
    work.mkdir(parents=True, exist_ok=True)
    program = work / "bandwidth"
    command = [nvcc, "-O3", f"-arch=sm_{architecture.partition('-')[0]}", "-o", str(program), str(_SOURCE)]
    for step in (command, [str(program)]):
        finished = subprocess.run(step, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            raise NotMeasured(f"{Path(step[0]).name} failed: {finished.stderr.strip()[-300:]}")
    values = msgspec.json.decode(finished.stdout, type=dict[str, float])
    return Bandwidth(read=values["read"], copy=values["copy"], method="the best of 20 passes over 1 GiB, in CUDA")


def cpu_bandwidth(size: int = 256 << 20, repeats: int = 5) -> Bandwidth:
    """Copy `size` bytes with NumPy, one thread on each core; the best of `repeats`."""
    cores = len(os.sched_getaffinity(0))
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    bounds = np.linspace(0, size, cores + 1).astype(int)
    parts = [slice(start, end) for start, end in itertools.pairwise(bounds)]
    times = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))
            times.append(time.perf_counter() - started)
    return Bandwidth(
        read=None, copy=2 * size / min(times), method=f"the best of {repeats} copies of {size >> 20} MiB with NumPy"
    )
