"""The pages for browsers and their files, without a browser: they need nothing from other servers."""

from __future__ import annotations

import gzip
import re

import httpx
import pytest

from edge_phi3.api.static_files import prefers_html
from edge_phi3.generation.parameters import PARAMETERS
from tests.api.conftest import Running

CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


def test_a_browser_is_sent_to_the_playground_and_a_client_gets_its_json(api: Running) -> None:
    page = api.client.get("/", headers={"accept": CHROMIUM}, follow_redirects=True)
    (sent,) = page.history
    assert (sent.status_code, sent.headers["location"], sent.headers["vary"]) == (307, "ui", "Accept")
    assert (page.url.path, page.headers["content-type"]) == ("/ui", "text/html; charset=utf-8")
    for headers in ({}, {"accept": "*/*"}, {"accept": "application/json, text/html;q=0.9"}):
        answer = api.client.send(httpx.Request("GET", api.client.base_url, headers=headers))
        assert (answer.status_code, answer.json()) == (200, {"message": "Server is running"})
        assert answer.headers["vary"] == "Accept"


@pytest.mark.parametrize(
    ("accept", "prefers"),
    [
        *((accept, True) for accept in (CHROMIUM, "text/html", "text/*", "text/html;q=0.5, application/json;q=0.4")),
        *((accept, False) for accept in ("", "*/*", "application/json", "text/html;q=inf", "/;;,=,")),
        ("text/html;q=0.4, application/json;q=0.5", False),
    ],
)
def test_html_is_preferred_by_those_who_say_so(accept: str, prefers: bool) -> None:
    assert prefers_html(accept) is prefers


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
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy.pop("default-src") == "'none'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert set(policy.values()) == {"'self'", "'none'"}
    assert page.headers["x-content-type-options"] == "nosniff"
    slash = api.client.get("/ui/", follow_redirects=True)
    assert (slash.status_code, slash.url.path) == (200, "/ui")


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


@pytest.mark.parametrize("name", ["nothing.js", "..%2fdocs.html", "%2e%2e%2fstart.js", "index"])
def test_only_the_page_s_files_are_there(api: Running, name: str) -> None:
    answer = api.client.get(f"/ui/{name}")
    assert answer.status_code == 404
    assert "There is nothing at /ui/" in answer.json()["detail"]


def test_the_playground_learns_every_parameter_once(api: Running) -> None:
    config = api.client.get("/ui/config.json").json()
    named = [name for group in config["groups"] for name in group["parameters"]]
    assert sorted(named) == sorted(config["parameters"]) == sorted(PARAMETERS)
    assert set(config["initial"]) <= set(PARAMETERS)
    assert config["needs_key"] is False
    assert config["end_token_ids"]
