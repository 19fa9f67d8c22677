"""Measures: the quality and speed of quantised models, and running services under load."""
