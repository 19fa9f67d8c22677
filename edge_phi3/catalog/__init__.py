"""A model reference (the bundled demo, a preset, a Hub repository, a path) -> files on disk."""

from edge_phi3.catalog.build import CatalogError
from edge_phi3.catalog.listing import HubError
from edge_phi3.catalog.reference import DEMO, PRESETS, parse_reference
from edge_phi3.catalog.store import Catalog, StoredModel

__all__ = ["DEMO", "PRESETS", "Catalog", "CatalogError", "HubError", "StoredModel", "parse_reference"]
