"""The OpenAPI document agrees with what the service does; the pages for browsers need nothing but their own files."""

import gzip
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from litestar import Litestar
from litestar.routes import HTTPRoute

from edge_phi3.api import static_files
from edge_phi3.generation import API_DEFAULTS, GenerationConfig, ModelDefaults
from edge_phi3.generation.parameters import PARAMETERS, generate_kwargs_schema
from tests.api.conftest import PATIENCE, Running, loader, ready
from tests.support.cases import cases

NEEDED: dict[str, dict[str, Any]] = {"num_beam_groups": {"num_beams": 2, "do_sample": False}}
NEEDED |= {"num_return_sequences": {"num_beams": 2}, "max_length": {"max_new_tokens": None}}
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture(scope="module")
def document(api: Running) -> dict[str, Any]:
    response = api.client.get("/openapi.json")
    assert response.status_code == 200
    return response.json()


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


@cases
def test_generated_requests_meet_the_document(
    model_path: Path, tmp_path: Path, phases: str, examples: int, least: int
) -> None:
    options = f"--phases={phases} --checks={CHECKS} --max-examples={examples} --seed=1 --no-color"
    options += f" --request-timeout={PATIENCE} --suppress-health-check=too_slow"
    run = "from schemathesis.cli import schemathesis; schemathesis()"
    with ready(loader(model_path), max_new_tokens=16, request_timeout=PATIENCE) as api:
        document = f"http://127.0.0.1:{api.port}/openapi.json"
        command = [sys.executable, "-c", run, "run", *options.split(), document]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert int(re.findall(r"(\d+) generated", result.stdout)[0]) >= least


@cases
def test_a_browser_gets_the_playground_and_a_client_its_json(api: Running, accept: str | None, prefers: bool) -> None:
    headers = {} if accept is None else {"accept": accept}
    answer = api.client.send(httpx.Request("GET", api.client.base_url, headers=headers))
    assert answer.headers["vary"] == "Accept"
    if prefers:
        assert (answer.status_code, answer.headers["location"]) == (307, "ui")
    else:
        assert (answer.status_code, answer.json()) == (200, {"message": "Server is running"})


def test_the_documentation_asks_nothing_of_other_servers(api: Running) -> None:
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


def test_the_playground_may_load_its_own_files_and_nothing_else(api: Running) -> None:
    page = api.client.get("/ui")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy.pop("default-src") == "'none'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert set(policy.values()) == {"'self'", "'none'"}
    assert page.headers["x-content-type-options"] == "nosniff"
    slash = api.client.get("/ui/", follow_redirects=True)
    assert (slash.status_code, slash.url.path) == (200, "/ui")
    for name in ("nothing.js", "..%2fdocs.html", "%2e%2e%2fstart.js", "index"):
        answer = api.client.get(f"/ui/{name}")
        assert answer.status_code == 404
        assert "There is nothing at /ui/" in answer.json()["detail"]


def test_files_are_sent_compressed_to_those_who_accept_it_and_again_only_when_they_have_changed(api: Running) -> None:
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        packed = api.client.get(f"/docs/{name}")
        plain = api.client.get(f"/docs/{name}", headers={"accept-encoding": "identity"})
        assert packed.headers["content-encoding"] == "gzip"
        assert "content-encoding" not in plain.headers
        assert packed.content == plain.content
        assert len(gzip.compress(plain.content)) < len(plain.content) / 2
    first = api.client.get("/ui/app.js")
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    again = api.client.get("/ui/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_playground_learns_every_parameter_once(api: Running) -> None:
    config = api.client.get("/ui/config.json").json()
    named = [name for group in config["groups"] for name in group["parameters"]]
    assert sorted(named) == sorted(config["parameters"]) == sorted(PARAMETERS)
    assert set(config["initial"]) <= set(PARAMETERS)
    assert config["needs_key"] is False
    assert config["end_token_ids"]
