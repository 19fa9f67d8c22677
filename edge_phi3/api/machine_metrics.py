"""The machine behind ``GET /metrics``: GPUs, or else the CPUs, in the original service's formats."""

from __future__ import annotations

import psutil

from edge_phi3.api.schemas import CPUInfo, GPUInfo, MemoryInfo, MetricsResponse
from edge_phi3.system_resources import Gpu, gpus

_GIB = 1024**3
_CPU_SAMPLE_SECONDS = 0.1
"""How long the CPUs are watched for their load; psutil advises at least this."""


def machine_metrics() -> MetricsResponse:
    """Describe the GPUs, or the CPUs when there is no GPU. Blocks for a tenth of a second without GPUs."""
    found = _gpus()
    return MetricsResponse(gpu_info=found) if found else MetricsResponse(cpu_info=_cpus())


def _gpus() -> list[GPUInfo]:
    return [_gpu(gpu) for gpu in gpus()]


def _gpu(gpu: Gpu) -> GPUInfo:
    return GPUInfo(
        id=str(gpu.index),
        name=gpu.name,
        load="n/a" if gpu.load is None else f"{gpu.load:.2f}%",
        temperature="n/a" if gpu.temperature is None else f"{gpu.temperature} C",
        memory=MemoryInfo(used=_gigabytes(gpu.used), total=_gigabytes(gpu.total)),
    )


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
