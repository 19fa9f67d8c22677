"""Plan the GPU memory that Phi-3-mini takes in each type, as `edge-phi3 fit` does, and record it for the report.

    python -m benchmarks.memory --output benchmarks/results/memory.json

No weights are needed: llama.cpp is asked what it would allocate for the shapes of the model.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import msgspec

from edge_phi3.bench.machine import Machine
from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES
from edge_phi3.llama.options import KVCacheType
from edge_phi3.planning.fit import Machine as Host
from edge_phi3.planning.fit import Options, fit
from edge_phi3.planning.source import find_base
from edge_phi3.progress import SilentProgress

MODEL = "phi-3-mini-4k-instruct"
CELLS = 4096
RESERVE = 512 << 20
"""Bytes left free, as by `edge-phi3 fit`, for what no plan tells: the driver's context, working space of kernels."""

_KV_TYPES: tuple[KVCacheType, ...] = ("f16", "q8_0")


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that one type takes with a full context.

    Attributes:
        type: its name.
        bits_per_weight: of all tensors together.
        gpu: weights, KV cache and buffers in the GPU's memory, by the element type of the cache; nothing left free.
        main_memory: what lies beside the GPU, the embeddings above all.
    """

    type: str
    bits_per_weight: float
    gpu: dict[str, int]
    main_memory: int


class MemoryRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The plans of all types, from large to small.

    Attributes:
        machine: where they were made.
        model: of which model.
        cells: tokens of the context.
        reserve: bytes to leave free.
        kv_cache: bytes of the cache, by the type of its elements.
        gpu_asked: whether a GPU's llama.cpp told its buffers; otherwise they are those of the CPU's.
        rows: a plan for each type.
    """

    machine: Machine
    model: str
    cells: int
    reserve: int
    kv_cache: dict[str, int]
    gpu_asked: bool
    rows: list[Planned]


def plan() -> MemoryRecord:
    """Plan every type that is meant for general use, with all layers on a GPU."""
    types = [kind.name for kind in QUANTIZATION_TYPES.values() if not kind.special]
    host = Host(gpu=True, name="", free=1 << 50, reserve=RESERVE)
    with tempfile.TemporaryDirectory() as folder:
        base = find_base(MODEL, Path(folder), store=None, progress=SilentProgress())
        fits = {kv: fit(base, Options(ctx_size=CELLS, kv_cache_type=kv), host, types) for kv in _KV_TYPES}
    placements = {kv: {row.type: row.placement for row in found.rows} for kv, found in fits.items()}
    rows = [
        Planned(
            type=row.type,
            bits_per_weight=row.bits_per_weight,
            gpu={kv: found[row.type].device.total for kv, found in placements.items()},
            main_memory=row.placement.host.total,
        )
        for row in fits[_KV_TYPES[0]].rows
    ]
    return MemoryRecord(
        machine=Machine.here(),
        model=MODEL,
        cells=CELLS,
        reserve=RESERVE,
        kv_cache={kv: found.rows[0].placement.device.kv_cache for kv, found in fits.items()},
        gpu_asked=fits[_KV_TYPES[0]].gpu_asked,
        rows=rows,
    )


def main() -> int:
    """Plan, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(plan()), indent=1) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
