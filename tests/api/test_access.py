"""Who is let in: API keys, rate limits, CORS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.conftest import GREEDY, Running, loader, ready

BODY = {"prompt": "a", "generate_kwargs": GREEDY}
SECRET = "correct-horse"


@pytest.fixture(scope="module")
def guarded(model_path: Path) -> Iterator[Running]:
    with ready(loader(model_path), api_key=["first", SECRET]) as it:
        yield it


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("authorization", f"Bearer {SECRET}", 200),
        ("authorization", f"bearer  {SECRET}", 200),
        ("x-api-key", SECRET, 200),
        ("x-api-key", "first", 200),
        ("accept", "*/*", 401),
        ("authorization", f"Bearer {SECRET}x", 401),
        ("authorization", SECRET, 401),
        ("authorization", f"Basic {SECRET}", 401),
        ("x-api-key", "", 401),
        ("x-api-key", SECRET.upper(), 401),
        ("x-api-key", "é", 401),
    ],
)
def test_known_keys_are_let_in_and_no_others(guarded: Running, name: str, value: str, status: int) -> None:
    headers = {name.encode(): value.encode("latin-1")}
    assert guarded.client.post("/chat", json=BODY, headers=headers).status_code == status
    for path in ("/chat", "/tokenize", "/detokenize"):
        response = guarded.client.post(path, content=b"not even JSON", headers=headers)
        assert response.status_code == (400 if status == 200 else 401)
        assert response.headers.get("www-authenticate") == (None if status == 200 else "Bearer")
        assert ("API key" in response.json()["detail"]) is (status == 401)


def test_probes_and_scrapers_need_no_key_nor_does_a_service_without_any(guarded: Running, api: Running) -> None:
    for path in ("/", "/healthz", "/livez", "/readyz", "/version", "/metrics", "/metrics/prometheus", "/docs"):
        assert guarded.client.get(path).status_code == 200
    assert api.client.post("/chat", json=BODY, headers={"authorization": "Bearer anything"}).status_code == 200


def test_each_key_has_its_own_rate(model_path: Path) -> None:
    with ready(loader(model_path), api_key=["one", "two"], rate_limit="2/hour") as api:
        keys = ("one", "one", "two", "guess", "other", "again", "one")
        answers = [api.client.post("/chat", json=BODY, headers={"x-api-key": key}) for key in keys]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 401, 401, 429, 429]
        assert 0 < int(answers[-1].headers["retry-after"]) <= 3600
        assert "--rate-limit" in answers[-1].json()["detail"]
        assert api.client.get("/healthz").status_code == 200


def test_pages_of_other_origins_may_not_call_unless_configured(api: Running, model_path: Path) -> None:
    def allowed(api: Running, method: str, origin: str) -> str | None:
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        response = api.client.request(method, "/chat", json=BODY, headers={"origin": origin} | asks)
        header: str | None = response.headers.get("access-control-allow-origin")
        return header

    ours, evil = "https://app.example", "https://evil.example"
    assert allowed(api, "OPTIONS", ours) is None
    with ready(loader(model_path), cors_origin=[ours]) as it:
        assert allowed(it, "OPTIONS", ours) == allowed(it, "POST", ours) == ours
        assert allowed(it, "OPTIONS", evil) != evil
