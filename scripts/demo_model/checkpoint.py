"""The files of a checkpoint: a SentencePiece vocabulary of the corpus, Phi-3's special tokens after it, and weights."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, processors
from transformers import LlamaTokenizerFast, Phi3ForCausalLM

from .folder import write_json

PIECES = 4000
"""The size of the SentencePiece vocabulary (Phi-3-mini: 32000)."""

SPECIALS = (
    "<|endoftext|>",
    "<|assistant|>",
    *(f"<|placeholder{number}|>" for number in (1, 2, 3, 4)),
    "<|system|>",
    "<|end|>",
    *(f"<|placeholder{number}|>" for number in (5, 6)),
    "<|user|>",
)
"""Phi-3's special tokens in the order of their ids, the first being `PIECES`."""

ENDOFTEXT, ASSISTANT, END = (PIECES + SPECIALS.index(t) for t in ("<|endoftext|>", "<|assistant|>", "<|end|>"))

STOPS = [ENDOFTEXT, ASSISTANT, END]
"""Generation ends at any of these, as Phi-3-mini's does."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""Phi-3-mini's conversation format: ``<|role|>``, a line feed, the text, ``<|end|>`` and a line feed."""

CONFIG = json.loads(Path(__file__).with_name("config.json").read_text("utf-8"))
"""Phi-3-mini's architecture, with every row of a matrix a multiple of 256, and its vocabulary padded to one of 64."""


def prompt_for(question: str) -> str:
    """Return the chat prompt of one user turn."""
    return f"<|user|>\n{question}<|end|>\n<|assistant|>\n"


def train_vocabulary(texts: Iterable[str]) -> bytes:
    """Train the byte-fallback BPE vocabulary with Llama's settings and return the bytes of its `tokenizer.model`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=0.99995,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    return model.getvalue()


def _added_tokens() -> dict[int, AddedToken]:
    """Return the added tokens by id with the flags of Phi-3-mini-4k-instruct.

    White space after a token with `rstrip` vanishes. ``</s>`` alone is not special: decoding keeps it.
    """
    tokens = {
        0: AddedToken("<unk>", normalized=False, special=True),
        1: AddedToken("<s>", normalized=False, special=True),
        2: AddedToken("</s>", normalized=False, special=False, rstrip=True),
    }
    for number, text in enumerate(SPECIALS, PIECES):
        tokens[number] = AddedToken(text, normalized=False, special=True, rstrip=text != "<|endoftext|>")
    return tokens


def write_tokenizer(folder: Path, vocabulary: bytes) -> LlamaTokenizerFast:
    """Write the five tokenizer files of a Hugging Face checkpoint and return the tokenizer read back from them.

    `tokenizer.json` is transformers' own conversion of `tokenizer.model`, in the form that Phi-3-mini's has: the
    normaliser puts "▁" before each text between special tokens, and no ``<s>`` is added.
    """
    (folder / "tokenizer.model").write_bytes(vocabulary)
    added = _added_tokens()
    plain = LlamaTokenizerFast(
        vocab_file=str(folder / "tokenizer.model"),
        legacy=True,
        add_prefix_space=True,
        add_bos_token=False,
        add_eos_token=False,
        unk_token=added[0],
        bos_token=added[1],
        eos_token=added[PIECES],
        pad_token=added[PIECES],
    )
    plain.add_tokens([token for number, token in added.items() if number not in (0, 1)])
    backend = plain.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(folder / "tokenizer.json"))

    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    named = {"bos_token": "<s>", "eos_token": SPECIALS[0], "pad_token": SPECIALS[0], "unk_token": "<unk>"}
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(number): {flag: getattr(token, flag) for flag in flags} for number, token in added.items()
        },
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
        **named,
    }
    special = {
        role: {flag: flag == "content" and text for flag in flags if flag != "special"} for role, text in named.items()
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "added_tokens.json", {text: number for number, text in enumerate(SPECIALS, PIECES)})
    return LlamaTokenizerFast.from_pretrained(folder)


def write_model(folder: Path, model: Phi3ForCausalLM) -> None:
    """Write `model.safetensors` in bfloat16, `config.json` and `generation_config.json`."""
    weights = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    versions = {"transformers_version": transformers.__version__}
    about = {"architectures": ["Phi3ForCausalLM"], "torch_dtype": "bfloat16"}
    write_json(folder / "config.json", CONFIG | about | versions)
    ends = {"bos_token_id": 1, "eos_token_id": STOPS, "pad_token_id": ENDOFTEXT}
    write_json(folder / "generation_config.json", ends | versions)


@torch.no_grad()
def greedy_answer(model: Phi3ForCausalLM, tokenizer: LlamaTokenizerFast, question: str) -> str:
    """Ask one question in the chat format and return the greedy answer, through `transformers.generate`."""
    inputs = tokenizer(prompt_for(question), return_tensors="pt")
    output = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        do_sample=False,
        max_new_tokens=160,
        eos_token_id=STOPS,
        pad_token_id=ENDOFTEXT,
    )
    return str(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)).strip()
