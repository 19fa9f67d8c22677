"""What can go wrong while measuring."""

from __future__ import annotations

from edge_phi3.errors import EdgePhi3Error


class BenchError(EdgePhi3Error):
    """A measurement cannot be made as it was asked for."""


class ExchangeError(EdgePhi3Error):
    """One HTTP exchange failed: counted by the load generator, and not fatal to it."""


class StatusError(ExchangeError):
    """The server answered with another status than 200.

    Attributes:
        status: the HTTP status code.
    """

    def __init__(self, status: int, detail: str) -> None:
        self.status = status
        super().__init__(f"HTTP {status}: {detail}" if detail else f"HTTP {status}")
