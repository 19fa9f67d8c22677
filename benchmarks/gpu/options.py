"""The command line of ``run.sh``. Only the standard library: it is read before anything is installed."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PARTS = ("build", "models", "exactness", "speed", "report")
UNFINISHED = 75
"""Exit status when the time limit came first (EX_TEMPFAIL of sysexits.h): run the same command again."""

_DESCRIPTION = """\
Measure edge-phi3 on this machine's NVIDIA GPU, part by part; what is done already is not done again.

    benchmarks/gpu/run.sh --bundle BUNDLE --out REPORT            # again and again while the exit status is 75
    benchmarks/gpu/run.sh --cpu --small --out REPORT              # the same parts on the CPU with a tiny model

Exit status: 0 all parts asked for are done, 75 the time limit came first, 1 a step failed, 2 wrong usage.
"""


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked of a run.

    Attributes:
        out: folder of the report.
        work: folder of the virtual environment, the build, the models and the steps that are done.
        bundle: folder that ``prepare.sh`` made; None when everything is installed already.
        parts: the parts to run, in order.
        cpu: measure on the CPU, with the installed llama-cpp-python.
        small: a tiny model and short measurements.
        limit: seconds after which no new step begins, and a running build is stopped.
        python: what installs the virtual environment; with `cpu`, what runs everything.
        peers: folder of llama.cpp's built programs; None for those that the build makes or made before.
        torch_python: interpreter with torch and transformers; None for this one, if it has them.
        architecture: CUDA architecture such as ``90-real``; None for that of the GPU.
        jobs: compilers at once; None for one on each core.
        rounds: turns of each comparison.
        threads: threads of the CPU backend; 0 for one on each core.
    """

    out: Path
    work: Path
    bundle: Path | None
    parts: tuple[str, ...]
    cpu: bool
    small: bool
    limit: float
    python: str
    peers: Path | None
    torch_python: str | None
    architecture: str | None
    jobs: int | None
    rounds: int
    threads: int


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line; wrong usage ends the program with status 2."""
    parser = argparse.ArgumentParser(
        prog="run.sh", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--work", type=Path, help="folder of build, models and finished steps; default: OUT/work")
    parser.add_argument("--bundle", type=Path, help="folder that prepare.sh made")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; repeatable; default: all")
    parser.add_argument("--cpu", action="store_true", help="no GPU: the installed llama-cpp-python, and no build")
    parser.add_argument("--small", action="store_true", help="a tiny model of the same kind, short measurements")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds; default: %(default)g")
    parser.add_argument("--python", help="Python 3.11 or newer; default: the one that runs this")
    parser.add_argument("--peers", type=Path, help="folder of built llama-server, llama-bench, llama-batched-bench")
    parser.add_argument("--torch-python", help="Python with torch and transformers, to compare with")
    parser.add_argument("--architecture", help="CUDA architecture, such as 86-real; default: the GPU's own")
    parser.add_argument("--jobs", type=int, help="compilers at once; default: one on each core")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each comparison; default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU backend; default: one on each core")
    given = parser.parse_args(arguments)
    for name in ("limit", "rounds"):
        if getattr(given, name) <= 0:
            parser.error(f"--{name} must be positive, not {getattr(given, name):g}")
    if not given.cpu and given.bundle is None:
        parser.error("--bundle names the folder that prepare.sh made; without a GPU, say --cpu")
    if given.bundle is not None and not (given.bundle / "bundle.json").is_file():
        parser.error(f"{given.bundle} was not made by prepare.sh: it has no bundle.json")
    return Options(
        out=given.out.absolute(),
        work=(given.work or given.out / "work").absolute(),
        bundle=given.bundle and given.bundle.absolute(),
        parts=tuple(part for part in PARTS if given.part is None or part in given.part),
        cpu=given.cpu,
        small=given.small,
        limit=given.limit,
        python=given.python or os.environ.get("PYTHON", ""),
        peers=given.peers and given.peers.absolute(),
        torch_python=given.torch_python,
        architecture=given.architecture,
        jobs=given.jobs,
        rounds=given.rounds,
        threads=given.threads,
    )
