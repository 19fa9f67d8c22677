"""The version of edge-phi3, in one place that imports nothing."""

__version__ = "0.1.0"
