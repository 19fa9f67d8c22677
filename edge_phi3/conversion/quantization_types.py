"""The file types that llama.cpp's quantiser writes, and what each is good for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from edge_phi3.errors import EdgePhi3Error


class UnknownQuantizationError(EdgePhi3Error):
    """A quantisation type, or the type of a single tensor, that llama.cpp does not have."""


@dataclass(frozen=True, slots=True)
class QuantizationType:
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


QUANTIZATION_TYPES: dict[str, QuantizationType] = {
    type_.name: type_
    for type_ in (
        QuantizationType("F32", 0, 32.0, False, "Full precision: for comparisons, not for serving."),
        QuantizationType("BF16", 32, 16.0, False, "What the checkpoints are published in, bit for bit."),
        QuantizationType("F16", 1, 16.0, False, "Half precision: the usual source for the other types."),
        QuantizationType("Q8_0", 7, 8.5, False, "Hard to tell from F16: choose it when it fits."),
        QuantizationType("Q6_K", 18, 6.56, False, "Close to Q8_0 at three quarters of its size."),
        QuantizationType("Q5_1", 9, 6.02, False, "An older type: Q5_K_M is smaller and better."),
        QuantizationType("Q5_K_M", 17, 5.77, False, "A step up from Q4_K_M when there is room."),
        QuantizationType("Q5_K_S", 16, 5.53, False, "Q5_K_M with fewer tensors in more bits."),
        QuantizationType("Q5_0", 8, 5.53, False, "An older type: Q5_K_S is better at the same size."),
        QuantizationType("Q4_1", 3, 5.04, False, "An older type: Q4_K_M is better at the same size."),
        QuantizationType("Q4_K_M", 15, 5.02, False, "The default: a good balance of size, speed and quality."),
        QuantizationType("Q4_K_S", 14, 4.61, False, "Q4_K_M with fewer tensors in more bits."),
        QuantizationType("Q3_K_L", 13, 4.61, False, "On Phi-3 as large as Q4_K_S, which is better."),
        QuantizationType("IQ4_NL", 25, 4.58, False, "4 bits, non-linear, in blocks of 32; better with a matrix."),
        QuantizationType("Q4_0", 2, 4.55, False, "The simplest 4 bits, fast on many CPUs; better with a matrix."),
        QuantizationType("IQ4_XS", 30, 4.34, False, "The smallest 4-bit type; better with a matrix."),
        QuantizationType("Q3_K_M", 12, 4.11, False, "3 bits with the attention in more; the loss shows."),
        QuantizationType("IQ3_M", 27, 3.88, False, "The best 3-bit type for its size; use a matrix."),
        QuantizationType("IQ3_S", 26, 3.52, False, "3 bits, non-linear; use a matrix."),
        QuantizationType("Q3_K_S", 11, 3.52, False, "An older type: IQ3_S is better at the same size."),
        QuantizationType("IQ3_XS", 22, 3.40, True, "A little under IQ3_S."),
        QuantizationType("IQ3_XXS", 23, 3.36, True, "The smallest 3-bit type."),
        QuantizationType("Q2_K", 10, 3.16, False, "The smallest type that does without a matrix; the loss is large."),
        QuantizationType("IQ2_M", 29, 2.96, True, "The best 2-bit type; the loss is large."),
        QuantizationType("IQ2_S", 28, 2.81, True, "A little under IQ2_M."),
        QuantizationType("Q2_K_S", 21, 2.78, True, "An older type: IQ2_S is better at the same size."),
        QuantizationType("IQ2_XS", 20, 2.49, True, "For when nothing larger fits."),
        QuantizationType("IQ2_XXS", 19, 2.32, True, "The smallest 2-bit type, for when nothing larger fits."),
        QuantizationType("IQ1_M", 31, 2.13, True, "An experiment: answers degrade heavily."),
        QuantizationType("IQ1_S", 24, 2.01, True, "An experiment: the smallest, and the worst."),
        QuantizationType("MXFP4_MOE", 38, 8.5, False, "For mixtures of experts; gives Phi-3 Q8_0.", special=True),
        QuantizationType("Q2_0", 41, 2.42, False, "Only for models trained for 2 bits.", special=True),
        QuantizationType("TQ2_0", 37, 2.24, False, "Only for models trained with three values.", special=True),
        QuantizationType("TQ1_0", 36, 1.89, False, "As TQ2_0; smaller, and slower.", special=True),
        QuantizationType("Q1_0", 40, 1.27, False, "Only for models trained for 1 bit.", special=True),
    )
}
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
