"""The OpenAPI document agrees with the routes and the parameters, and its page needs no internet."""

from __future__ import annotations

import gzip
import re
from typing import Any

import pytest
from litestar import Litestar
from litestar.routes import HTTPRoute

from edge_phi3.api import static_files
from edge_phi3.generation import API_DEFAULTS, GenerationConfig, ModelDefaults
from edge_phi3.generation.parameters import PARAMETERS
from edge_phi3.generation.reference import generate_kwargs_schema
from tests.api.conftest import Running

DOC_PATHS = {path for handler in static_files.HANDLERS for path in handler.paths}
NEEDED: dict[str, dict[str, Any]] = {
    "num_beam_groups": {"num_beams": 2, "do_sample": False},
    "num_return_sequences": {"num_beams": 2},
    "max_length": {"max_new_tokens": None},
}


@pytest.fixture(scope="module")
def document(api: Running) -> dict[str, Any]:
    response = api.client.get("/openapi.json")
    assert response.status_code == 200
    document: dict[str, Any] = response.json()
    return document


def test_every_route_is_documented_and_every_documented_route_exists(api: Running, document: dict[str, Any]) -> None:
    assert isinstance(api.app.app, Litestar)
    routes = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in api.app.app.routes
        if isinstance(route, HTTPRoute)
        for method in route.methods
        if method != "OPTIONS" and route.path not in DOC_PATHS
    }
    assert {(path, method) for path, item in document["paths"].items() for method in item} == routes


def test_every_parameter_is_described_with_an_example_that_is_accepted(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["GenerateKwargs"]
    assert schema == generate_kwargs_schema()
    assert set(schema["properties"]) == set(PARAMETERS)
    defaults = ModelDefaults(
        vocab_size=32064, bos_token_id=1, eos_token_ids=(32000,), pad_token_id=32000, context_length=4096
    )
    for name, described in schema["properties"].items():
        assert described["description"].endswith(".")
        (example,) = described["examples"]
        GenerationConfig.resolve({name: example} | NEEDED.get(name, {}), defaults)
        if name in API_DEFAULTS:
            assert described["default"] == API_DEFAULTS[name]


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    for name in re.findall(r"#/components/schemas/(\w+)", str(document)):
        assert name in document["components"]["schemas"]


def test_the_page_asks_nothing_of_other_servers(api: Running) -> None:
    page = api.client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert links
    for link in links:
        if not link.startswith("data:"):
            assert "//" not in link
            assert api.client.get(f"/{link}").status_code == 200
    assert "//" not in api.client.get("/docs/start.js").text


@pytest.mark.parametrize("name", ["swagger-ui-bundle.js", "swagger-ui.css"])
def test_assets_are_sent_compressed_to_those_who_accept_it(api: Running, name: str) -> None:
    packed = api.client.get(f"/docs/{name}")
    plain = api.client.get(f"/docs/{name}", headers={"accept-encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.content == plain.content
    assert len(gzip.compress(plain.content)) < len(plain.content) / 2
