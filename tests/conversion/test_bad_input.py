"""A checkpoint that cannot be converted: one sentence, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.errors import CheckpointError, ConversionError, UnsupportedModelError
from tests.golden.checkpoints import longrope, write_checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.layers.0.input_layernorm.weight"

Edit = Callable[..., None]


def refused(checkpoint: Path, error: type[ConversionError], sentence: str, *, outtype: str = "f16") -> None:
    """Assert that a conversion fails with this error and sentence, and that the output's folder stays empty."""
    output = checkpoint.parent / "output" / "out.gguf"
    with pytest.raises(error, match=sentence) as caught:
        convert(checkpoint, output, outtype=outtype)
    assert type(caught.value) is error
    assert not output.parent.exists() or list(output.parent.iterdir()) == []


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file, its data kept."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def poke(path: Path, name: str, value: int) -> None:
    """Set the last bfloat16 of a tensor."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    end = 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][1]
    content[end - 2 : end] = np.uint16(value).tobytes()
    path.write_bytes(content)


def test_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", CheckpointError, "nowhere does not exist; give the folder of a Hugging Face check")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", CheckpointError, "file is not a folder; give the folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", CheckpointError, "has no config.json")
    for content, sentence in (
        ("{", "is not valid JSON"),
        ("[" * 9999, "is not valid JSON"),
        ("[]", "must hold a JSON"),
    ):
        (tmp_path / "empty" / "config.json").write_text(content)
        refused(tmp_path / "empty", CheckpointError, f"config.json {sentence}")


OTHER_MODELS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["LlamaForCausalLM"]}, "the architecture LlamaForCausalLM; only Phi3ForCausalLM can be"),
    ({"architectures": ["Phi3SmallForCausalLM"]}, r"block-sparse attention and a tiktoken vocabulary\); only"),
    ({"architectures": ["Phi3VForCausalLM"]}, r"\(Phi-3-vision has an image encoder\)"),
    ({"architectures": ["PhiMoEForCausalLM"]}, r"\(Phi-3.5-MoE is a mixture of experts\)"),
    ({"architectures": ["Phi4MMForCausalLM"]}, r"\(Phi-4-multimodal has image and speech encoders\)"),
    ({"architectures": ["Phi3ForCausalLM", "Other"]}, "names the architecture Phi3ForCausalLM, Other"),
    ({"architectures": None}, "names no architecture"),
    ({"architectures": 7}, "names the architecture 7"),
    ({"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75, as in Phi-4-mini"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "the rope scaling type is 'linear'; Phi-3 has 'longrope'",
    ),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; Phi-3 has silu"),
    ({"attention_bias": True}, "attention_bias is set"),
    ({"quantization_config": {"quant_method": "gptq"}}, "The checkpoint is quantised already"),
    ({"head_dim": 32}, "head_dim is 32"),
]
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "64"}, "hidden_size: expected `int`, got `str`"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: expected `int` >= 1"),
    ({"num_hidden_layers": 513}, "num_hidden_layers: expected `int` <= 512"),
    ({"num_hidden_layers": True}, "num_hidden_layers: expected `int`, got `bool`"),
    ({"vocab_size": 10**12}, "vocab_size: expected `int` <= 2147483647"),
    ({"sliding_window": -1}, "sliding_window: expected `int` >= 0"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps: number out of range"),
    ({"rope_theta": float("nan")}, "rope_theta: expected `float` > 0"),
    ({"num_attention_heads": 5}, "5 attention heads cannot share a hidden_size of 64"),
    ({"num_attention_heads": 64}, "64 attention heads cannot share a hidden_size of 64"),
    ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
    ({"rope_scaling": longrope(32)}, "short_factor has 16 numbers; half of the head size, 8, are needed"),
    ({"rope_scaling": {"type": "longrope"}}, "short_factor has 0 numbers"),
    ({"rope_scaling": longrope(16) | {"long_factor": [1, "8"]}}, r"long_factor\[1\]: expected `float`, got `str`"),
    ({"rope_scaling": longrope(16) | {"long_factor": [0.0] * 8}}, r"rope_scaling.long_factor\[0\]: expected .* > 0"),
    ({"original_max_position_embeddings": 1}, "original_max_position_embeddings: expected `int` >= 2"),
    ({"eos_token_id": 99999}, "eos_token_id"),
]


@pytest.mark.parametrize(
    ("error", "entries", "sentence"),
    [(UnsupportedModelError, *case) for case in OTHER_MODELS] + [(CheckpointError, *case) for case in IMPOSSIBLE],
)
def test_a_config_of_another_model_or_of_none(
    checkpoint: Path, edit: Edit, error: type[ConversionError], entries: dict[str, Any], sentence: str
) -> None:
    (checkpoint / "generation_config.json").unlink()
    edit(checkpoint / "config.json", **entries)
    refused(checkpoint, error, sentence)


def test_a_missing_or_damaged_shard(checkpoint: Path) -> None:
    (checkpoint / SECOND).write_bytes((checkpoint / SECOND).read_bytes()[:-1])
    refused(checkpoint, CheckpointError, rf"{SECOND} is not a sound safetensors file \(.*incomplete")
    (checkpoint / SECOND).unlink()
    refused(checkpoint, CheckpointError, f"The shard '{SECOND}', which {INDEX} names, is not in")


def test_no_weights(checkpoint: Path) -> None:
    for name in (FIRST, SECOND, INDEX):
        (checkpoint / name).unlink()
    refused(checkpoint, CheckpointError, f"has neither model.safetensors nor {INDEX}")
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    refused(checkpoint, CheckpointError, "has pickled weights .* save it as safetensors first")


NO_MAPS: tuple[Any, ...] = (..., None, [], {"a": 1})


@pytest.mark.parametrize(
    ("weight_map", "sentence"),
    [
        *(({"model.norm.weight": name}, "is not in") for name in ("../x.safetensors", "/etc/hostname", "sub/x", "..")),
        *((wrong, f"{INDEX}: .*weight_map") for wrong in NO_MAPS),
    ],
)
def test_an_index_without_a_map_of_files_beside_it(
    checkpoint: Path, edit: Edit, weight_map: object, sentence: str
) -> None:
    edit(checkpoint / INDEX, weight_map=weight_map)
    refused(checkpoint, CheckpointError, sentence)


def test_an_index_that_disagrees_with_its_shards(checkpoint: Path, edit: Edit) -> None:
    weight_map = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    edit(checkpoint / INDEX, weight_map={k: v for k, v in weight_map.items() if k != NORM})
    refused(checkpoint, CheckpointError, f"holds {NORM}, but {INDEX} does not name it")
    other = FIRST if weight_map[NORM] == SECOND else SECOND
    edit(checkpoint / INDEX, weight_map=weight_map | {NORM: other})
    refused(checkpoint, CheckpointError, f"holds {NORM}, but {INDEX} names {other}")
    edit(checkpoint / INDEX, weight_map=weight_map | {"ghost": FIRST})
    refused(checkpoint, CheckpointError, f"promises ghost in {FIRST}, but it is not there")


def test_tensors_missing_or_surplus(tmp_path: Path, checkpoint: Path, edit: Edit) -> None:
    edit(checkpoint / "config.json", num_hidden_layers=2)
    refused(checkpoint, CheckpointError, r"lacks model.layers.1.input_layernorm.weight, .* 3 more; a shard may be miss")
    checkpoint = write_checkpoint(tmp_path / "two", layers=2)
    edit(checkpoint / "config.json", num_hidden_layers=1)
    refused(checkpoint, CheckpointError, r"has model.layers.1.*and 3 more, which a 1-layer Phi-3 lacks")


def test_a_tensor_of_the_wrong_shape_or_dtype(checkpoint: Path, edit: Edit) -> None:
    edit(checkpoint / "config.json", intermediate_size=80)
    refused(checkpoint, CheckpointError, r"has the shape \[\d+, \d+\], but config.json asks for \[\d+, \d+\]")
    edit(checkpoint / "config.json", intermediate_size=160)
    shard = json.loads((checkpoint / INDEX).read_text())["weight_map"][NORM]
    edit_header(checkpoint / shard, lambda header: header[NORM].update(dtype="I16"))
    refused(checkpoint, CheckpointError, f"{NORM} has the dtype I16; BF16, F16 and F32 can be converted")


def test_weights_that_no_file_can_hold(checkpoint: Path) -> None:
    shard = checkpoint / json.loads((checkpoint / INDEX).read_text())["weight_map"]["lm_head.weight"]
    poke(shard, "lm_head.weight", 0x7FC0)
    refused(checkpoint, CheckpointError, "lm_head.weight has NaN or infinite values")
    poke(shard, "lm_head.weight", 0x4880)
    refused(checkpoint, ConversionError, "lm_head.weight has values too large for f16; convert to bf16 or f32")
    convert(checkpoint, checkpoint.parent / "out.gguf", outtype="bf16")


def test_a_vocabulary_that_does_not_fit_the_embedding(checkpoint: Path, edit: Edit) -> None:
    edit(checkpoint / "config.json", vocab_size=700)
    refused(checkpoint, CheckpointError, r"model.embed_tokens.weight|lm_head.weight")


def test_more_tokens_than_rows(tmp_path: Path, edit: Edit) -> None:
    checkpoint = write_checkpoint(tmp_path / "narrow", layers=1, vocab_size=600)
    refused(checkpoint, CheckpointError, r"tokenizer.model has \d+ pieces, but the model's vocab_size is 600")
    checkpoint = write_checkpoint(tmp_path / "tight", layers=1, vocab_size=660)
    refused(checkpoint, CheckpointError, r"has the id 66\d, but the model's vocab_size is 660")
