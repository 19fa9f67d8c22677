"""The engine's own tests once more, with layers and KV cache in a device's memory: not a token may change.

They run unchanged in a process that has the device, so that transformers' recorded answers are asked of it too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import OPTIONS
from tests.offload.device import Device

EXACT = (
    # 400 requests in all modes, against transformers.
    "tests/engine/test_golden.py::test_all_modes_of_decoding_at_once",
    # Windows, trimmed caches, and the two sets of rotary factors with a context for each, against transformers.
    "tests/engine/test_golden.py::test_window_is_exact_one_token_at_a_time",
    "tests/engine/test_golden.py::test_a_trimmed_sequence_is_no_cache_for_a_prompt_that_needs_its_beginning",
    "tests/engine/test_golden.py::test_short_and_long_prompts_side_by_side",
    # KV cache in F32, F16 and Q8_0, and a LoRA adapter.
    "tests/engine/test_loading.py::test_smaller_kv_types_serve",
    "tests/engine/test_loading.py::test_f16_cells_begin_like_f32_ones",
    "tests/engine/test_loading.py::test_a_lora_adapter_equals_merged_weights",
    # Grammars.
    "tests/engine/test_constraint.py",
    "tests/engine/test_engine.py::test_preempted_requests_are_recomputed_and_right",
)

# What is saved to main memory and restored; on a device that is done with flash attention only, see `Context.saves`.
REUSE = (
    "tests/engine/test_reuse.py::test_a_conversation_goes_on_from_the_store[options1]",
    "tests/engine/test_reuse.py::test_running_prompts_share_cells_and_the_store_adds_the_rest",
    "tests/engine/test_reuse.py::test_a_window_model_goes_on_from_the_store",
    "tests/engine/test_reuse.py::test_a_state_that_cannot_be_restored_is_computed",
    "tests/engine/test_reuse.py::test_a_seed_repeats_exactly_on_a_quantised_model_wherever_its_cells_lie",
)

# Of the two blocks and the output of a small random model, or of what else a test loads.
PARTLY = (
    "tests/engine/test_golden.py::test_all_modes_of_decoding_at_once",
    "tests/engine/test_golden.py::test_window_is_exact_one_token_at_a_time[4k-2500+24]",
    "tests/engine/test_loading.py::test_a_lora_adapter_equals_merged_weights",
)


def run(device: Device, report: Path, tests: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """Run tests on the device, all of which must pass, and give what was seen of the buffers."""
    finished = device.run(
        *("-m", "pytest", "-q", "-p", "watch_device", "-p", "no:cacheprovider", *tests),
        seconds=1800,
        # The device computes; more threads here would only wait for it on its cores.
        **{OPTIONS: json.dumps({"threads": 1} | options), "TEST_DEVICE_REPORT": str(report)},
    )
    assert finished.returncode == 0, finished.stdout[-6000:]
    assert re.fullmatch(r"\d+ passed in .*", finished.stdout.splitlines()[-1]), finished.stdout[-1000:]
    found: dict[str, Any] = json.loads(report.read_text())
    assert len(found["starts"]) >= len(tests)
    return found


@pytest.mark.parametrize(
    ("tests", "options"), [(EXACT, {}), (REUSE, {"flash_attn": "on"})], ids=["without", "with flash attention"]
)
def test_all_layers_on_the_device(
    device: Device, tmp_path: Path, tests: tuple[str, ...], options: dict[str, Any]
) -> None:
    found = run(device, tmp_path / "report.json", tests, **options)
    for line in found["starts"]:
        match = re.search(r"(\d+) of (\d+) layers on the GPU", line)
        assert match, line
        assert match[1] == match[2]
    assert found["buffers"]["KV"] == [device.buffer]
    # The embeddings alone stay: llama.cpp looks them up on the CPU.
    assert found["buffers"]["model"] == ["CPU_Mapped", device.buffer]
    assert device.buffer in found["buffers"]["compute"]


def test_the_last_block_and_the_output_on_the_device(device: Device, tmp_path: Path) -> None:
    found = run(device, tmp_path / "report.json", PARTLY, n_gpu_layers=2)
    assert all("2 of 3 layers on the GPU" in line for line in found["starts"])
    assert found["buffers"]["KV"] == ["CPU", device.buffer]
