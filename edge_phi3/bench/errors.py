"""What can go wrong while measuring."""

from edge_phi3.errors import EdgePhi3Error


class BenchError(EdgePhi3Error):
    """A measurement cannot be made as requested."""


class ExchangeError(EdgePhi3Error):
    """One HTTP exchange failed: counted by the load generator, and not fatal to it."""
