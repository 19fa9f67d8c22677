"""Who may ask, how often, from where and by which name; and what a page in a browser may do."""

import gzip
import hashlib
import io
import itertools
import json
import logging
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from edge_phi3.api import exchange, guards
from edge_phi3.api.guards import RATE_HEADERS, HostList, KeyRing, RateLimiter
from edge_phi3.api.logs import configure_logging
from edge_phi3.api.server import _bind
from edge_phi3.settings import Settings
from tests.api.conftest import GREEDY, USER, Clock, Running, loader, ready
from tests.support.cases import cases
from tests.support.services import PATIENCE, serving, wait_for

BODY = {"prompt": "a", "generate_kwargs": GREEDY}
OURS, OTHER, EVIL = (f"https://{name}.example" for name in ("app", "other", "evil"))


def test_each_key_has_its_own_rate(model_path: Path) -> None:
    with ready(loader(model_path), api_key=["one", "two"], rate_limit="2/hour") as api:
        keys = ("one", "one", "two", "guess", "other", "again", "one")
        answers = [api.client.post("/chat", json=BODY, headers={"x-api-key": key}) for key in keys]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 401, 401, 429, 429]
        assert len(set(api.service.settings.keys.values())) == 2, "keys without names have each its own"
        assert 0 < int(answers[-1].headers["retry-after"]) <= 1800
        assert "--rate-limit" in answers[-1].json()["detail"]
        left = [[answer.headers[name] for name in RATE_HEADERS] for answer in answers]
        assert [(limit, remaining) for limit, remaining, _ in left[:3]] == [("2", "1"), ("2", "0"), ("2", "1")]
        assert left[-1][:2] == ["2", "0"]
        assert 3590 <= int(left[-1][2].removesuffix("s")) <= 3600
        stream = api.client.post("/chat", json=BODY | {"stream": True}, headers={"x-api-key": "two"})
        assert (stream.status_code, stream.headers[RATE_HEADERS[1]]) == (200, "0")
        refused = api.client.post("/v1/completions", json={"prompt": "a"}, headers={"x-api-key": "two"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert api.client.get("/healthz").status_code == 200


def test_changed_keys_are_in_force_without_a_lost_request_and_no_key_shows_anywhere(
    model_path: Path, tmp_path: Path
) -> None:
    old, new, other, _ = secrets = [f"secret-{word}-5e4d" for word in ("old", "new", "other", "wrong")]
    file, beside = tmp_path / "keys", tmp_path / "beside"
    file.write_text(f"ada {old}\n{other}\n")
    options = ("--threads", "1", "--log-level", "debug", "--log-prompts", "--api-key-file", str(file))
    with serving(tmp_path, str(model_path), *options, store=tmp_path) as server:
        said = []

        def status(key: str, **body: Any) -> int:
            header = {"authorization": f"Bearer {key}"}
            answer = httpx.post(
                f"{server.url}/chat", json=BODY | body, headers=header, trust_env=False, timeout=PATIENCE
            )
            said.append(f"{answer.headers}{answer.text}")
            return answer.status_code

        def replace(content: str) -> None:
            beside.write_text(content)
            beside.replace(file)

        assert [status(key) for key in secrets] == [200, 401, 200, 401]
        assert [status(old, prompt=1), status(old, generate_kwargs={"top_p": 9})] == [400, 400]
        long = {"min_new_tokens": 3000, "max_new_tokens": 3000, "do_sample": False}
        with httpx.stream(
            "POST",
            f"{server.url}/chat",
            json=BODY | {"stream": True, "generate_kwargs": long},
            headers={"x-api-key": old},
            trust_env=False,
            timeout=PATIENCE,
        ) as stream:
            events = stream.iter_lines()
            next(events)
            replace(f"ada {new}\n")
            assert wait_for(lambda: status(new) == 200)
            assert [status(old), status(other)] == [401, 401]
            assert [line for line in events if line][-1].startswith('data: {"Result"'), "what had begun ended whole"
        for content in ("", "a b c\n"):
            before = server.log.read_text().count("stay as they were")
            replace(content)
            assert wait_for(lambda: server.log.read_text().count("stay as they were") > before)  # noqa: B023 - at once
            assert [status(new), status(old)] == [200, 401]
        file.unlink()
        assert status(new) == 200
        metrics = server.get("/metrics/prometheus").text
        unnamed = f"key-{hashlib.sha256(other.encode()).hexdigest()[:6]}"
        assert f'edge_phi3_key_requests_total{{key="{unnamed}",outcome="ok"}} 1.0' in metrics
        assert 'edge_phi3_key_requests_total{key="ada",outcome="invalid"} 2.0' in metrics
        assert re.search(r'edge_phi3_key_tokens_total{key="ada",kind="generation"} 3\d\d\d.0', metrics)
        assert not server.logged_errors() or "stay as they were" in server.logged_errors()[0]
        process = Path(f"/proc/{server.process.pid}")
        said += [metrics, server.log.read_text()] + [
            server.get(route).text for route in ("/", "/docs", "/ui", "/version")
        ]
        said += [(process / of).read_text(errors="replace") for of in ("cmdline", "environ")]
        assert "key=ada" in server.log.read_text()
        assert [secret for secret in secrets for text in said if secret in text] == []


def test_keys_that_others_can_see_are_warned_about(model_path: Path, tmp_path: Path) -> None:
    with serving(
        tmp_path, str(model_path), "--threads", "1", store=tmp_path, environment=os.environ | {"EDGE_PHI3_API_KEY": "a"}
    ) as server:
        assert "use --api-key-file" in server.log.read_text()


@pytest.mark.parametrize("limit", ["1/second", "3/minute", "7/hour", "100000/hour", "999999999/day"])
def test_a_client_may_ask_n_times_at_once_and_then_evenly_and_others_do_not_matter(limit: str) -> None:
    clock = Clock(now=1e6)
    limiter = RateLimiter(limit, KeyRing({}), lambda: clock.now)
    number, unit = limit.split("/")
    count, seconds = int(number), {"second": 1, "minute": 60, "hour": 3600, "day": 86400}[unit]
    burst = min(count, 20_000)
    vars(limiter).update(_count=burst, _seconds=seconds * burst / count)  # the same rate, a smaller bucket
    taken = [limiter.take("a") for _ in range(burst)]
    assert [left for left, _, _ in taken] == [*range(burst)][::-1]
    assert not any(late for _, _, late in taken)
    each = seconds / count
    for _ in range(3):
        left, _, late = limiter.take("a")
        assert left == 0
        assert late == pytest.approx(each, rel=1e-3, abs=1e-6)
    clock.now += 2.5 * each
    assert [limiter.take("a")[2] > 0 for _ in range(4)] == [False, burst < 2, True, True]
    assert limiter.take("b")[2] == 0


def test_addresses_without_number_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_CLIENTS", 100)
    limiter = RateLimiter("1/day", KeyRing({}))
    assert limiter.take("often")[2] == 0
    for number in range(10_000):
        limiter.take(f"address {number}")
        assert limiter.take("often")[2] > 0, "who asks again and again is not forgotten"
    assert len(limiter._full_at) <= 101


@cases
def test_only_a_trusted_proxy_says_for_whom_it_asks(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: tuple[str, ...], forwarded: str, counted_apart: bool
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    with ready(loader(model_path), rate_limit="1/day", trusted_proxies=trusted) as api:
        headers = [{"x-forwarded-for": forwarded.format(number)} for number in (1, 2)]
        found = [api.client.post("/chat", json=BODY, headers=header).status_code for header in headers]
        assert found == [200, 200 if counted_apart else 429]


@cases
def test_the_service_is_called_by_its_own_names(options: dict[str, Any], host: str, taken: bool) -> None:
    assert HostList(Settings.load(options)).takes(host) is taken


def test_a_stranger_s_name_is_refused_on_every_route(api: Running) -> None:
    for path, method in (("/chat", "POST"), ("/v1/models", "GET"), ("/", "GET"), ("/metrics", "GET"), ("/ui", "GET")):
        answer = api.client.request(
            method, path, headers={"host": "evil.example"}, json=BODY if method == "POST" else None
        )
        assert answer.status_code == 421
        assert "'evil.example'" in answer.text
        assert "--allowed-host" in answer.text


@cases
def test_a_page_cannot_send_a_body_without_a_type_and_nobody_a_compressed_one(
    api: Running, headers: dict[str, str], status: int, sentence: str
) -> None:
    for path in ("/chat", "/v1/completions", "/tokenize"):
        body = json.dumps({"text": "a"} if path == "/tokenize" else {"prompt": "a"}).encode()
        content = gzip.compress(body) if headers.get("content-encoding") == "gzip" else body
        answer = api.client.post(path, content=content, headers=headers)
        assert (answer.status_code, sentence in answer.text) == (status, True)


def test_pages_of_other_origins_may_not_call_unless_configured(api: Running, model_path: Path) -> None:
    def ask(api: Running, method: str, origin: str, path: str = "/chat", **more: Any) -> httpx.Response:
        wanted = "authorization,content-type,x-stainless-os,x-stainless-retry-count,x-stainless-anything"
        asks = {"access-control-request-method": "POST", "access-control-request-headers": wanted}
        body = None if method == "OPTIONS" else BODY | more
        key = {"authorization": "Bearer right"} if method == "POST" else {}
        return api.client.request(method, path, json=body, headers={"origin": origin} | asks | key)

    def allowed(answer: httpx.Response) -> str | None:
        return answer.headers.get("access-control-allow-origin")

    assert allowed(ask(api, "OPTIONS", OURS)) is None
    guarded: dict[str, Any] = {"api_key": ["right"], "rate_limit": "20/day"}
    with ready(loader(model_path), cors_origin=[OURS, OTHER], **guarded) as it:
        preflight = ask(it, "OPTIONS", OURS)
        assert (preflight.status_code, allowed(preflight)) == (204, OURS)
        given = {name.strip().lower() for name in preflight.headers["access-control-allow-headers"].split(",")}
        assert {"authorization", "content-type", "x-stainless-anything"} <= given
        assert ask(it, "OPTIONS", OURS, "/v1/chat/completions").status_code == 204
        assert allowed(ask(it, "OPTIONS", EVIL)) != EVIL
        before = list(exchange._HEADERS)
        for origin in (OURS, OTHER, EVIL):
            answer = ask(it, "POST", origin, stream=True)
            assert answer.status_code == 200
            assert answer.headers.get_list("access-control-allow-origin") == ([] if origin == EVIL else [origin])
        assert before == exchange._HEADERS
        metrics = it.client.get("/metrics/prometheus").text
        assert 'requests_total{endpoint="/chat",outcome="ok"} 3.0' in metrics
        assert 'outcome="error"' not in metrics
        # Headers of one origin never reach another, whatever the answer is.
        requests = [("/chat", BODY | {"stream": True}), ("/chat", {"prompt": 1}), ("/nowhere", {})]
        requests.append(("/v1/chat/completions", {"messages": USER, "max_tokens": 1}))
        for (path, body), origin, key in itertools.product(requests * 2, [OURS, OTHER, ""], ["right", "wrong"]):
            headers = {"Authorization": f"Bearer {key}"} | ({"Origin": origin} if origin else {})
            answer = it.client.post(path, json=body, headers=headers)
            told = answer.headers.get_list("access-control-allow-origin")
            assert told == ([origin] if origin else []), (path, answer.status_code)
            assert len(answer.headers.get_list("x-ratelimit-limit-requests")) <= 1


@pytest.mark.usefixtures("_logging")
def test_no_text_of_a_stranger_begins_a_line_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    forged = "GET /x\n2026-11-30T00:00:00Z [info     ] forged\r\x1b[31m\u2028\x85end"
    configure_logging("text", "info")
    structlog.get_logger("a").info(forged, path=forged)
    logging.getLogger("b").warning("of a library: %s", forged)
    try:
        raise ValueError(forged)
    except ValueError:
        structlog.get_logger("c").exception("unhandled", path=forged)
    lines = written.getvalue().splitlines()
    assert [line[:2] for line in lines if "forged" in line and not line.startswith("    ")] == ["20"] * 3
    assert all(line.isprintable() for line in lines)
    assert "\\x1b[31m" in lines[0]


def test_a_machine_without_ipv6_listens_on_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with _bind("::", 0) as listener:
        assert listener.family == socket.AF_INET
        assert listener.getsockname()[0] == "0.0.0.0"


def test_all_addresses_of_both_kinds_are_listened_on(model_path: Path, tmp_path: Path) -> None:
    with serving(tmp_path, str(model_path), "--threads", "1", "--host", "::", store=tmp_path) as server:
        assert server.get("/livez").status_code == 200
        try:
            answer = httpx.get(f"http://[::1]:{server.port}/livez", trust_env=False)
        except httpx.ConnectError:
            pytest.skip("this machine has no IPv6")
        assert answer.status_code == 200
