"""A model's weights and its vocabulary."""

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, models

from edge_phi3 import byte_level
from edge_phi3.gguf_file import GgufError, GgufFile, read_gguf
from edge_phi3.llama import ModelLoadError
from edge_phi3.llama.backend import initialise_backend, reason
from edge_phi3.llama.model_file import read_model_file

# The threads of `tokenizers` would take the cores from those that decode.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_UNKNOWN, _UNUSED, _CONTROL, _BYTE = 1 << 0, 1 << 1, 1 << 3, 1 << 5
"""Of ``enum llama_token_attr``."""


def load_file(header: GgufFile, params: Any, overrides: Mapping[str, str | int] | None = None) -> Any:
    """Return llama.cpp's handle of a model file; `overrides` take the place of metadata in it."""
    initialise_backend()
    path, replaced = header.path, dict(overrides or {})
    if header.values.get("tokenizer.ggml.model") == byte_level.MODEL:
        # In what is called Phi-3 llama.cpp looks for tokens of Phi-3's vocabulary, and fails without them.
        replaced["general.name"] = "byte-level"
    if replaced:
        params.kv_overrides = metadata_overrides(replaced)
    handle = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if handle:
        return handle
    why = reason()
    if "allocate" in why:
        raise ModelLoadError(
            f"There is not enough memory for {path}{why}. Lower --n-gpu-layers, or choose a smaller"
            " quantisation; `edge-phi3 fit` tells which fits."
        )
    raise ModelLoadError(f"llama.cpp cannot load {path}: it is not a whole GGUF model that this build knows{why}.")


def metadata_overrides(values: Mapping[str, str | int | bool]) -> Any:
    """Return llama.cpp's array of metadata that takes the place of a file's; an empty key ends it."""
    array = (llama_cpp.llama_model_kv_override * (len(values) + 1))()
    for entry, (key, value) in zip(array, values.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, bool):
            entry.tag, entry.value.val_bool = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            entry.tag, entry.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            entry.tag, entry.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()[:127]
    return array


def tokenize(
    vocabulary: Any, text: str, *, add_special: bool = False, parse_special: bool = False
) -> NDArray[np.int32]:
    """Encode a text with llama.cpp's handle of a vocabulary; return token ids, int32, shape (tokens,).

    With `add_special`, add the tokens that the vocabulary puts around a text; with `parse_special`, read ``<|user|>``
    as the token, and not as the characters.
    """
    data = text.encode("utf-8", errors="replace")
    count = -(len(data) + 8)
    while count < 0:
        tokens = np.empty(-count, np.int32)
        pointer = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        count = llama_cpp.llama_tokenize(vocabulary, data, len(data), pointer, len(tokens), add_special, parse_special)
    return tokens[:count].copy()


