"""config.json becomes hyper-parameters with the meaning that transformers gives them; tied embeddings among them."""

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_phi3.conversion import CheckpointError, ConversionError, UnsupportedModelError, plan
from edge_phi3.conversion.checkpoint import SafetensorsFile
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.journey import Journey
from edge_phi3.conversion.phi3 import Phi3, read_phi3
from edge_phi3.conversion.plan import to_float32
from edge_phi3.planning.source import find_base
from edge_phi3.progress import SilentProgress
from tests.conversion.conftest import JSON, edit, edited_weights, tensors_of
from tests.golden.checkpoints import long_context, longrope, write_checkpoint
from tests.support.cases import cases, tables

MINI_4K: dict[str, Any] = tables(__file__)["MINI_4K"]
MINI_128K = MINI_4K | long_context(96)


def test_entries_that_transformers_does_not_write_have_its_defaults() -> None:
    absent = {"architectures": ["Phi3ForCausalLM"]}
    assert read_phi3(absent) == read_phi3(MINI_4K | {"sliding_window": None})


ROPE = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["longrope", "su", "default"]) | JSON,
        "long_factor": st.just([1.0] * 48) | JSON,
        **dict.fromkeys(("rope_type", "rope_theta", "short_factor", "attention_factor"), JSON),
        "original_max_position_embeddings": JSON,
    },
)


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(MINI_4K)), JSON | ROPE, max_size=4), rope=st.none() | ROPE)
def test_no_entry_makes_it_fail_in_another_way(changes: dict[str, Any], rope: dict[str, Any] | None) -> None:
    config = MINI_4K | changes | ({"rope_parameters": rope} if rope is not None else {})
    with contextlib.suppress(ConversionError):
        assert isinstance(read_phi3(config), Phi3)


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config with longrope says on rotary positions, comparable."""
    rope = read_phi3(config).rope
    assert rope.longrope is not None
    factors = {name: np.asarray(value).tolist() for name, value in rope.longrope._asdict().items()}
    return rope._asdict() | factors | {"longrope": None, "notes": [*rope.notes]}


SCALING = longrope(96)
FACTORS = {name: values for name, values in SCALING.items() if name != "type"}
DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
NEW: dict[str, Any] = {**DEFAULT, **FACTORS, "rope_type": "longrope", "original_max_position_embeddings": 4096}
PARTS = {"scaling": SCALING, "new": NEW, "default": DEFAULT}
PARTS |= {
    f"{name}er": {f"{name}_factor": [value + 1 for value in FACTORS[f"{name}_factor"]]} for name in ("short", "long")
}
LONG_CONTEXT = MINI_128K | {"rope_scaling": None, "partial_rotary_factor": 1.0}
EXPECTED = rope_of(MINI_128K)
NOTE = "config.json: {} has the factors of longrope and {} the type 'default'; the factors are kept."
SPELLINGS = tables(__file__)["SPELLINGS"]


def joined(parts: list[Any]) -> dict[str, Any]:
    """Return what some parts have together, each a map or the name of one of `PARTS`."""
    return {name: value for part in parts for name, value in PARTS.get(str(part), part).items()}


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
@pytest.mark.parametrize("places", [("rope_scaling", "rope_parameters"), ("rope_parameters", "rope_scaling")])
@pytest.mark.parametrize("other", [None, {}, DEFAULT, {"type": "default"}, {"rope_theta": 10000.0}], ids=str)
def test_either_place_counts(places: tuple[str, str], spelling: dict[str, Any], other: dict[str, Any] | None) -> None:
    config = LONG_CONTEXT | {places[0]: FACTORS | spelling, places[1]: other}
    assert rope_of(config) == EXPECTED | {"notes": [NOTE.format(*places)] if other else []}


@cases
def test_an_entry_may_stand_in_one_place_or_in_both(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    read = {name: joined(value) if isinstance(value, list) else value for name, value in changes.items()}
    assert rope_of(LONG_CONTEXT | read) == EXPECTED | expected
    assert EXPECTED["attention_factor"] == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


@cases
def test_places_that_contradict_are_refused(scaling: list[Any], parameters: list[Any], entry: str) -> None:
    config = LONG_CONTEXT | {"rope_scaling": joined(scaling), "rope_parameters": joined(parameters)}
    words = f"^config.json: rope_scaling and rope_parameters contradict each other on {entry}.*; remove the one"
    with pytest.raises(CheckpointError, match=words):
        read_phi3(config)


@pytest.mark.parametrize("places", [("rope_scaling", "rope_parameters"), ("rope_parameters", "rope_scaling")])
def test_a_type_that_phi3_has_not_is_refused_wherever_it_stands(places: tuple[str, str]) -> None:
    field, neighbour = places
    for kind in ("llama3", 7, ["longrope"]):
        config = LONG_CONTEXT | {field: {"rope_type": kind, "factor": 8.0}, neighbour: SCALING}
        with pytest.raises(UnsupportedModelError, match=f"{field}: the rope scaling type is .*Phi-3 has 'longrope'"):
            read_phi3(config)
    for rope, words in (
        ("longrope", r": expected `object \| null`, got `str`"),
        (SCALING | {"rope_type": "default"}, " has the rope_type 'default' and the type 'longrope'; give"),
    ):
        with pytest.raises(CheckpointError, match=field + words):
            read_phi3(LONG_CONTEXT | {field: rope})


@pytest.mark.parametrize("kind", [{}, {"type": "default"}, {"rope_type": "default"}], ids=str)
def test_factors_without_their_type_have_no_effect_and_are_told(kind: dict[str, Any]) -> None:
    rope = read_phi3(MINI_128K | {"rope_scaling": FACTORS | kind}).rope
    assert rope.longrope is None
    assert rope.notes == tuple(
        f"config.json: rope_scaling has a {name}, but its type is not 'longrope'; as in transformers, it has no effect."
        for name in ("short_factor", "long_factor")
    )


def test_the_file_is_that_of_the_factors_and_a_note_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_checkpoint(tmp_path / "phi-3-long", layers=1, **long_context())
    alone = convert(folder, tmp_path / "alone.gguf").path.read_bytes()
    assert caplog.messages == []
    edit(folder / "config.json", rope_parameters=DEFAULT)
    assert convert(folder, tmp_path / "both.gguf").path.read_bytes() == alone
    assert caplog.messages == [NOTE.format("rope_scaling", "rope_parameters")]


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Bits = NDArray[Any]


@pytest.fixture(params=["bfloat16", "float16", "float32"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of one file with tied embeddings, stored once."""
    return write_checkpoint(tmp_path / "phi-3-tied", layers=1, dtype=request.param, tie_word_embeddings=True)


