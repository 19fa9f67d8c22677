"""The cases of the text side, shared by recorder and tests: what goes into transformers' text-generation pipeline.

``pipeline.json`` holds the texts. The random model speaks gibberish full of byte tokens, special tokens and odd spaces,
which is what the text side must get right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.golden.checkpoints import write_checkpoint

GOLDEN = Path(__file__).with_name("pipeline.json")

_CHAT = "<|user|>\nHow to explain Internet for a medieval knight?<|end|>\n<|assistant|>\n"
_PROMPTS = (
    _CHAT,
    "<|user|> How to explain Internet for a medieval knight?<|end|><|assistant|>",
    "Once upon a time , there was n't much .",
    "  leading spaces",
    "trailing newline\n",
    "emoji 🙂 and ümläuts, \u3000wide",
    "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n",
)
_TALK = [
    {"role": "user", "content": "I am going to Paris, what should I see?"},
    {"role": "assistant", "content": "The Eiffel Tower."},
    {"role": "user", "content": "What is so great about #1?"},
]


def write_model(folder: Path) -> Path:
    """Write the random checkpoint that the cases run on; it generates up to 192 tokens in all."""
    return write_checkpoint(folder, seed=11, hidden_size=64, heads=4, layers=2, max_position_embeddings=192)


def cases() -> list[dict[str, Any]]:
    """List the arguments of each call; ``kwargs`` are the generation parameters, always greedy or beam search."""
    listed: list[dict[str, Any]] = [
        {
            "prompt": prompt,
            "return_full_text": full_text,
            "clean_up_tokenization_spaces": clean_up,
            "kwargs": {"max_new_tokens": 40},
        }
        for prompt in _PROMPTS
        for full_text in (True, False)
        for clean_up in (True, False)
    ]
    beams = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12}
    long = _CHAT + "word " * 90
    listed += [
        {"prompt": _CHAT, "prefix": "Answer well. ", "kwargs": {"max_length": 60}},
        {"prompt": _CHAT, "prefix": "Answer well. ", "return_full_text": False, "kwargs": {"max_length": 60}},
        {"prompt": _CHAT, "prefix": "", "kwargs": {"max_length": 60}},
        {"prompt": _CHAT, "prefix": "<|user|>\n", "kwargs": {"max_length": 60, "min_length": 55}},
        {"prompt": _CHAT, "prefix": "Twice. ", "kwargs": {"max_new_tokens": 7, "min_length": 3}},
        {"prompt": _CHAT, "kwargs": beams},
        {"prompt": _CHAT, "return_full_text": False, "kwargs": beams},
        {"prompt": long, "handle_long_generation": "hole", "kwargs": {"max_new_tokens": 30}},
        {"prompt": long, "handle_long_generation": "hole", "return_full_text": False, "kwargs": {"max_new_tokens": 30}},
        {"prompt": _CHAT, "handle_long_generation": "hole", "kwargs": {"max_new_tokens": 30}},
        {"messages": _TALK, "return_full_text": False, "kwargs": {"max_new_tokens": 30}},
        {"messages": _TALK[:2], "return_full_text": False, "kwargs": {"max_new_tokens": 30}},
        {"messages": _TALK[:1], "return_full_text": False, "kwargs": {"max_new_tokens": 30}},
    ]
    return listed


def recorded() -> list[list[str]]:
    texts: list[list[str]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return texts
