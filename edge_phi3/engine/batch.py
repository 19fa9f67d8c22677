"""What one call of `Context.decode` computes, and for whom."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.sequence import RunningRequest


@dataclass(slots=True)
class Batch:
    """One batch of `count` tokens, already written into the context's arrays; nobody reads the last `padding`.

    `members` are the requests that have tokens in it, `choosing` those whose decoders get logits, in the order of the
    logits' rows; `scored` those of whose prompts some tokens have logits too, each with its first row and how many.
    There are `rows` of logits in all, but for those of drafts: `drafts` are their tokens, shape ``(rows of the request,
    tokens)``, whose logits come last, request by request, and of each the first tokens of all its rows first.
    """

    count: int = 0
    padding: int = 0
    rows: int = 0
    choosing: list[RunningRequest] = field(default_factory=list)
    members: list[RunningRequest] = field(default_factory=list)
    scored: list[tuple[RunningRequest, int, int]] = field(default_factory=list)
    drafts: dict[RunningRequest, NDArray[np.int32]] = field(default_factory=dict)

    @property
    def drafted(self) -> int:
        """Drafted tokens, each of which has logits."""
        return sum(draft.size for draft in self.drafts.values())
