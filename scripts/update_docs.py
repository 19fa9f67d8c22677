"""Write the tables of docs/parameters.md and docs/cli.md from the code that they describe.

Usage: python scripts/update_docs.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from edge_phi3.files import atomic_output
from edge_phi3.generation import reference
from edge_phi3.settings import Settings
from edge_phi3.settings_text import to_markdown

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- made by scripts/update_docs.py -->", "<!-- end of what is made -->"

PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "parameters.md": reference.markdown,
    "cli.md": lambda: to_markdown(Settings),
}
"""What stands between the two marks of each page."""


def updated(name: str) -> str:
    """Return a page with its tables made anew."""
    before, rest = (DOCS / name).read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{PAGES[name]()}\n\n{END}{after}"


def main() -> int:
    """Update the pages, or with ``--check`` return 1 when one is out of date."""
    check, stale = "--check" in sys.argv[1:], False
    for name in PAGES:
        page, text = DOCS / name, updated(name)
        if page.read_text(encoding="utf-8") == text:
            continue
        stale = True
        print(f"{name} {'is out of date; run scripts/update_docs.py' if check else 'was updated'}.")
        if not check:
            with atomic_output(page, force=True) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
