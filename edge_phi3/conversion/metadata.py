"""The ``general.*`` keys of a GGUF, and what the checkpoint says on generation.

``general.name`` contains "phi-3" where the vocabulary is Phi-3's, because llama.cpp strips the white space after
``<|user|>``, ``<|end|>`` and ``<|assistant|>`` (as Phi-3's tokenizer does) only in models called so; and nowhere else,
because it cannot load a model called so that has another vocabulary. Beyond llama.cpp's own keys these are written:

- ``general.source.huggingface.repository``, ``general.source.huggingface.revision`` (strings): where the
  checkpoint came from;
- ``edge_phi3.generation.config`` (string): ``generation_config.json`` as a JSON object, for the sampling
  defaults and the special tokens; what it does not say on the latter comes from ``config.json``;
- ``edge_phi3.generation.eos_token_ids`` (int32 array): every token that ends a generation. llama.cpp learns
  of them too, as far as it can: it knows ``<|end|>``, ``<|im_end|>`` and ``<|endoftext|>`` by their text, and takes two
  more as its EOM and EOT tokens;
- ``edge_phi3.generation.pad_token_id`` (uint32).
"""

import json
import logging
import re
from typing import Any, NamedTuple

import gguf

from edge_phi3.conversion import CheckpointError
from edge_phi3.conversion.checkpoint import Checkpoint
from edge_phi3.files import read_bounded, shown

EOS_TOKEN_IDS_KEY = "edge_phi3.generation.eos_token_ids"  # noqa: S105 - a key, no secret
PAD_TOKEN_ID_KEY = "edge_phi3.generation.pad_token_id"  # noqa: S105 - a key, no secret
GENERATION_CONFIG_KEY = "edge_phi3.generation.config"

_MAX_CARD = 4 << 20
_IN_HUB_CACHE = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)$")

_logger = logging.getLogger(__name__)

# What ends a turn of a chat, where no generation_config.json names the ends.
_TURN_ENDS = ("<|end|>", "<|im_end|>")

# Texts by which llama.cpp recognises an end of generation (llama-vocab.cpp), as far as they occur in the family.
_ENDS_BY_TEXT = {"<|end|>", "<|im_end|>", "<|endoftext|>", "</s>"}


class SourceInfo(NamedTuple):
    """Where a checkpoint came from: ``owner/name`` on the Hub, and the commit."""

    repository: str
    revision: str | None = None


def write_general_metadata(
    writer: gguf.GGUFWriter, checkpoint: Checkpoint, source: SourceInfo | None, parameters: int, *, byte_level: bool
) -> None:
    """Add the ``general.*`` keys that describe the model: name, size, licence, and where it came from."""
    if source is None and (found := _IN_HUB_CACHE.search(checkpoint.folder.absolute().as_posix())):
        source = SourceInfo(f"{found['owner']}/{found['name']}", found["revision"])
    card = _model_card(checkpoint)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(_model_name(checkpoint, source, byte_level=byte_level))
    writer.add_size_label(gguf.size_label(parameters, parameters, 0, 0))
    for key in ("license", "license_name", "license_link"):
        if isinstance(value := card.get(key), str):
            getattr(writer, f"add_{key}")(value)
    for key, add_list in (("tags", writer.add_tags), ("language", writer.add_languages)):
        values = card.get(key)
        values = [values] if isinstance(values, str) else values
        if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
            add_list(values)
    if source is not None:
        writer.add_organization(source.repository.partition("/")[0])
        writer.add_source_repo_url(f"https://huggingface.co/{source.repository}")
        writer.add_string("general.source.huggingface.repository", source.repository)
        if source.revision is not None:
            writer.add_string("general.source.huggingface.revision", source.revision)


def _model_name(checkpoint: Checkpoint, source: SourceInfo | None, *, byte_level: bool) -> str:
    """Return the model's name: of its repository, else of ``config.json``, else of its folder."""
    stated = checkpoint.config.get("_name_or_path")
    full = source.repository if source else stated if isinstance(stated, str) and stated else ""
    name = full.rstrip("/").rpartition("/")[2] or shown(checkpoint.folder.absolute().name)
    if byte_level:
        return re.sub("phi-?3", "Phi 3", name, flags=re.IGNORECASE)
    lowered = name.lower()
    return name if "phi-3" in lowered or "phi3" in lowered else f"Phi-3 {name}".strip()


def write_generation_metadata(writer: gguf.GGUFWriter, checkpoint: Checkpoint, tokens: list[str]) -> None:
    """Add the tokens that end a generation, the padding token and the sampling defaults."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: _token_ids(checkpoint, name, len(tokens)) for name in names}
    ends, pads = ids["eos_token_id"], ids["pad_token_id"]
    if checkpoint.generation_config.get("eos_token_id") is None:
        ends += [tokens.index(text) for text in _TURN_ENDS if text in tokens and tokens.index(text) not in ends]
    if ends:
        writer.add_array(EOS_TOKEN_IDS_KEY, ends)
        stated = writer.kv_data[0].get(gguf.Keys.Tokenizer.EOS_ID)
        known = {stated.value} if stated else set()
        unknown = [end for end in ends if end not in known and tokens[end] not in _ENDS_BY_TEXT]
        # EOM first: EOT has a meaning of its own, the end of a turn, which llama.cpp finds by the text "<|end|>".
        for end, add in zip(unknown, (writer.add_eom_token_id, writer.add_eot_token_id), strict=False):
            add(end)
        if len(unknown) > 2:
            _logger.warning(
                "llama.cpp's own tools will not end a generation on %s, only edge-phi3 will.",
                ", ".join(tokens[end] for end in unknown[2:]),
            )
    if pads:
        writer.add_uint32(PAD_TOKEN_ID_KEY, pads[0])
    config = {name: found[0] if len(found) == 1 else found for name, found in ids.items() if found}
    unwanted = {"transformers_version", "_from_model_config", *names}
    config |= {name: value for name, value in checkpoint.generation_config.items() if name not in unwanted}
    writer.add_string(GENERATION_CONFIG_KEY, json.dumps(config))


def _token_ids(checkpoint: Checkpoint, name: str, vocab_size: int) -> list[int]:
    # A null says nothing, as where there is no file: an answer has to end.
    file = "config.json" if checkpoint.generation_config.get(name) is None else "generation_config.json"
    value = (checkpoint.config if file == "config.json" else checkpoint.generation_config).get(name)
    # Libraries write -1 for none.
    ids = [token_id for token_id in (value if isinstance(value, list) else [value]) if token_id not in (None, -1)]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise CheckpointError(f"{file}: {name} holds {token_id!r}, but ids go from 0 to {vocab_size - 1}.")
    return list(dict.fromkeys(ids))


def _model_card(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        read_bounded(checkpoint.folder / "README.md", _MAX_CARD)
        return dict(gguf.Metadata.load_model_card(checkpoint.folder))
    except FileNotFoundError:
        return {}
    except Exception as error:  # noqa: BLE001 - the card is prose; no mistake in it makes the model unfit
        _logger.warning("README.md of the checkpoint has no readable metadata: %s", error)
        return {}
