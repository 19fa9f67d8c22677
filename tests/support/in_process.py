"""The real service in a thread of this process, on a free port."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from edge_phi3.api.exchange import Exchanges
from edge_phi3.api.server import create_service, uvicorn_config
from edge_phi3.api.service import Loader, Service
from edge_phi3.settings import Settings
from tests.support.services import PATIENCE, wait_for


@dataclass
class Running:
    """A service that listens, its client, and what lies behind the wall."""

    client: httpx.Client
    service: Service
    port: int
    app: Exchanges

    def chat(self, **body: Any) -> httpx.Response:
        return self.client.post("/chat", json=body)

    def tokenize(self, **body: Any) -> Any:
        return self.client.post("/tokenize", json=body).json()

    def wait_until(self, condition: Callable[[], object]) -> None:
        assert wait_for(condition), "it did not become true in time"


@contextlib.contextmanager
def ready(load: Loader, *, wait: bool = True, **options: Any) -> Iterator[Running]:
    """Serve what is loaded; wait for it unless told otherwise."""
    app, service = create_service(Settings.load(options), load)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn_config(app, service.settings))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False) as client:
                it = Running(client, service, port, app)
                if wait:
                    it.wait_until(lambda: service.is_ready or service.failure)
                    assert service.failure is None
                yield it
        finally:
            server.should_exit = True
            thread.join()
