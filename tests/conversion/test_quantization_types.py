"""The table of file types against the llama.cpp that is installed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import llama_cpp
import pytest

from edge_phi3.conversion.quantization_types import (
    ALIASES,
    QUANTIZATION_TYPES,
    UnknownQuantizationError,
    quantization_type,
)
from edge_phi3.conversion.quantize import predict_sizes
from edge_phi3.llama import QuantizerError
from edge_phi3.llama.quantizer import Job, LogReader, QuantizerProcess
from tests.conversion.random_gguf import write_phi3_mini_shapes, write_random


def test_the_table_has_every_type_that_llama_cpp_accepts(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    write_random(source)
    numbers = {
        value
        for name, value in vars(llama_cpp).items()
        if name.startswith("LLAMA_FTYPE_") and name != "LLAMA_FTYPE_GUESSED"
    }
    accepted = set()
    with QuantizerProcess() as process:
        for number in numbers:
            with contextlib.suppress(QuantizerError):
                list(process.run(Job(source=str(source), output=None, ftype=number, threads=1), LogReader()))
                accepted.add(number)
    assert accepted == {type_.ftype for type_ in QUANTIZATION_TYPES.values()}


def test_bits_per_weight_and_the_need_of_a_matrix_are_those_of_phi_3_mini(tmp_path: Path) -> None:
    source = tmp_path / "phi-3-mini-shapes.gguf"
    write_phi3_mini_shapes(source)
    found = {
        plan.type.name: (round(plan.bits_per_weight, 2), plan.needs_imatrix)
        for plan in predict_sizes(source, QUANTIZATION_TYPES)
    }
    assert found == {type_.name: (type_.bits_per_weight, type_.needs_imatrix) for type_ in QUANTIZATION_TYPES.values()}


def test_the_table_goes_from_large_to_small_with_the_special_types_last() -> None:
    order = [(type_.special, -type_.bits_per_weight) for type_ in QUANTIZATION_TYPES.values()]
    assert order == sorted(order)
    assert all(type_.advice.endswith(".") for type_ in QUANTIZATION_TYPES.values())


def test_names_are_found_in_any_case_and_by_their_aliases_and_others_are_answered_with_similar_ones() -> None:
    assert {quantization_type(name).name for name in ("q4_k_m", "Q4_K_M", " Q4_K ", "q4_k")} == {"Q4_K_M"}
    assert {quantization_type(alias).name for alias in ALIASES} == set(ALIASES.values())
    with pytest.raises(UnknownQuantizationError, match=r"'q4km' is not a quantisation type.*Q4_K_M.*--list"):
        quantization_type("q4km")
