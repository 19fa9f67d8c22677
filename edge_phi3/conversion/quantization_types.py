"""The file types that llama.cpp's quantiser writes, and what each is good for."""

import difflib
import json
from pathlib import Path
from typing import NamedTuple

from edge_phi3.errors import EdgePhi3Error


class UnknownQuantizationError(EdgePhi3Error):
    """A quantisation type, or the type of a single tensor, that llama.cpp does not have."""


class QuantizationType(NamedTuple):
    """A file type: a recipe that gives each tensor of a model its own tensor type.

    `ftype` is its number in llama.cpp's ``enum llama_ftype``; `bits_per_weight` are Phi-3-mini's, all tensors counted,
    and other shapes differ a little. Models are trained or built for the `special` ones, and Phi-3 is not.
    """

    name: str
    ftype: int
    bits_per_weight: float
    needs_imatrix: bool
    advice: str
    special: bool = False

    @property
    def uses_imatrix(self) -> bool:
        """Whether the quantiser heeds an importance matrix: it does for types of fewer than 8 bits."""
        return self.bits_per_weight < 8


_TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
QUANTIZATION_TYPES: dict[str, QuantizationType] = {fields[0]: QuantizationType(*fields) for fields in _TABLE}
"""Every file type of this llama.cpp, from large to small; the special ones at the end."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Short names that `llama-quantize` understands too."""


def quantization_type(name: str) -> QuantizationType:
    """Return the file type of a name, whatever its case."""
    wanted = name.strip().upper()
    found = QUANTIZATION_TYPES.get(ALIASES.get(wanted, wanted))
    if found is None:
        raise UnknownQuantizationError(
            f"{name!r} is not a quantisation type; {_close(wanted, QUANTIZATION_TYPES)}"
            " `edge-phi3 quantize --list` shows them all."
        )
    return found


def tensor_type_number(name: str, numbers: dict[str, int], option: str) -> int:
    """Return the number of a tensor type (``enum ggml_type``) from its name, whatever its case.

    `numbers` are those of this llama.cpp, by lower-case names; `option` is what the name was given to.
    """
    found = numbers.get(name.strip().lower())
    if found is None:
        raise UnknownQuantizationError(
            f"{option}: {name!r} is not a tensor type that llama.cpp writes; {_close(name.lower(), numbers)}"
            f" All of them: {', '.join(sorted(numbers))}."
        )
    return found


def _close(wanted: str, names: dict[str, QuantizationType] | dict[str, int]) -> str:
    close = difflib.get_close_matches(wanted, list(names), n=4, cutoff=0.4)
    return f"close to it are {', '.join(close)}." if close else "no name is close to it."
