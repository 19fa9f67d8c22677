"""Each member of the family goes the whole way: converted, measured, quantised, planned, served, compared."""

import contextlib
import json
from pathlib import Path

import msgspec
import pytest

from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES
from edge_phi3.conversion.quantize import Options, make_job
from edge_phi3.llama.model import Model
from edge_phi3.llama.quantizer import QuantizerProcess
from tests.golden.family import FAMILY, write_member
from tests.support.cases import tables
from tests.support.services import serving
from tests.test_cli import edge_phi3

PROMPTS = tables(__file__)["PROMPTS"]
"""What a conversation becomes, by the beginning of a member's name."""
CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def run(*words: str | Path) -> str:
    result = edge_phi3(*map(str, words))
    assert result.returncode == 0, result.stderr
    return result.stdout


def parameters(path: Path) -> int:
    with contextlib.closing(Model(path)) as model:
        return model.parameters


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("phi-4-mini-instruct", ("Q4_K_M", "Q8_0", "IQ3_S", "BF16")),
        *(pytest.param(name, tuple(QUANTIZATION_TYPES), marks=pytest.mark.parity) for name in FAMILY),
    ],
)
def test_a_member_goes_the_whole_way(
    name: str, types: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = write_member(tmp_path, name, layers=1, dtype="bfloat16")
    model, matrix = tmp_path / "model.gguf", tmp_path / "matrix.gguf"
    run("convert", checkpoint, "-o", model)
    run("imatrix", model, "-o", matrix, "--ctx-size", "64", "--chunks", "2")
    weights = parameters(model)
    with QuantizerProcess() as process:  # one for all types: most of the time of each would be its start
        for type_ in map(QUANTIZATION_TYPES.__getitem__, types):
            made = tmp_path / f"{type_.name}.gguf"
            job = make_job(process, model, type_, Options(imatrix=matrix), threads=1)
            assert list(process.run(msgspec.structs.replace(job, output=made)))
            assert parameters(made) == weights
    (tmp_path / "Q4_K_M.gguf").unlink()
    run("quantize", model, "-o", tmp_path / "Q4_K_M.gguf", "--type", "Q4_K_M", "--imatrix", matrix)
    planned = json.loads(run("fit", checkpoint, "--memory", "4GiB", "--ctx-size", "512", "--json"))
    assert planned["recommended"]["type"] == "Q8_0"
    quick = ["--ctx-size", "32", "--chunks", "2", "--threads", "1", "--repetitions", "1", "--imatrix", "none"]
    quick += ["--prompt-tokens", "8", "--generate-tokens", "2", "--type", "Q4_K_M"]
    run("bench", "quants", model, *quick, "--output-dir", tmp_path / "results")
    report = json.loads((tmp_path / "results" / "quants.json").read_text(encoding="utf-8"))
    assert [row["type"] for row in report["measurements"]] == ["BF16", "Q4_K_M"]
    with serving(tmp_path, str(tmp_path / "Q4_K_M.gguf"), "--ctx-size", "512", store=tmp_path / "store") as server:
        kwargs = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
        answer = server.post("/chat", messages=CONVERSATION, generate_kwargs=kwargs).json()
        prompt = next(text for beginning, text in PROMPTS.items() if name.startswith(beginning))
        asked = server.post("/tokenize", text=prompt).json()["tokens"]
        assert answer["sequences"][0][: len(asked)] == asked
        assert 1 <= len(answer["sequences"][0]) - len(asked) <= 4