def embedding_of(checkpoint: Path) -> tuple[str, Bits]:
    """Return the dtype of the embedding, and its bits."""
    tensor = SafetensorsFile(checkpoint / "model.safetensors").tensors[EMBEDDING]
    bits = tensor.read(0, tensor.size).reshape(tensor.shape).copy()
    return tensor.dtype, bits.view(np.uint32) if tensor.dtype == "F32" else bits


def add_head(checkpoint: Path, dtype: str, bits: Bits) -> None:
    """Store an output matrix as well."""
    with edited_weights(checkpoint / "model.safetensors") as (header, data):
        header[HEAD] = {"dtype": dtype, "shape": bits.shape, "data_offsets": [len(data), len(data) + bits.nbytes]}
        data.extend(bits.tobytes())


def converted(checkpoint: Path, name: str, **options: Any) -> Path:
    return convert(checkpoint, checkpoint.parent / f"{name}.gguf", **options).path


@pytest.mark.parametrize("outtype", ["auto", "q8_0"])
def test_a_head_of_its_own_is_kept_and_told(checkpoint: Path, caplog: pytest.LogCaptureFixture, outtype: str) -> None:
    dtype, bits = embedding_of(checkpoint)
    add_head(checkpoint, dtype, bits[::-1])
    kept = converted(checkpoint, "kept", outtype=outtype)
    assert caplog.messages == [
        "config.json: tie_word_embeddings is true, but lm_head.weight is stored and differs from "
        "model.embed_tokens.weight; both are kept, as in transformers 5."
    ]
    caplog.clear()
    edit(checkpoint / "config.json", tie_word_embeddings=False)
    assert kept.read_bytes() == converted(checkpoint, "untied", outtype=outtype).read_bytes()
    assert caplog.messages == []


