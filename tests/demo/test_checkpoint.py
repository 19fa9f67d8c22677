"""The bundled checkpoint is whole, small, and a Phi-3 in every field."""

import json
import math
import struct

import numpy as np
import pytest

from edge_phi3.demo import DEMO_CHECKPOINT

FILES = {
    "README.md",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "loss.svg",
    "model.safetensors",
    "questions.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "training.json",
}


def read(name):
    return json.loads((DEMO_CHECKPOINT / name).read_text("utf-8"))


@pytest.fixture(scope="module")
def config():
    return read("config.json")


@pytest.fixture(scope="module")
def weights():
    """The safetensors header and the payload as raw bytes."""
    data = (DEMO_CHECKPOINT / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return header, data[8 + length :]


def expected_shapes(config):
    hidden, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = hidden // config["num_attention_heads"]
    fused = hidden + 2 * config["num_key_value_heads"] * head
    shapes = {
        "model.embed_tokens.weight": [rows, hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [rows, hidden],
    }
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.input_layernorm.weight": [hidden],
            f"model.layers.{layer}.post_attention_layernorm.weight": [hidden],
            f"model.layers.{layer}.self_attn.qkv_proj.weight": [fused, hidden],
            f"model.layers.{layer}.self_attn.o_proj.weight": [hidden, hidden],
            f"model.layers.{layer}.mlp.gate_up_proj.weight": [2 * inner, hidden],
            f"model.layers.{layer}.mlp.down_proj.weight": [hidden, inner],
        }
    return shapes


def test_the_folder_holds_these_files_and_no_others():
    assert {file.name for file in DEMO_CHECKPOINT.iterdir()} == FILES


def test_the_folder_is_small_enough_for_the_wheel():
    assert sum(file.stat().st_size for file in DEMO_CHECKPOINT.iterdir()) <= 16_000_000
    assert (DEMO_CHECKPOINT / "loss.svg").stat().st_size <= 60_000


def test_tensors_are_those_of_the_configuration(config, weights):
    header, _ = weights
    shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    assert shapes == expected_shapes(config)
    assert sum(math.prod(shape) for shape in shapes.values()) == read("training.json")["parameters"]


def test_every_byte_of_the_weights_belongs_to_one_bf16_tensor(weights):
    header, payload = weights
    end = 0
    for entry in sorted((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"]):
        assert entry["dtype"] == "BF16"
        first, last = entry["data_offsets"]
        assert first == end
        assert last - first == 2 * math.prod(entry["shape"])
        end = last
    assert end == len(payload)


def test_weights_are_finite_and_trained(weights):
    header, payload = weights
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        bits = np.frombuffer(payload[slice(*entry["data_offsets"])], dtype="<u2").astype(np.uint32) << 16
        values = bits.view(np.float32).reshape(entry["shape"])
        assert np.isfinite(values).all(), name
        assert values.std() > 1e-3, name
        assert np.abs(values).max() < 100, name


def test_rows_suit_k_quants(weights):
    header, _ = weights
    rows = {entry["shape"][-1] for name, entry in header.items() if name != "__metadata__"}
    assert all(row % 256 == 0 for row in rows)


def test_configuration_is_phi_3_mini_4k_in_all_but_size(config):
    assert config["architectures"] == ["Phi3ForCausalLM"]
    assert config["model_type"] == "phi3"
    assert config["torch_dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == config["original_max_position_embeddings"] == 4096
    assert config["sliding_window"] == 2047
    assert config["rope_theta"] == 10000.0
    assert config["rope_scaling"] is None
    assert config["rms_norm_eps"] == 1e-5
    assert config["hidden_act"] == "silu"
    assert config["num_key_value_heads"] == config["num_attention_heads"]
    assert not config["tie_word_embeddings"]


def test_generation_ends_where_phi_3_ends(config):
    vocabulary = read("added_tokens.json")
    end, assistant, turn = (vocabulary[text] for text in ("<|endoftext|>", "<|assistant|>", "<|end|>"))
    generation = read("generation_config.json")
    assert generation["eos_token_id"] == [end, assistant, turn]
    assert generation["pad_token_id"] == config["pad_token_id"] == config["eos_token_id"] == end
    assert generation["bos_token_id"] == config["bos_token_id"] == 1
    assert max(vocabulary.values()) < config["vocab_size"]
