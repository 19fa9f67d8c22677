"""PEFT's adapters as GGUF: llama.cpp's tensors; split projections and patterns as PEFT means them; what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edge_phi3.catalog.reference import ModelReferenceError, parse_reference
from edge_phi3.conversion import ConversionError
from edge_phi3.conversion.checkpoint import open_checkpoint
from edge_phi3.conversion.convert import convert
from tests.conversion.conftest import tensors_of
from tests.golden import adapters
from tests.golden.gguf_digests import describe
from tests.support.cases import cases
from tests.test_cli import edge_phi3

WIDTH, FEED, KEYS = 64, 96, 32
ROWS = {"q_proj": WIDTH, "k_proj": KEYS, "v_proj": KEYS, "gate_proj": FEED, "up_proj": FEED, "o_proj": WIDTH}


@pytest.mark.parametrize("name", adapters.ADAPTERS)
@pytest.mark.parametrize("outtype", adapters.OUTTYPES)
def test_the_tensors_are_those_of_llama_cpp(name: str, outtype: str, tmp_path: Path) -> None:
    made = convert(adapters.FOLDER / name, tmp_path / "adapter.gguf", outtype=outtype)
    assert describe(made.path)["tensors"] == adapters.recorded()["llama.cpp"][f"{name}-{outtype}"]


def write(folder: Path, ranks: dict[str, int], **config: Any) -> dict[str, NDArray[np.float32]]:
    """Write an adapter of layer 0's modules, of these ranks; return each module's ``B A``, not scaled."""
    folder.mkdir()
    chance = np.random.default_rng(1)
    tensors, changes = dict[str, NDArray[np.float32]](), dict[str, NDArray[np.float32]]()
    for module, rank in ranks.items():
        a = chance.standard_normal((rank, WIDTH)).astype(np.float32)
        b = chance.standard_normal((ROWS[module], rank)).astype(np.float32)
        block = "mlp" if module in {"gate_proj", "up_proj"} else "self_attn"
        name = f"base_model.model.model.layers.0.{block}.{module}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        changes[module] = b @ a
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return changes


def change(path: Path, matrix: str) -> NDArray[np.float32]:
    """Return what llama.cpp adds to a matrix: ``B A`` by the file's alpha over the rank."""
    alpha = gguf.GGUFReader(path).fields["adapter.lora.alpha"].contents()
    a, b = (tensors_of(path)[f"blk.0.{matrix}.weight.lora_{factor}"].data for factor in "ab")
    found: NDArray[np.float32] = b @ a * (alpha / a.shape[0])
    return found


def test_split_projections_are_fused(tmp_path: Path) -> None:
    changes = write(tmp_path / "split", {"q_proj": 4, "v_proj": 4, "gate_proj": 4, "up_proj": 4, "o_proj": 4})
    path = convert(tmp_path / "split", tmp_path / "adapter.gguf").path
    nothing = np.zeros((KEYS, WIDTH), np.float32)
    qkv = np.concatenate([changes["q_proj"], nothing, changes["v_proj"]])
    for matrix, whole in {
        "attn_qkv": qkv,
        "ffn_up": np.concatenate([changes["gate_proj"], changes["up_proj"]]),
        "attn_output": changes["o_proj"],
    }.items():
        np.testing.assert_allclose(change(path, matrix), whole * 6 / 4, rtol=1e-5, atol=1e-5)


def test_an_adapter_becomes_a_file_on_the_command_line_and_is_not_taken_for_a_model(tmp_path: Path) -> None:
    changes, output = write(tmp_path / "keys", {"k_proj": 4}), tmp_path / "adapter.gguf"
    done = edge_phi3("convert", str(tmp_path / "keys"), "-o", str(output))
    assert (done.returncode, done.stdout) == (0, f"{output}\n"), done.stderr
    whole = np.zeros((WIDTH + 2 * KEYS, WIDTH), np.float32)
    whole[WIDTH : WIDTH + KEYS] = changes["k_proj"]
    np.testing.assert_allclose(change(output, "attn_qkv"), whole * 6 / 4, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConversionError, match=r"mlp is an adapter \(adapter_config.json\).*edge-phi3 convert.*--lora"):
        open_checkpoint(adapters.FOLDER / "mlp")
    with pytest.raises(ModelReferenceError, match=r"mlp is an adapter .*edge-phi3 convert.*--lora"):
        parse_reference(str(adapters.FOLDER / "mlp"))


@pytest.mark.parametrize("rslora", [False, True])
def test_each_module_is_scaled_as_peft_does(tmp_path: Path, rslora: bool) -> None:
    patterns = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"mlp.up_proj|gate_proj": 3}}
    changes = write(tmp_path / "p", {"o_proj": 2, "gate_proj": 4, "up_proj": 4}, use_rslora=rslora, **patterns)
    path = convert(tmp_path / "p", tmp_path / "adapter.gguf").path
    mlp = np.concatenate([changes["gate_proj"], changes["up_proj"]])
    for matrix, whole, alpha, rank in (("attn_output", changes["o_proj"], 6, 2), ("ffn_up", mlp, 3, 4)):
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        np.testing.assert_allclose(change(path, matrix), whole * scale, rtol=1e-5, atol=1e-5)


@cases
def test_what_an_adapter_of_llama_cpp_cannot_be_is_refused(
    tmp_path: Path, config: dict[str, Any], sentence: str
) -> None:
    write(tmp_path / "adapter", {"o_proj": 4}, **config)
    with pytest.raises(ConversionError, match=sentence):
        convert(tmp_path / "adapter", tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


@cases
def test_a_damaged_adapter_is_refused(tmp_path: Path, shapes: dict[str, list[int]], sentence: str) -> None:
    write(tmp_path / "adapter", {})
    tensors = {f"base_model.model.model.layers.0.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match=sentence):
        convert(tmp_path / "adapter", tmp_path / "adapter.gguf")
