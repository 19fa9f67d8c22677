"""The machine behind ``GET /metrics``: GPUs through NVML, or else the CPUs, in the original service's formats."""

from __future__ import annotations

from typing import Any

import psutil
import pynvml

from edge_phi3.api.schemas import CPUInfo, GPUInfo, MemoryInfo, MetricsResponse

_GIB = 1024**3
_CPU_SAMPLE_SECONDS = 0.1
"""How long the CPUs are watched for their load; psutil advises at least this."""


def machine_metrics() -> MetricsResponse:
    """Describe the GPUs, or the CPUs when there is no GPU. Blocks for a tenth of a second without GPUs."""
    gpus = _gpus()
    return MetricsResponse(gpu_info=gpus) if gpus else MetricsResponse(cpu_info=_cpus())


def _gpus() -> list[GPUInfo]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int) -> GPUInfo:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    name = pynvml.nvmlDeviceGetName(handle)
    return GPUInfo(
        id=str(index),
        name=name.decode() if isinstance(name, bytes) else name,
        load=_if_supported("{:.2f}%", lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        temperature=_if_supported("{} C", lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        memory=MemoryInfo(used=_gigabytes(memory.used), total=_gigabytes(memory.total)),
    )


def _if_supported(form: str, read: Any) -> str:
    """Read one value; slices of a GPU (MIG, vGPU) tell no load and some no temperature."""
    try:
        return form.format(read())
    except pynvml.NVMLError:
        return "n/a"


def _cpus() -> CPUInfo:
    memory = psutil.virtual_memory()
    total = psutil.cpu_count(logical=True) or 1
    return CPUInfo(
        load_percentage=psutil.cpu_percent(interval=_CPU_SAMPLE_SECONDS),
        physical_cores=psutil.cpu_count(logical=False) or total,
        total_cores=total,
        memory=MemoryInfo(used=_gigabytes(memory.used), total=_gigabytes(memory.total)),
    )


def _gigabytes(count: int) -> str:
    return f"{count / _GIB:.2f} GB"
