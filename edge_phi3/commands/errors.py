"""What a verb may raise beside the errors of the parts that it calls."""

from __future__ import annotations

from edge_phi3.errors import EdgePhi3Error


class WrongUsageError(EdgePhi3Error):
    """The command was called in a way that it cannot be: exit code 2."""
