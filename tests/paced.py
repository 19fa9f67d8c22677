"""llama.cpp as slow as a test needs it: what must still run while something else happens does, on any machine.

In this process with `slowly`; in a process of its own with `command`, for as long as a file exists.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SECONDS = 0.05
"""What each decode call takes more: a thousand tokens take the better part of a minute."""


@contextlib.contextmanager
def slowly(wait: Callable[[], None] = lambda: time.sleep(SECONDS)) -> Iterator[None]:
    """Wait before each decode call until the block ends."""
    # Imported where it is wanted only: most tests that import this start processes.
    import llama_cpp

    decode: Callable[..., int] = llama_cpp.llama_decode

    def slow(*arguments: object) -> int:
        wait()
        return decode(*arguments)

    llama_cpp.llama_decode = slow
    try:
        yield
    finally:
        llama_cpp.llama_decode = decode


def command(file: Path) -> list[str]:
    """Return an ``edge-phi3`` that is slow as long as a file exists, by the seconds for a decode call that it holds."""
    return [sys.executable, str(Path(__file__).resolve()), str(file)]


def _main() -> None:
    # Not this folder, whose packages have the names of others.
    sys.path[:] = [entry for entry in sys.path if Path(entry) != Path(__file__).parent]
    file = Path(sys.argv.pop(1))
    sys.argv[0] = "edge-phi3"
    from edge_phi3.cli import main

    def wait() -> None:
        with contextlib.suppress(FileNotFoundError):
            time.sleep(float(file.read_text(encoding="ascii") or SECONDS))

    with slowly(wait):
        main()


if __name__ == "__main__":
    _main()
