"""Checkpoints as people have them: saved by other libraries, wrapped, split, with files that are stale, or no model."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_phi3.conversion import CheckpointError, ConversionError, UnsupportedModelError
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.metadata import EOS_TOKEN_IDS_KEY, GENERATION_CONFIG_KEY, PAD_TOKEN_ID_KEY
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.planning.source import find_base
from edge_phi3.progress import SilentProgress
from tests.conversion.conftest import edit, fields_of, tensors_of
from tests.conversion.edits import (
    FIRST,
    GHOST,
    INDEX,
    LEFT_OVER,
    LLAMA,
    MISTRAL,
    NORM,
    SECOND,
    Edit,
    adapter,
    buffers,
    config,
    each,
    index,
    marked,
    merge_adapter,
    moved_into,
    one_shard,
    only,
    quantised,
    real,
    removed,
    renamed,
    split,
    split_as,
    stated,
    stored_anew,
    template_file,
    twice,
    ungathered,
    utf16,
    widened,
    without_index,
    without_tokenizer,
    written,
)
from tests.golden.checkpoints import longrope, write_checkpoint
from tests.support.engines import ask, running_engine


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in two shards with fewer key heads than heads. Not to be changed."""
    folder = tmp_path_factory.mktemp("original") / "phi-3-tiny"
    return write_checkpoint(folder, layers=1, dtype="bfloat16", shards=2, kv_heads=2)


@pytest.fixture(scope="module")
def expected(original: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return convert(original, tmp_path_factory.mktemp("expected") / "out.gguf").path.read_bytes()


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


NEW_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}
NULLS = dict.fromkeys(
    ("hidden_act", "attention_bias", "rope_scaling", "rope_parameters", "head_dim", "quantization_config",
     "tie_word_embeddings", "torch_dtype", "dtype", "partial_rotary_factor", "model_type")
)  # fmt: skip
LEFT_BY_TRAINERS: dict[str, Any] = {
    "unsloth_version": "2025.3.1", "unsloth_fixed": True, "text_config": {"hidden_size": 1}, "vision_config": None,
    "dtype": "float16", "torch_dtype": "float32", "use_cache": False, "layer_types": ["full_attention"],
    "_attn_implementation_autoset": True, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "head_dim": None,
}  # fmt: skip
WRAPPED = ("PeftModelForCausalLM", "FSDPPhi3ForCausalLM", "OptimizedModule", "AutoModelForCausalLMWithValueHead")
PREFIXES = ("base_model.model.", "module.", "_orig_mod.", "language_model.", "pretrained_model.")
STALE = "names ghost.weight, which no file has"

