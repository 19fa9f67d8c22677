"""The playground's routes, without a browser."""

from __future__ import annotations

import httpx
import pytest

from edge_phi3 import __version__
from edge_phi3.api.static_files import prefers_html
from edge_phi3.generation.parameters import PARAMETERS
from tests.support.services import PATIENCE, Server

CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


def test_a_browser_is_sent_to_the_playground_and_a_client_gets_its_json(server: Server) -> None:
    sent = server.get("", headers={"accept": CHROMIUM})
    assert (sent.status_code, sent.headers["location"], sent.headers["vary"]) == (307, "ui", "Accept")
    page = server.get("", headers={"accept": CHROMIUM}, follow_redirects=True)
    assert str(page.url) == f"{server.url}/ui"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for accept in ("*/*", "application/json", "application/json, text/html;q=0.9"):
        answer = server.get("", headers={"accept": accept})
        assert (answer.status_code, answer.json()) == (200, {"message": "Server is running"})
        assert answer.headers["vary"] == "Accept"
    with httpx.Client(timeout=PATIENCE) as client:
        del client.headers["accept"]
        assert client.get(server.url).json() == {"message": "Server is running"}


@pytest.mark.parametrize("accept", [CHROMIUM, "text/html", "text/*", "text/html;q=0.5, application/json;q=0.4"])
def test_html_is_preferred_by_those_who_say_so(accept: str) -> None:
    assert prefers_html(accept)


@pytest.mark.parametrize(
    "accept", ["", "*/*", "application/json", "text/html;q=0.4, application/json;q=0.5", "text/html;q=inf", "/;;,=,"]
)
def test_html_is_not_preferred_by_others(accept: str) -> None:
    assert not prefers_html(accept)


def test_the_page_may_load_its_own_files_and_nothing_else(server: Server) -> None:
    page = server.get("/ui")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy.pop("default-src") == "'none'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert set(policy.values()) == {"'self'", "'none'"}
    assert page.headers["x-content-type-options"] == "nosniff"


def test_a_file_is_sent_again_only_when_it_has_changed(server: Server) -> None:
    first = server.get("/ui/app.js")
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    again = server.get("/ui/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_page_with_a_slash_leads_to_the_one_without(server: Server) -> None:
    page = server.get("/ui/", follow_redirects=True)
    assert (page.status_code, str(page.url)) == (200, f"{server.url}/ui")


@pytest.mark.parametrize("name", ["nothing.js", "..%2fdocs.html", "%2e%2e%2fstart.js", "index"])
def test_only_the_page_s_files_are_there(server: Server, name: str) -> None:
    answer = server.get(f"/ui/{name}")
    assert answer.status_code == 404
    assert "There is nothing at /ui/" in answer.json()["detail"]


def test_the_page_learns_every_parameter_once(server: Server) -> None:
    config = server.get("/ui/config.json").json()
    named = [name for group in config["groups"] for name in group["parameters"]]
    assert sorted(named) == sorted(config["parameters"]) == sorted(PARAMETERS)
    assert set(config["initial"]) <= set(PARAMETERS)
    assert config["needs_key"] is False
    card = server.get("/version").json()
    assert card["version"] == __version__
    assert config["end_token_ids"]
