"""Measures: the quality and speed of quantised models, and running services under load."""

from edge_phi3.errors import EdgePhi3Error


class BenchError(EdgePhi3Error):
    """A measurement cannot be made as requested."""


class ExchangeError(EdgePhi3Error):
    """One HTTP exchange failed: counted by the load generator, and not fatal to it."""
