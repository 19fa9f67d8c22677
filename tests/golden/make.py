"""Records what transformers computes, for the tests: all that lies beside this file but ``converter.json`` and
``quantized.json``.

Run ``python -m tests.golden.make [PART ...]`` where torch and transformers 4.49.0 are installed; without a part it
makes all of them.
"""

import argparse
import dataclasses
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tests.golden import attention
from tests.golden import generation_data as data
from tests.golden import pipeline as texts
from tests.golden.reference import Reference
from tests.golden.requests import MODES, Request, RequestMaker

REQUESTS_PER_MODE = 90
"""Of each decoding mode, in both sets."""


class PlainTokenizer:
    """As much of a tokenizer as transformers needs to find stop strings."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert text == "abcdef"
        assert not add_special_tokens
        return {"input_ids": [-1]}

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(len(self._texts))}

    def _convert_id_to_token(self, token: int) -> str:
        return str(token)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join("abcdef" if token == "-1" else self._texts[int(token)] for token in tokens)


def record_replay() -> None:
    """Record answers together with the logits that they were chosen from."""
    texts = data.replay_texts()
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(data.write_replay_model(Path(folder)), PlainTokenizer(texts), rounded=True)
    maker = RequestMaker(data.REPLAY_SEED, range(1, data.REPLAY_VOCABULARY), texts=texts)
    data.write_answers(data.FOLDER / "replay.json", _answered(maker, reference.answer_drawable))
    data.write_logits(data.FOLDER / "replay.npz", reference.logits)


def record_engine() -> None:
    """Record answers that do not hang on rounding errors, for engines that compute logits themselves."""
    with tempfile.TemporaryDirectory() as folder:
        data.write_engine_model(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
        reference = Reference(Path(folder), tokenizer)
    usual = [token for token in range(259, len(tokenizer)) if token not in tokenizer.all_special_ids]
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    texts = [tokenizer.convert_tokens_to_string(["a", piece])[1:] for piece in pieces]
    maker = RequestMaker(data.ENGINE_SEED, usual, texts=texts, longest_prompt=40, most_new=16, most_beams=8)
    data.write_answers(data.FOLDER / "engine.json", _answered(maker, reference.answer_firmly))


def _answered(maker: RequestMaker, ask: Any) -> list[tuple[Request, data.Answer]]:
    answers: list[tuple[Request, data.Answer]] = []
    for number, mode in enumerate(MODES, 1):
        while len(answers) < number * REQUESTS_PER_MODE:
            request = maker.make(mode)
            if answer := ask(request):
                answers.append((request, data.Answer(answer.sequences, *map(_short, dataclasses.astuple(answer)[1:]))))
    return answers


def _short(values: Any) -> Any:
    """Round the numbers of a nested list to seven digits."""
    if isinstance(values, list):
        return [_short(value) for value in values]
    return None if values is None else float(f"{values:.7g}")


def record_validation() -> None:
    """Record which of the requests in ``validation.json`` transformers refuses; a new one has null for its reason."""
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(data.write_replay_model(Path(folder)), PlainTokenizer(data.replay_texts()))
    lines = []
    for kwargs, _ in json.loads(data.VALIDATION.read_text(encoding="utf-8")):
        reason = None
        try:
            mode = "sample" if kwargs.get("num_beams", 1) in (1, None) else "group_beam"
            reference.answer(Request(mode, data.VALIDATION_PROMPT, dict(kwargs)))
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        lines.append(json.dumps([kwargs, reason]))
    data.write_lines(data.VALIDATION, lines)
    names = sorted(name for name in transformers.GenerationConfig().to_dict() if not name.startswith("_"))
    (data.FOLDER / "names.json").write_text(json.dumps(names, indent=0) + "\n", encoding="utf-8")


def record_attention() -> None:
    """Record greedy continuations on every kind of model."""
    results: dict[str, list[int]] = {}
    for name in sorted({case.model for case in attention.CASES}):
        with tempfile.TemporaryDirectory() as folder:
            reference = Reference(attention.write_model(Path(folder), name), None)
        for case in [case for case in attention.CASES if case.model == name]:
            tokens = torch.from_numpy(case.prompt()).long()[None]
            options = {"do_sample": False, "max_new_tokens": case.new_tokens, "eos_token_id": None, "pad_token_id": 0}
            options |= {"attention_mask": torch.ones_like(tokens), "use_cache": not case.from_scratch}
            results[case.name] = reference.model.generate(tokens, **options)[0, case.prompt_length :].tolist()
            assert len(results[case.name]) == case.new_tokens
    text = json.dumps(results, separators=(",", ":")).replace("],", "],\n")
    attention.GOLDEN.write_text(text + "\n", encoding="utf-8")


def record_pipeline() -> None:
    """Record the texts of transformers' text-generation pipeline, called as the original service calls it."""
    with tempfile.TemporaryDirectory() as folder:
        texts.write_model(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.model_max_length = 192
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    lines = []
    for case in texts.cases():
        options = {name: value for name, value in case.items() if name not in ("prompt", "messages", "kwargs")}
        options.setdefault("clean_up_tokenization_spaces", False)
        # The original always passes min_length, and max_length too, but that makes the pipeline cut off prompts
        # at max_length tokens even where max_new_tokens is given: a trap that the service does not copy.
        kwargs = {"min_length": 0} | case["kwargs"]
        results = generate(case.get("prompt") or case["messages"], do_sample=False, **options, **kwargs)
        lines.append(json.dumps([case, [result["generated_text"] for result in results]]))
    data.write_lines(texts.GOLDEN, lines)


_RECORDERS = (record_validation, record_replay, record_engine, record_attention, record_pipeline)
PARTS = {record.__name__.removeprefix("record_"): record for record in _RECORDERS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parts = parser.parse_args().parts or PARTS
    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(2)
    for part in parts:
        PARTS[part]()
        print(part)


if __name__ == "__main__":
    main()
