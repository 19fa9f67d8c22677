"""The GPU: its name, and its memory while something runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import msgspec
import pynvml

from benchmarks.gpu.steps import NotMeasured

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
