"""What goes over a socket, byte for byte: the demo model's service, asked as all kinds of clients and enemies ask."""

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from edge_phi3.pipeline import TextGenerationPipeline
from tests.api.conftest import PATIENCE, Running, loader, ready
from tests.support.cases import cases, tables
from tests.support.services import Server, serving, wait_for

USER = [{"role": "user", "content": "a"}]
BODIES: dict[str, Any] = tables(__file__)["BODIES"]
H2C = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA"]
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD_LIMIT = 65536
SLACK = 24 << 20
"""Bytes by which a process may grow for reasons of its own: allocators, threads, caches."""


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    """The demo model with the limits as they come."""
    with serving(store, "--threads", "1", "--stream-interval", "0", store=store) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(store: Path) -> Iterator[Server]:
    """The same, out of patience after half a second."""
    times = [f"--{what}=0.5" for what in ("header-timeout", "body-timeout", "send-timeout", "keep-alive")]
    with serving(store, "--threads", "1", "--stream-interval", "0", *times, store=store) as running:
        yield running


@contextlib.contextmanager
def connected(server: Server | Running, **options: int) -> Iterator[socket.socket]:
    with socket.socket() as client:
        for name, value in options.items():
            level = socket.IPPROTO_TCP if name.startswith("TCP") else socket.SOL_SOCKET
            client.setsockopt(level, getattr(socket, name), value)
        client.settimeout(PATIENCE)
        client.connect(("127.0.0.1", server.port))
        yield client


def until_closed(client: socket.socket) -> bytes:
    """Return all that comes until the other side closes."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(1 << 16):
            received += piece
    return bytes(received)


def head(method: str, path: str, *lines: str, version: str = "1.1", body: bytes | None = None) -> bytes:
    """Return a request, with what its body needs."""
    if body is not None:
        lines = (*lines, "Content-Type: application/json", f"Content-Length: {len(body)}")
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: localhost", *lines, "", ""]).encode() + (body or b"")


def asked(server: Server | Running, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send one request, on which the connection closes; return the status, headers and body of the answer."""
    with connected(server) as client:
        client.sendall(request)
        return parsed(until_closed(client))


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    top, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = top.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(first.split(" ")[1]), headers, body


def memory(server: Server) -> int:
    return int(psutil.Process(server.process.pid).memory_info().rss)


@pytest.mark.parametrize("path", BODIES)
def test_an_offer_of_http_2_is_passed_over_and_the_body_read(server: Server, path: str) -> None:
    body = json.dumps(BODIES[path]).encode()
    plain, offer = head("POST", path, "Connection: close", body=body), head("POST", path, *H2C, body=body)
    with connected(server) as client:
        client.sendall(offer + head("GET", "/livez", "Connection: close", *H2C[1:]))  # the connection stays HTTP/1.1
        answers = until_closed(client)
    assert re.findall(rb"HTTP/1\.1 (\d+)", answers) == [b"200", b"200"]
    assert asked(server, plain)[0] == 200


def test_a_stream_to_a_client_of_http_1_0_is_not_chunked(server: Server) -> None:
    body = json.dumps(BODIES["/chat"] | {"stream": True}).encode()
    status, headers, content = asked(server, head("POST", "/chat", version="1.0", body=body))
    assert (status, headers["connection"]) == (200, "close")
    assert "transfer-encoding" not in headers
    assert content.startswith(b"data: {")
    assert content.endswith(b"\n\n")


