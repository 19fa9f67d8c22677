"""The OpenAPI document agrees with routes and parameters, and with what thousands of requests made from it are told."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from litestar import Litestar
from litestar.routes import HTTPRoute

from edge_phi3.api import static_files
from edge_phi3.generation import API_DEFAULTS, GenerationConfig, ModelDefaults
from edge_phi3.generation.parameters import PARAMETERS
from edge_phi3.generation.reference import generate_kwargs_schema
from tests.api.conftest import PATIENCE, Running, loader, ready

NEEDED: dict[str, dict[str, Any]] = {
    "num_beam_groups": {"num_beams": 2, "do_sample": False},
    "num_return_sequences": {"num_beams": 2},
    "max_length": {"max_new_tokens": None},
}
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
LEAST_REQUESTS = 2000


@pytest.fixture(scope="module")
def document(api: Running) -> dict[str, Any]:
    response = api.client.get("/openapi.json")
    assert response.status_code == 200
    document: dict[str, Any] = response.json()
    return document


def test_every_route_is_documented_and_every_documented_route_exists(api: Running, document: dict[str, Any]) -> None:
    assert isinstance(api.app.app, Litestar)
    pages = {path for handler in static_files.HANDLERS for path in handler.paths}
    routes = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in api.app.app.routes
        if isinstance(route, HTTPRoute)
        for method in route.methods
        if method != "OPTIONS" and route.path not in pages
    }
    assert {(path, method) for path, item in document["paths"].items() for method in item} == routes
    assert set(re.findall(r"#/components/schemas/(\w+)", str(document))) <= set(document["components"]["schemas"])


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


def test_generated_requests_meet_the_document(model_path: Path, tmp_path: Path) -> None:
    options = [
        "--phases=examples,coverage,fuzzing",
        f"--checks={CHECKS}",
        "--max-examples=120",
        "--seed=1",
        f"--request-timeout={PATIENCE}",
        "--suppress-health-check=too_slow",
        "--no-color",
    ]
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", *options]
    with ready(loader(model_path), max_new_tokens=200, request_timeout=PATIENCE) as api:
        document = f"http://127.0.0.1:{api.port}/openapi.json"
        result = subprocess.run([*command, document], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    found = re.search(r"(\d+) generated", result.stdout)
    assert found is not None
    assert int(found[1]) >= LEAST_REQUESTS