@pytest.mark.parametrize("widened", [False, True], ids=["the same dtype", "float32"])
def test_one_value_is_difference_enough_wherever_it_lies(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, widened: bool
) -> None:
    monkeypatch.setattr(plan, "_CHUNK", 1000)  # the matrix is compared in many pieces, the last of them short
    dtype, bits = embedding_of(checkpoint)
    if widened:
        dtype, bits = "F32", widen(dtype, bits)
    bits[-1, -1] ^= 1
    add_head(checkpoint, dtype, bits)
    found = tensors_of(converted(checkpoint, "out", outtype="f32"))
    assert len(caplog.messages) == 1
    np.testing.assert_array_equal(found["output.weight"].data.view(np.uint32), widen(dtype, bits))
    assert (found["output.weight"].data != found["token_embd.weight"].data).sum() == 1


def widen(dtype: str, bits: Bits) -> Bits:
    """Return the bits of the values in float32."""
    return bits if dtype == "F32" else to_float32(bits, dtype).view(np.uint32)


@pytest.mark.parametrize("stored", ["the same", "with a negative zero", "in float32"])
def test_the_embedding_once_more_is_left_out(checkpoint: Path, caplog: pytest.LogCaptureFixture, stored: str) -> None:
    dtype, bits = embedding_of(checkpoint)
    if stored == "with a negative zero":
        with edited_weights(checkpoint / "model.safetensors") as (header, data):
            begin = header[EMBEDDING]["data_offsets"][0]
            data[begin : begin + bits[0].nbytes] = bytes(bits[0].nbytes)
        bits[0] = bits.dtype.type(1 << 8 * bits.itemsize - 1)
    if stored == "in float32":
        dtype, bits = "F32", widen(dtype, bits)
    once = converted(checkpoint, "once")
    add_head(checkpoint, dtype, bits)
    assert converted(checkpoint, "twice").read_bytes() == once.read_bytes()
    assert caplog.messages == []
    assert "output.weight" not in tensors_of(once)


def test_what_is_no_head_is_refused_by_name(checkpoint: Path) -> None:
    dtype, bits = embedding_of(checkpoint)
    original = (checkpoint / "model.safetensors").read_bytes()
    for kind, head, sentence in (
        (dtype, bits[1:], r"lm_head.weight has the shape \[\d+, 64\]"),
        ("I8", bits.view(np.int8)[:, :64], "lm_head.weight has the dtype I8"),
    ):
        (checkpoint / "model.safetensors").write_bytes(original)
        add_head(checkpoint, kind, head)
        with pytest.raises(CheckpointError, match=sentence):
            converted(checkpoint, "out")


def test_the_journey_and_the_plan_count_it(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def planned() -> bool:
        layout = find_base(str(checkpoint), tmp_path, store=None, progress=SilentProgress())
        return all(tensor.name != "output.weight" for tensor in layout.tensors)

    assert planned()
    dtype, bits = embedding_of(checkpoint)
    add_head(checkpoint, dtype, bits[::-1])
    assert not planned()
    with caplog.at_level(logging.WARNING):
        stop = Journey(tmp_path, "tied").convert(checkpoint)
    assert len(caplog.messages) == 1
    assert "output.weight" in tensors_of(stop.path)
    (checkpoint / "model.safetensors").unlink()
    assert planned(), "without weights the config alone counts"