SAME: dict[str, tuple[Edit, str | None]] = {
    "no architectures": (config(architectures=...), None),
    "architectures null": (config(architectures=None), None),
    "architectures empty": (config(architectures=[]), None),
    **{name: (config(architectures=[name]), None) for name in WRAPPED},
    "what trainers leave in config.json": (config(**LEFT_BY_TRAINERS), None),
    "nulls": (config(**NULLS), None),
    "what transformers 5 writes": (config(torch_dtype=..., dtype="bfloat16", rope_theta=..., **NEW_ROPE), None),
    "rope_scaling {}": (config(rope_scaling={}), None),
    "rope_scaling default": (config(rope_scaling={"type": "default"}), None),
    "head_dim": (config(head_dim=16), None),
    "swish": (config(hidden_act="swish"), None),
    "a left-over quantization_config": (
        config(quantization_config=LEFT_OVER),
        r"config.json has a quantization_config \(bitsandbytes\), but no weight is quantised; it has no effect",
    ),
    "names without model.": (renamed(lambda name: name.removeprefix("model.")), None),
    **{prefix: (renamed(prefix.__add__), None) for prefix in PREFIXES},
    "wrappers within": (renamed(lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module.")), None),
    "base_layer": (renamed(lambda name: name.replace("proj.", "proj.base_layer.")), None),
    "split, Phi-3": (split, None),
    "q, k, v split alone": (lambda folder: split(folder, "qkv"), None),
    "split, Llama": (split_as(**LLAMA), None),
    "split, Mistral": (split_as(**MISTRAL), None),
    "split, Llama by its type": (split_as(**LLAMA | {"architectures": None}), None),
    "split and wrapped": (each(split, renamed(lambda name: f"base_model.model.{name}")), None),
    "one shard, no index": (one_shard, None),
    "two shards, no index": (without_index(FIRST, SECOND), None),
    "shards with odd names": (without_index("a.safetensors", "b.safetensors"), None),
    "an index with a ghost": (index(lambda found: found | {"ghost.weight": FIRST}), STALE),
    "an index with a buffer": (index(lambda found: found | {GHOST: "model-00003-of-00003.safetensors"}), "inv_freq"),
    "an index without a tensor": (
        index(lambda found: {k: v for k, v in found.items() if k != NORM}), f"does not say where {NORM} is"
    ),
    "an index without a shard": (
        index(lambda found: {k: v for k, v in found.items() if v == FIRST}), "does not say where .* and . more is"
    ),
    "an index with the wrong shard": (index(lambda found: found | {NORM: FIRST}), f"does not say where {NORM} is"),
    "an index of older shards": (
        index(lambda found: {k: v.replace("00002.s", "00003.s") for k, v in found.items()}), "does not say where"
    ),
    "an index in another order": (index(lambda found: dict(reversed(found.items()))), None),
    "an empty index": (index(lambda _: {}), None),
    "a tensor twice": (twice, f"{NORM} of {SECOND} is {NORM} of {FIRST} once more"),
    "buffers": (buffers, None),
    "an adapter beside": (each(*map(written, ("adapter_config.json", "adapter_model.safetensors"))), None),
    "an adapter and a value head beside shards without an index": (
        each(removed(INDEX), *map(written, ("adapter_model.safetensors", "value_head.safetensors"))), None
    ),
    "other shards beside": (written("consolidated-00001-of-00002.safetensors"), None),
    "pickles beside": (each(*map(written, ("pytorch_model.bin", "optimizer.pt", "rng_state_0.pth"))), None),
    "byte-order marks": (marked, None),
    "chat_template.jinja": (template_file, None),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_it_is_the_same_model(
    name: str, checkpoint: Path, expected: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, note = SAME[name]
    change(checkpoint)
    found = convert(checkpoint, tmp_path / "out.gguf").path
    assert found.read_bytes() == expected
    assert (caplog.messages == []) == (note is None), caplog.messages
    assert note is None or any(re.search(note, message) for message in caplog.messages)


CHECKPOINT, UNSUPPORTED = CheckpointError, UnsupportedModelError
COMMAND = r"python -c .*M.from_pretrained\(.*phi-3-tiny.*save_pretrained\(.*phi-3-tiny-safetensors"

REFUSED: dict[str, tuple[Edit, type[ConversionError], str]] = {
    "UTF-16": (utf16("config.json"), CHECKPOINT, r"config.json is not in UTF-8 \(.*; save it as UTF-8"),
    "an index in UTF-16": (utf16(INDEX), CHECKPOINT, "index.json is not in UTF-8"),
    "a tokenizer in UTF-16": (utf16("tokenizer_config.json"), CHECKPOINT, "tokenizer_config.json is not in UTF-8"),
    "an id in quotes": (stated(bos_token_id="1"), CHECKPOINT, "config.json: bos_token_id holds '1'"),
    "an id of -2": (stated(pad_token_id=-2), CHECKPOINT, "config.json: pad_token_id holds -2"),
    "an adapter": (adapter, CHECKPOINT, "adapter_config.json: object missing required field `r`"),
    "an adapter and its config": (
        each(only("adapter_config.json"), written("adapter_model.safetensors")),
        CHECKPOINT, "adapter_config.json is not valid JSON",
    ),
    "an adapter within": (renamed(merge_adapter), UNSUPPORTED, "an adapter that is not merged yet.*merge_and_unload"),
    "int8 weights": (quantised("I8"), UNSUPPORTED, r"already \(bitsandbytes\): .*o_proj.weight has the dtype I8"),
    "int8 weights and scales": (quantised("I8", "SCB"), UNSUPPORTED, r"quantised already .* or load it .* dequantize"),
    "scales alone": (quantised("F8_E4M3", "weight_scale_inv"), UNSUPPORTED, "quantised already"),
    "pytorch_model.bin": (only("pytorch_model-00001-of-00002.bin"), UNSUPPORTED, f"a pickle, which can run.*{COMMAND}"),
    "consolidated.00.pth": (only("consolidated.00.pth"), UNSUPPORTED, "consolidated.00.pth, a pickle"),
    "tf_model.h5": (only("tf_model.h5"), UNSUPPORTED, "has its weights in tf_model.h5, a file of TensorFlow's format"),
    "a pickle beside a trainer's": (
        each(only("pytorch_model.bin"), written("optimizer.pt")), UNSUPPORTED, "its weights in pytorch_model.bin, a pi"
    ),
    "nothing": (
        each(*map(only, ("training_args.bin", "optimizer.pt", "rng_state_0.pth"))),
        CHECKPOINT, r"has neither model.safetensors nor .* safetensors\.$",
    ),
    "a folder of checkpoints": (
        moved_into("config.json", "checkpoint-500", "checkpoint-1000"),
        CHECKPOINT, "config.json; give one .* as checkpoint-1000",
    ),
    "weights in a folder within": (
        moved_into("*.safetensors*", "checkpoint-500"), CHECKPOINT, "safetensors; give one .* as checkpoint-500"
    ),
    "weights that were not gathered": (stored_anew(ungathered), CHECKPOINT, r"\[0\], .* \[64\]; DeepSpeed left it so"),
    "a tensor twice, another": (lambda f: twice(f, 1), CHECKPOINT, f"{NORM} of {SECOND} and .* are both {NORM}"),
    "a shard less": (removed(SECOND), CHECKPOINT, f"The shard '{SECOND}', which .* names, is not in"),
    "a shard less, no index": (
        removed(SECOND, INDEX), CHECKPOINT, "lacks .*; a shard may be missing"
    ),
    "q without k": (
        each(split, renamed(lambda name: name.replace("k_proj", "x_proj"))),
        CHECKPOINT, "lacks model.layers.0.self_attn.k_proj.weight",
    ),
    "both q and qkv": (
        renamed(lambda name: name.replace("o_proj", "q_proj")), CHECKPOINT, "lacks model.layers.0.self_attn.o_proj"
    ),
    "k of q's size": (
        each(split, config(num_key_value_heads=4)), CHECKPOINT, r"[kv]_proj.weight has the shape \[32,"
    ),
    "a real Llama": (real("llama"), UNSUPPORTED, "LlamaForCausalLM; only Phi3ForCausalLM can be converted, or a copy"),
    "a real Mistral": (real("mistral"), UNSUPPORTED, "names the architecture MistralForCausalLM; only Phi3ForCausalLM"),
    "a Llama with fused projections": (config(**LLAMA), UNSUPPORTED, "the architecture LlamaForCausalLM; only Phi3"),
    "a classifier": (
        config(architectures=["Phi3ForSequenceClassification"]), UNSUPPORTED, "sorts texts into classes"
    ),
    "another model_type": (config(architectures=None, model_type="phimoe"), UNSUPPORTED, "the architecture phimoe; "),
    "no tokenizer": (
        without_tokenizer, CHECKPOINT, "neither tokenizer.model nor"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str, checkpoint: Path, tmp_path: Path) -> None:
    change, error, sentence = REFUSED[name]
    change(checkpoint)
    output = tmp_path / "output" / "out.gguf"
    with pytest.raises(error, match=sentence) as caught:
        convert(checkpoint, output)
    assert type(caught.value) is error
    assert not output.parent.exists()


def test_factors_in_the_spelling_of_old_revisions(checkpoint: Path, tmp_path: Path) -> None:
    scaling = longrope(16)
    found = []
    for spelling in ({"type": "longrope"}, {"rope_type": None, "type": "su"}, {"rope_type": "longrope"}):
        factors = {name: scaling[name] for name in ("short_factor", "long_factor")}
        edit(checkpoint / "config.json", max_position_embeddings=131072, rope_scaling=factors | spelling)
        found.append(convert(checkpoint, tmp_path / "out.gguf", force=True).path.read_bytes())
    assert found[0] == found[1] == found[2]
    assert "rope_factors_long.weight" in tensors_of(tmp_path / "out.gguf")


@pytest.mark.parametrize("wanted", ["norm", "lm_head", "q_proj", "up_proj"])
def test_tensors_of_different_types_are_the_same_values(checkpoint: Path, tmp_path: Path, wanted: str) -> None:
    before = tensors_of(convert(checkpoint, tmp_path / "before.gguf", outtype="f32").path)
    split(checkpoint)
    widened(wanted)(checkpoint)
    after = tensors_of(convert(checkpoint, tmp_path / "after.gguf", outtype="f32").path)
    assert {name: tensor.data.tobytes() for name, tensor in before.items()} == {
        name: tensor.data.tobytes() for name, tensor in after.items()
    }
    assert convert(checkpoint, tmp_path / "auto.gguf").outtype == "bf16", "that of most values"


@pytest.mark.parametrize("outtype", ["q8_0", "f16"])
def test_split_matrices_are_quantised_as_fused_ones(
    original: Path, checkpoint: Path, tmp_path: Path, outtype: str
) -> None:
    split(checkpoint)
    found = [convert(folder, tmp_path / f"{i}", outtype=outtype) for i, folder in enumerate((original, checkpoint))]
    assert found[0].path.read_bytes() == found[1].path.read_bytes()


def test_a_padding_token_of_minus_one_is_none(checkpoint: Path, tmp_path: Path) -> None:
    plain = fields_of(convert(checkpoint, tmp_path / "out.gguf").path)
    edit(checkpoint / "config.json", pad_token_id=-1)
    assert fields_of(convert(checkpoint, tmp_path / "out.gguf", force=True).path) == plain, (
        "generation_config.json counts"
    )
    edit(checkpoint / "generation_config.json", pad_token_id=None, eos_token_id=[-1, *plain[EOS_TOKEN_IDS_KEY]])
    found = fields_of(convert(checkpoint, tmp_path / "out.gguf", force=True).path)
    assert PAD_TOKEN_ID_KEY not in found
    assert found[EOS_TOKEN_IDS_KEY] == plain[EOS_TOKEN_IDS_KEY]
    assert "pad_token_id" not in json.loads(found[GENERATION_CONFIG_KEY])


def test_a_chat_template_among_named_ones(checkpoint: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages }}"}]
    for template in (named, {entry["name"]: entry["template"] for entry in named}):
        edit(checkpoint / "tokenizer_config.json", chat_template=template)
        found = fields_of(convert(checkpoint, tmp_path / "out.gguf", force=True).path)
        assert found["tokenizer.chat_template"] == "{{ messages }}"
    (checkpoint / "chat_template.jinja").write_bytes(b"\xef\xbb\xbffile")
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "rag.jinja").write_text("rag")
    for left in ("tokenizer.json", "tokenizer_config.json"):
        found = fields_of(convert(checkpoint, tmp_path / "out.gguf", force=True).path)
        assert found["tokenizer.chat_template"] == "file"
        assert found["tokenizer.chat_template.rag"] == "rag"
        (checkpoint / left).unlink()


def test_fit_knows_a_copy_by_its_tokens(checkpoint: Path, tmp_path: Path) -> None:
    split_as(**MISTRAL, sliding_window=None)(checkpoint)
    assert find_base(str(checkpoint), tmp_path, store=None, progress=SilentProgress()).layers == 1


def test_a_chat_ends_with_its_turn_where_nothing_names_the_ends(tmp_path: Path) -> None:
    demo = shutil.copytree(DEMO_CHECKPOINT, tmp_path / "phi-3-demo")
    (demo / "generation_config.json").unlink()
    with running_engine(convert(demo, tmp_path / "out.gguf").path) as engine:
        prompt = engine.model.tokenizer.encode("<|user|>\nWhat does json.dumps do?<|end|>\n<|assistant|>\n")
        answer = ask(engine, prompt, max_new_tokens=100, do_sample=False)[0]
        assert answer[-1] == engine.model.tokenizer.special_token("<|end|>")
        assert 5 < len(answer) < 50
