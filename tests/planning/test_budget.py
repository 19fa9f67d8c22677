"""What lies on a GPU for each number of offloaded layers, and what is recommended when memory is short."""

from __future__ import annotations

import pytest

from edge_phi3.llama.memory import ContextMemory, context_memory
from edge_phi3.planning.budget import Placement, host_pattern, place
from edge_phi3.planning.fit import Fit, Machine, Options, fit
from edge_phi3.planning.gguf_layout import Layout
from edge_phi3.planning.source import find_base
from edge_phi3.progress import SilentProgress

GIB = 1 << 30
MIB = 1 << 20
CONTEXT = ContextMemory(4096, 320 * MIB, {"CUDA0": 70 * MIB, "CUDA_Host": 9 * MIB}, 30 * MIB)


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return find_base("phi-3-mini-4k-instruct", tmp_path_factory.mktemp("mini"), store=None, progress=SilentProgress())


def placed(layout: Layout, offloaded: int, *, gpu_asked: bool = True) -> Placement:
    return place(layout, [CONTEXT], set(), offloaded=offloaded, gpu_asked=gpu_asked)


def gpu(free: int, **options: object) -> Machine:
    return Machine(gpu=True, name="a GPU", free=free, reserve=0, **options)  # type: ignore[arg-type]  # fields


def test_offloaded_layers_move_from_the_machine_to_the_gpu(mini: Layout) -> None:
    # 3,821,079,552 weights, of which 199,680 of the norms are F32.
    assert sum(tensor.size for tensor in mini.tensors) == 2 * (3_821_079_552 - 199_680) + 4 * 199_680
    block = sum(tensor.size for tensor in mini.tensors if tensor.name.startswith("blk.0."))
    sizes = {tensor.name: tensor.size for tensor in mini.tensors}
    output = sizes["output.weight"] + sizes["output_norm.weight"]
    for count in range(34):
        found = placed(mini, count)
        blocks = max(0, count - 1)
        assert found.device.weights == (blocks * block + output if count else 0)
        assert found.device.kv_cache == 320 * MIB * blocks // 32
        assert found.device.kv_cache + found.host.kv_cache == 320 * MIB
        assert (found.device.compute, found.host.compute) == (70 * MIB, 9 * MIB)
        assert (found.device.output, found.host.output) == (0, 30 * MIB)
    assert placed(mini, 33).host.weights == sizes["token_embd.weight"]


def test_a_gpu_that_was_not_asked_is_thought_to_take_all_compute_buffers(mini: Layout) -> None:
    assert placed(mini, 33, gpu_asked=False).device.compute == 79 * MIB
    assert placed(mini, 0, gpu_asked=False).device.compute == 0


def test_the_pattern_names_the_tensors_that_stay(mini: Layout) -> None:
    assert host_pattern(mini, 0) == ".*"
    assert host_pattern(mini, 33) == r"^token_embd\."
    assert host_pattern(mini, 31) == r"^token_embd\.|^blk\.(0|1)\."


def recommended(found: Fit) -> str | None:
    return found.best.type if found.best else None


def test_less_memory_means_fewer_bits_then_fewer_layers_then_nothing(mini: Layout) -> None:
    options = Options(ctx_size=2048)
    types = ("Q8_0", "Q4_K_M", "Q2_K")
    large, middle, small, none = (fit(mini, options, gpu(eighths * GIB // 8), types) for eighths in (44, 28, 18, 1))
    assert [recommended(found) for found in (large, middle, small, none)] == ["Q8_0", "Q4_K_M", "Q2_K", None]
    assert [row.placement.layers for row in large.rows] == [33, 33, 33]
    assert not any(row.fits for row in none.rows)
    for found in (middle, small):
        for row in found.rows:
            assert row.fits
            assert row.placement.device.total <= found.machine.budget
    # As many layers as fit, and not one more.
    layers = small.rows[0].placement.layers
    assert layers is not None
    assert 0 < layers < 33
    more = Options(ctx_size=2048, n_gpu_layers=layers + 1)
    assert not fit(mini, more, small.machine, ["Q8_0"]).rows[0].fits
    # When no type fits whole, the default one is recommended with the layers that fit.
    assert recommended(fit(mini, options, gpu(GIB), types)) == "Q4_K_M"


def test_asked_for_layers_are_planned_as_asked(mini: Layout) -> None:
    (row,) = fit(mini, Options(n_gpu_layers=10), gpu(1 * GIB), ["Q8_0"]).rows
    assert row.placement.layers == 10
    assert not row.fits
    (row,) = fit(mini, Options(n_gpu_layers=10), gpu(8 * GIB), ["Q8_0"]).rows
    assert row.fits


def test_what_stays_beside_the_gpu_needs_room_too_and_the_reserve_is_left_free(mini: Layout) -> None:
    (row,) = fit(mini, Options(), gpu(3 * GIB, main_memory=GIB // 4), ["Q8_0"]).rows
    assert 0 < (row.placement.layers or 0) < 33
    assert not row.fits
    (row,) = fit(mini, Options(ctx_size=512), Machine(False, "", 64 * GIB, 0), ["Q4_K_M"]).rows
    total = row.placement.host.total
    for reserve, fits in ((0, True), (1, False)):
        (row,) = fit(mini, Options(ctx_size=512), Machine(False, "", total, reserve), ["Q4_K_M"]).rows
        assert row.fits is fits


def test_of_contexts_for_several_batches_the_largest_buffers_count() -> None:
    # llama.cpp's words on a CUDA build, planning a context for batches of 64 tokens and of 17: the second needs more
    # beside the GPU, which is handed large batches of any layer.
    cells = "4096 cells,   3 layers, 17/1 seqs"
    log = [
        "llama_context:  CUDA_Host  output buffer size =     0.04 MiB",
        f"llama_kv_cache: size =   24.00 MiB (  {cells}), K (f32):   12.00 MiB, V (f32):   12.00 MiB",
        "sched_reserve:      CUDA0 compute buffer size =    10.88 MiB",
        "sched_reserve:  CUDA_Host compute buffer size =     0.86 MiB",
        "llama_context:  CUDA_Host  output buffer size =     0.04 MiB",
        f"llama_kv_cache: size =   24.00 MiB (  {cells}), K (f32):   12.00 MiB, V (f32):   12.00 MiB",
        "sched_reserve:      CUDA0 compute buffer size =     4.18 MiB",
        "sched_reserve:  CUDA_Host compute buffer size =     4.20 MiB",
    ]
    found = context_memory(log)
    assert (found.cells, found.kv) == (4096, 24 * MIB)
    assert found.compute == {"CUDA0": round(10.88 * MIB), "CUDA_Host": round(4.20 * MIB)}
    assert found.output == round(0.04 * MIB)