def _sentencepiece(vocabulary: dict[str, int], scores: Mapping[str, float], unknown: str | None) -> Tokenizer:
    """Return what finds pieces in a text whose spaces are "▁", in time linear in its length, as llama.cpp does not.

    Every way to join two pieces to a third, one of `scores`, is a merge, in the order of the third's score, as in the
    ``tokenizer.json`` that transformers makes of a SentencePiece model. `unknown` is the piece of characters without
    one of their own, where not all bytes are pieces.
    """
    merges = sorted(
        (-score, -cut, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    )
    pairs = [(left, right) for _, _, left, right in merges]
    # What it would keep are not words, but whole texts.
    whole = models.BPE(vocabulary, pairs, cache_capacity=0, byte_fallback=True, unk_token=unknown, fuse_unk=True)
    return Tokenizer(whole)


class _Adapter(NamedTuple):
    handle: Any
    scale: float
    number: int


class Model:
    """A GGUF file of the Phi family in memory: weights, vocabulary and metadata.

    The vocabulary functions are read-only and may be called from any thread.

    Args:
        path: the GGUF file, or its header when it has been read.
        n_gpu_layers: layers kept on the GPU; negative for all.
        overrides: whole numbers that take the place of the file's metadata.
        mapped: whether the file is mapped, and not read whole.
        planned: whether only what a header says is loaded, and no weights.

    Attributes:
        vocabulary: one of `edge_phi3.llama.model_file.VOCABULARIES`, of `vocab_size` tokens.
        bos_token_id: as the file says, like the one `eos_token_id` and `pad_token_id`; -1 for none.
        adds_bos: whether it comes in front of every text.
        context_length: tokens that the model was trained for.
        parameters: how many weights it has in its `layers` and beside them; `size` are the bytes of all.
        chat_template: the Jinja chat template of the file, or None.

    Raises:
        ModelLoadError: the file is missing, is not a GGUF, is damaged, is of another architecture or vocabulary, or
            does not fit the memory.
    """

    def __init__(
        self,
        path: Path | GgufFile,
        *,
        n_gpu_layers: int = -1,
        overrides: Mapping[str, int] | None = None,
        mapped: bool = True,
        planned: bool = False,
    ) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers, params.no_alloc = n_gpu_layers, planned
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_AUTO if mapped and not planned else llama_cpp.LLAMA_LOAD_MODE_NONE
        self._header = read_model_file(path) if isinstance(path, Path) else path
        self.path = path = self._header.path
        self._handle = load_file(self._header, params, overrides)
        self._vocab = llama_cpp.llama_model_get_vocab(self._handle)
        self._adapters: list[_Adapter] = []
        self.vocabulary: str = self._header.values["tokenizer.ggml.model"]
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        try:
            self._encoder  # noqa: B018 - made at once, so that a file that cannot be used fails here
        except ModelLoadError:
            self.close()
            raise
        self.context_length = int(llama_cpp.llama_model_n_ctx_train(self._handle))
        self.layers = int(llama_cpp.llama_model_n_layer(self._handle))
        self.parameters = int(llama_cpp.llama_model_n_params(self._handle))
        self.size = int(llama_cpp.llama_model_size(self._handle))
        template = llama_cpp.llama_model_chat_template(self._handle, None)
        self.chat_template: str | None = template.decode(errors="replace") if template else None
        self.bos_token_id = int(llama_cpp.llama_vocab_bos(self._vocab))
        self.eos_token_id = int(llama_cpp.llama_vocab_eos(self._vocab))
        self.pad_token_id = int(llama_cpp.llama_vocab_pad(self._vocab))
        # The family's tokenizers put no token in front; many GGUFs from elsewhere claim that they do. Ours say what
        # the checkpoint says.
        converted_here = self.metadata("edge_phi3.generation.config") is not None
        self.adds_bos = converted_here and bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))

    @functools.cached_property
    def _encoder(self) -> Tokenizer:
        found = list(enumerate(zip(self.pieces, self.attributes, strict=True)))
        try:
            # Added tokens too: a fine-tune may make one of a word, which merges go on to make.
            tokens = {piece.decode(): token for token, (piece, attributes) in found if not attributes & _UNUSED}
            if self.vocabulary != byte_level.MODEL:
                joined = _UNKNOWN | _UNUSED | _CONTROL | _BYTE
                score = functools.partial(llama_cpp.llama_vocab_get_score, self._vocab)
                scores = {piece.decode(): score(token) for token, (piece, kind) in found if not kind & joined}
                unknown = next((piece.decode() for _, (piece, attributes) in found if attributes & _UNKNOWN), None)
                return _sentencepiece(tokens, scores, unknown)
            return byte_level.tokenizer(
                tokens,
                self._header.values.get("tokenizer.ggml.merges", []),
                self.metadata(byte_level.PATTERN_KEY)
                or byte_level.pattern_of(self.metadata("tokenizer.ggml.pre") or ""),
                ignore_merges=self.metadata(byte_level.IGNORE_MERGES_KEY) == "true",
            )
        except (byte_level.ByteLevelError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"{self.path}: its tokenizer cannot be used: {error}.") from error

    def metadata(self, key: str) -> str | None:
        """Return the text of a metadata value that is not an array, or None when the file has none."""
        size = llama_cpp.llama_model_meta_val_str(self._handle, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        llama_cpp.llama_model_meta_val_str(self._handle, key.encode(), buffer, size + 1)
        return buffer.value.decode(errors="replace")

    @property
    def description(self) -> str:
        """Architecture, number of weights and llama.cpp's name of the file type: ``phi3 3.82 B Q4_K - Medium``."""
        file_type = llama_cpp.llama_ftype_name(llama_cpp.llama_model_ftype(self._handle)).decode()
        count = self.parameters
        size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
        return f"phi3 {size} {file_type}"

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of every token as llama.cpp stores them: ``▁`` for a space, ``<0x0A>`` for a byte."""
        return [llama_cpp.llama_vocab_get_text(self._vocab, token) or b"" for token in range(self.vocab_size)]

    @functools.cached_property
    def attributes(self) -> NDArray[np.int32]:
        """The `llama_token_attr` bits of every token, shape ``(vocab_size,)``."""
        get = llama_cpp.llama_vocab_get_attr
        return np.fromiter((get(self._vocab, token) for token in range(self.vocab_size)), np.int32, self.vocab_size)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of texts without added tokens, in which spaces are "▁" if the vocabulary is not byte-level.

        Other threads have the interpreter meanwhile; the time is linear in the texts' lengths.
        """
        sound = [text.encode("utf-8", errors="replace").decode() for text in texts]
        encodings: list[Encoding] = self._encoder.encode_batch_fast(sound, add_special_tokens=False)
        return encodings

    def load_lora(self, path: Path, scale: float, number: int = 0) -> None:
        """Load a LoRA adapter; contexts made afterwards apply it, scaled by `scale`, when its number is chosen or 0.

        Raises:
            ModelLoadError: the file is missing, or no adapter for this model.
        """
        try:
            changed = {info.name for info in read_gguf(path).tensors}
        except (GgufError, OSError):
            raise ModelLoadError(f"{path} is not a LoRA adapter (GGUF) for {self.path.name}.") from None
        own = {info.name for info in self._header.tensors}
        if "token_embd.weight.lora_a" in changed and "output.weight" not in own:
            # llama.cpp would apply it to the output as well, and end the process for its shape.
            raise ModelLoadError(
                f"{path} changes the embedding, which {self.path.name} shares with its output: merge it into the"
                " model, or train it without embed_tokens."
            )
        adapter = llama_cpp.llama_adapter_lora_init(self._handle, os.fsencode(path))
        if not adapter:
            raise ModelLoadError(f"{path} is not a LoRA adapter (GGUF) for {self.path.name}.")
        if llama_cpp.llama_adapter_get_alora_n_invocation_tokens(adapter):
            raise ModelLoadError(f"{path} is an activated LoRA, which begins in the middle of a prompt: not served.")
        self._adapters.append(_Adapter(adapter, scale, number))

    def close(self) -> None:
        """Free the model. Contexts made from it must be closed before."""
        if self._handle:
            llama_cpp.llama_model_free(self._handle)
            self._handle = None
