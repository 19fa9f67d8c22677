"""Byte-level vocabularies, as Phi-4 and Phi-4-mini have them: their pre-tokenizers, and the bytes behind their tokens.

Texts are encoded by Hugging Face's `tokenizers`. llama.cpp's own rules for these vocabularies are approximations (it
knows upper and lower case and combining marks of ASCII only), and its regular expressions recurse: a long word
overflows the stack.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from edge_phi3.errors import EdgePhi3Error

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_SUFFIXES = "'s|'S|'t|'T|'re|'rE|'Re|'RE|'ve|'vE|'Ve|'VE|'m|'M|'ll|'lL|'Ll|'LL|'d|'D"
PATTERNS: Final[Mapping[str, tuple[str, ...]]] = {
    name: (pattern, pattern.replace("?i:'s|'t|'re|'ve|'m|'ll|'d", _SUFFIXES))
    for name, pattern in {"gpt-4o": _O200K, "dbrx": _CL100K, "gpt-2": _GPT2}.items()
}
"""The regular expressions that cut a text into words, by llama.cpp's name of them (``tokenizer.ggml.pre``).

The first is the one that published checkpoints have; the others differ from it in a handful of characters.
"""

MODEL: Final = "gpt2"
"""What GGUF calls these vocabularies (``tokenizer.ggml.model``)."""

PATTERN_KEY: Final = "edge_phi3.tokenizer.pattern"
IGNORE_MERGES_KEY: Final = "edge_phi3.tokenizer.ignore_merges"
"""Metadata of our own: a regular expression that is not the first of its name, and whether words go before merges."""


class ByteLevelError(EdgePhi3Error):
    """A vocabulary that `tokenizers` refuses, or whose words nobody knows how to find."""


def pattern_of(pre: str) -> str:
    """Return the regular expression of a name; `ByteLevelError` when it is not in `PATTERNS`."""
    if pre not in PATTERNS:
        raise ByteLevelError(f"its pre-tokenizer is {pre!r}, and {', '.join(PATTERNS)} are known")
    return PATTERNS[pre][0]


_VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTE_OF_CHARACTER = {chr(byte): byte for byte in _VISIBLE}
_BYTE_OF_CHARACTER |= {chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)).difference(_VISIBLE)))}
"""The byte that each character stands for: itself if it can be seen, or one from U+0100 on (GPT-2's)."""


def bytes_of(token: str) -> bytes:
    """Return the bytes that a token of the vocabulary stands for; those of its own text if it has other characters."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()


def tokenizer(vocabulary: Mapping[str, int], merges: Iterable[str], pattern: str, *, ignore_merges: bool) -> Tokenizer:
    """Return what encodes a text without added tokens, in words that a regular expression finds.

    `merges` are pairs of tokens, a space between, the first to be merged first; with `ignore_merges` a word that is a
    token is one whatever they make of it. `ByteLevelError`: one makes a token that the vocabulary lacks, or the pattern
    is none.
    """
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        made = Tokenizer(models.BPE(dict(vocabulary), pairs, ignore_merges=ignore_merges))
        words = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # the library raises Exception itself
        raise ByteLevelError(f"its merges and words do not fit its vocabulary ({error})") from error
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return made
