"""`edge-phi3 convert` and llama.cpp's convert_hf_to_gguf.py write the same tensors and metadata; so do both quantisers.

They quantise the demo model, and one of Phi-3's real widths. With PARITY_RECORD=1, what llama.cpp wrote becomes
``tests/golden/converter.json`` and, of the demo model, ``tests/golden/quantized.json``.
"""

import json
import random
from pathlib import Path

import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.quantize import quantize
from edge_phi3.system_resources import usable_cores
from tests.golden.byte_level import reference_tokenizer
from tests.golden.family import FAMILY
from tests.golden.gguf_digests import (
    CONVERTED,
    CONVERTER_CASES,
    QUANTIZED,
    QUANTIZED_TYPES,
    Description,
    describe,
    differences,
    digest,
    write_converter_case,
    write_matrix,
    write_quantizer_inputs,
)
from tests.parity.conftest import RECORDING, Peers
from tests.support.engines import rules_of
from tests.support.models import model_path
from tests.support.odd_texts import random_text

pytestmark = pytest.mark.parity

OUTTYPES = ("f32", "f16", "bf16", "q8_0")

# One process for all conversions: importing torch takes longer than converting a small checkpoint. What llama.cpp's
# converter makes of one text tells it the pre-tokenizer of a whole vocabulary, but not of a small one.
_REFERENCE = """
import json, os, runpy, sys
script, jobs, pre = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
sys.path[0] = os.path.dirname(script)
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda model, _: pre[model.dir_model.name]
for checkpoint, outtype, output in jobs:
    sys.argv = [script, checkpoint, "--outtype", outtype, "--outfile", output]
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: write_converter_case(folder, name) for name in CONVERTER_CASES}


@pytest.fixture(scope="module")
def made(
    peers: Peers, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """What llama.cpp's converter makes of each checkpoint in each type."""
    folder = tmp_path_factory.mktemp("theirs")
    jobs = [(name, outtype, folder / f"{name}-{outtype}.gguf") for name in checkpoints for outtype in OUTTYPES]
    asked = json.dumps([[str(checkpoints[name]), outtype, str(path)] for name, outtype, path in jobs])
    styles = {name: getattr(case.get("vocabulary"), "style", None) for name, case in CONVERTER_CASES.items()}
    pre = json.dumps({name: style.pre for name, style in styles.items() if style})
    peers.python("-c", _REFERENCE, peers.converter(), asked, pre)
    return {(name, outtype): path for name, outtype, path in jobs}


@pytest.fixture(scope="module")
def theirs(made: dict[tuple[str, str], Path]) -> dict[str, dict[str, Description]]:
    found: dict[str, dict[str, Description]] = {}
    for (name, outtype), path in made.items():
        found.setdefault(name, {})[outtype] = describe(path)
    if RECORDING:
        CONVERTED.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    return found


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", CONVERTER_CASES)
def test_both_converters_write_the_same(
    name: str, outtype: str, checkpoints: dict[str, Path], theirs: dict[str, dict[str, Description]], tmp_path: Path
) -> None:
    ours = convert(checkpoints[name], tmp_path / "ours.gguf", outtype=outtype).path
    assert differences(theirs[name][outtype], describe(ours)) == []


@pytest.mark.parametrize("name", ["4k", "128k", *(name for name in FAMILY if name in CONVERTER_CASES)])
def test_a_file_of_theirs_has_the_rules_of_ours(
    name: str, checkpoints: dict[str, Path], made: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """Tokens, ends, padding, window, contexts, and what a text leaves out; tokens also as `tokenizers` has them."""
    ours = convert(checkpoints[name], tmp_path / "ours.gguf", outtype="f32").path
    library = reference_tokenizer(checkpoints[name])
    special = [token.content for token in library.get_added_tokens_decoder().values()]
    chance = random.Random(24)
    texts = [random_text(chance, special) for _ in range(5000)]
    tokens, rules = rules_of(made[name, "f32"], texts)
    assert (tokens, rules) == rules_of(ours, texts)
    assert [text for text, ids in zip(texts, tokens, strict=True) if library.encode(text).ids != ids] == []


# -- quantising


@pytest.fixture(scope="module", params=["demo", "wide"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Name, BF16 file and importance matrix of a model."""
    folder = tmp_path_factory.mktemp("inputs")
    if request.param == "demo":
        return "demo", *write_quantizer_inputs(folder)
    model = model_path(request.param, kind="BF16")
    return request.param, model, write_matrix(folder / "imatrix.gguf", model)


@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
def test_both_quantisers_write_the_same_tensors(
    inputs: tuple[str, Path, Path], kind: str, peers: Peers, tmp_path: Path
) -> None:
    name, model, matrix = inputs
    guided = QUANTIZED_TYPES[kind]
    theirs = tmp_path / "theirs.gguf"
    peers.run(
        "llama-quantize", *(("--imatrix", matrix) if guided else ()), model, theirs, kind, str(usable_cores())
    )  # fmt: skip
    ours = quantize(model, tmp_path / "ours.gguf", type=kind, imatrix=matrix if guided else None).path
    expected = digest(theirs)
    if RECORDING and name == "demo":
        record = json.loads(QUANTIZED.read_text("utf-8")) | {kind: expected}
        QUANTIZED.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    assert digest(ours) == expected