def test_a_request_for_a_proxy_is_answered_as_our_own(server: Server) -> None:
    body = json.dumps(BODIES["/chat"]).encode()
    for target in ("http://localhost/livez", "HTTP://localhost:80/livez?a=b"):
        assert asked(server, head("GET", target, "Connection: close"))[0] == 200
    assert asked(server, head("GET", "http://localhost", "Connection: close"))[2] == b'{"message":"Server is running"}'
    assert asked(server, head("POST", "http://localhost/chat", "Connection: close", body=body))[0] == 200


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("where", ["line", "one header", "many headers"])
def test_a_line_and_headers_of_64_kib_are_taken_and_more_refused(server: Server, where: str, pieces: int) -> None:
    def request(size: int) -> bytes:
        """Return a request whose line and headers take so many bytes, as h11 counts and as it does not."""
        target, lines = "/livez", ["Connection: close"]
        room = size - len(head("GET", target, *lines))
        if where == "line":
            target += "?" + "a" * (room - 1)
        elif where == "one header":
            lines.append("X: " + "a" * (room - 5))
        else:
            lines += ["X: a"] * (room // 6)
        return head("GET", target, *lines)

    def status(size: int) -> tuple[int, bytes]:
        whole = request(size)
        with connected(server) as client:
            for index in range(pieces):
                client.sendall(whole[index * len(whole) // pieces : (index + 1) * len(whole) // pieces])
            found, _, body = parsed(until_closed(client))
        return found, body

    assert status(HEAD_LIMIT - 16)[0] == 200
    code, body = status(HEAD_LIMIT + 64)
    assert code == 431
    assert "(--max-header-size)" in json.loads(body)["detail"]


def test_60_mb_of_one_header_are_refused_before_they_are_read_and_kept_nowhere(server: Server) -> None:
    before = memory(server)
    with connected(server) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(60 << 4):
                client.sendall(b"a" * (1 << 16))
        answer = until_closed(client)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert memory(server) - before < SLACK


def test_a_body_of_tiny_chunks_is_refused_and_one_of_decent_chunks_is_read(server: Server) -> None:
    chunked = head("POST", "/chat", "Connection: close", "Content-Type: application/json", "Transfer-Encoding: chunked")
    body = json.dumps(BODIES["/chat"]).encode()
    small = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    assert asked(server, chunked + small + b"0\r\n\r\n")[0] == 200
    status, _, content = asked(server, chunked + b"1\r\n \r\n" * 100_000)
    assert status == 400
    assert "chunks are too small" in json.loads(content)["detail"]


def test_pipelined_requests_whose_answers_nobody_reads_cost_no_memory_and_are_answered_later(server: Server) -> None:
    before, requests = memory(server), GET * (7_600_000 // len(GET))
    with connected(server) as client:
        client.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < len(requests):
                sent += client.send(requests[sent : sent + (1 << 16)])
        assert server.get("/livez").status_code == 200
        assert memory(server) - before < SLACK
        client.settimeout(PATIENCE)
        answers = b""
        while answers.count(b'"Alive"}') < 1000:
            answers += client.recv(1 << 16)
    assert set(re.findall(rb"HTTP/1\.1 (\d+)", answers)) == {b"200"}


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_empty_lines_around_requests_are_skipped(server: Server, version: str) -> None:
    body = json.dumps({"messages": USER, "max_tokens": 100, "generate_kwargs": {"eos_token_id": -1}}).encode()
    lines = ["Connection: close"] * (version == "1.1")
    with connected(server) as client:
        client.sendall(b"\r\n" + head("POST", "/tokenize", body=b'{"text": "a"}') + b"\r\n\r\n")
        client.sendall(head("POST", "/v1/chat/completions", *lines, body=body, version=version))
        client.sendall(b"\r\n")
        answers = until_closed(client)
    assert re.findall(rb"HTTP/1\.1 (\d+)", answers) == [b"200", b"200"]
    assert b'"completion_tokens":100' in answers


@cases
def test_who_sends_nothing_or_not_all_is_let_go(hasty: Server, sent: str, status: int | None, sentence: str) -> None:
    with connected(hasty) as client:
        client.sendall(sent.encode())
        answer = until_closed(client)
    assert (parsed(answer)[0] if answer else None) == status
    assert sentence in answer.decode()
    assert (b'{"error":' in answer) is ("/v1/" in sent)


def test_a_byte_now_and_then_wins_no_time(hasty: Server) -> None:
    for begun, more in ((GET[:-2], b"X: a\r\n"), (head("POST", "/chat", "Content-Length: 99999"), b" ")):
        with connected(hasty) as client:
            client.sendall(begun)
            client.settimeout(0.1)
            answer = b""
            while b" 408 " not in answer:
                with contextlib.suppress(TimeoutError):
                    answer += client.recv(1 << 16)
                    assert answer, "closed without a word"
                with contextlib.suppress(ConnectionError):
                    client.send(more)


def test_a_stream_that_nobody_reads_is_ended_and_its_request_with_it(hasty: Server) -> None:
    wordy = {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 1500}
    body = json.dumps({"messages": USER, "generate_kwargs": {"eos_token_id": -1}} | wordy).encode()
    # A short window and small segments: the kernel holds little of it.
    with connected(hasty, SO_RCVBUF=4096, TCP_MAXSEG=536) as client:
        client.sendall(head("POST", "/v1/chat/completions", body=body))
        assert wait_for(lambda: 'outcome="disconnected"' in hasty.get("/metrics/prometheus").text)
        assert wait_for(hasty.is_idle)
        assert b"[DONE]" not in until_closed(client)


def test_one_more_connection_than_there_is_room_for_takes_the_place_of_the_idlest(model_path: Path) -> None:
    with ready(loader(model_path), max_connections=8) as api, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(api)) for _ in range(8)]
        for client in clients[1:]:
            assert answers_on(client)
        with connected(api) as ninth:
            assert answers_on(ninth)
            assert until_closed(clients[0]) == b""  # which never asked for anything
            assert all(answers_on(client) for client in clients[1:])


def answers_on(client: socket.socket) -> bool:
    client.sendall(GET)
    answer = b""
    while not answer.endswith(b"}") and (piece := client.recv(1 << 16)):
        answer += piece
    return answer.startswith(b"HTTP/1.1 200 ")


def test_who_comes_when_all_connections_work_is_told_so(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = threading.Event(), threading.Semaphore(0)
    prepare = TextGenerationPipeline.prepare

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.release()
        assert go.wait(PATIENCE)
        return prepare(*args, **kwargs)

    monkeypatch.setattr(TextGenerationPipeline, "prepare", slow)
    body = json.dumps(BODIES["/chat"]).encode() + b" " * (33 << 10)  # long enough for a thread
    with ready(loader(model_path), max_connections=2) as api, ThreadPoolExecutor(2) as pool:
        request = head("POST", "/chat", "Connection: close", body=body)
        answers = [pool.submit(asked, api, request) for _ in range(2)]  # the client's own idle connection goes
        for _ in answers:
            assert begun.acquire(timeout=PATIENCE)
        with connected(api) as third:
            status, _, content = parsed(until_closed(third))
        assert (status, "(--max-connections)" in content.decode()) == (503, True)
        go.set()
        assert [answer.result(PATIENCE)[0] for answer in answers] == [200, 200]
