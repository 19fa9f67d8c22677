"""The names of ``transformers.GenerationConfig`` 4.49.0 and ``generate()`` that cannot be had here, and why."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True)
class Refused:
    """One name of transformers that cannot be had here; `reason` completes the sentence "`name` is not supported: ...".

    `harmless` values, beside null, change nothing, and are accepted. Where another one would not change which tokens
    are chosen, a model's ``generation_config.json`` may hold it: see `changes_tokens`.
    """

    reason: str
    harmless: tuple[object, ...] = ()
    changes_tokens: bool = True

    def accepts(self, value: object) -> bool:
        """Return whether `value` changes nothing."""
        return value is None or any(type(value) is type(known) and value == known for known in self.harmless)


_GROUPS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
REFUSED: Final[Mapping[str, Refused]] = {
    name: Refused(group["reason"], tuple(more.get("harmless", ())), changes_tokens=more.get("changes_tokens", True))
    for group in _GROUPS
    for name, more in group["names"].items()
}
"""Every name of transformers that is refused unless its value changes nothing."""
