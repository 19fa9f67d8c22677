"""Runs the parts of the GPU measurements; ``run.sh`` starts it in the right environment.

python -m benchmarks.gpu.run --cpu --small --out DIR
"""

import sys
from collections.abc import Callable, Mapping

import msgspec

from benchmarks.gpu.build import build
from benchmarks.gpu.checkpoints import make_models
from benchmarks.gpu.exactness import check_exactness
from benchmarks.gpu.options import UNFINISHED, Options, parse
from benchmarks.gpu.report import write_report
from benchmarks.gpu.speed import measure_speed
from benchmarks.gpu.steps import OutOfTime, Steps
from edge_phi3.files import atomic_output

_PARTS: Mapping[str, Callable[[Steps, Options], None]] = {
    "build": build,
    "models": make_models,
    "exactness": check_exactness,
    "speed": measure_speed,
}


def main() -> int:
    """Run the parts that are asked for, write the report, and return the exit status."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    _refuse_other_kind(options)
    steps = Steps(options.work / "steps", options.limit)
    status = 0
    try:
        for part in options.parts:
            if part in _PARTS:
                _PARTS[part](steps, options)
    except OutOfTime as reason:
        print(f"{reason} Run the same command again.", file=sys.stderr)
        status = UNFINISHED
    write_report(steps.records(), options)
    print(options.out / "report.md")
    if steps.failed:
        print(f"failed: {', '.join(steps.failed)}; run the same command again to try them again", file=sys.stderr)
    return status or int(bool(steps.failed))


def _refuse_other_kind(options: Options) -> None:
    """Refuse to mix measurements of two kinds in one folder."""
    path = options.work / "kind.json"
    kind = {"cpu": options.cpu, "small": options.small}
    if not path.exists():
        with atomic_output(path) as temporary:
            temporary.write_bytes(msgspec.json.encode(kind))
    elif msgspec.json.decode(path.read_bytes()) != kind:
        sys.exit(
            f"{options.work} holds a run with or without --cpu or --small, other than this one; give another folder."
        )


if __name__ == "__main__":
    sys.exit(main())
