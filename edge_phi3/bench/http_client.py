"""Connections of the load generator to one server."""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import msgspec

from edge_phi3.bench.errors import BenchError, ExchangeError

_DETAIL_LENGTH = 300
_KEEP_ALIVE = 2.0
"""Seconds after which an idle connection is not used again; servers close theirs later."""


class HttpClient:
    """Connections to one server, as many as there are exchanges at once, each of which may take `timeout` seconds.

    The path of `url` is put in front of every other; `api_key` is sent as a bearer token.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        try:
            address = httpx.URL(url if "//" in url else f"http://{url}")
        except httpx.InvalidURL as error:
            raise BenchError(f"{url!r} is not an address: {error}.") from None
        if address.scheme not in {"http", "https"} or not address.host:
            raise BenchError(f"{url!r} is not the address of an HTTP server; give one like http://127.0.0.1:8080.")
        self.url = str(address).rstrip("/")
        self._timeout = timeout
        self._client = httpx.AsyncClient(
            base_url=address,
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            timeout=2 * timeout,  # what ends an exchange is the limit in `exchange`
            limits=httpx.Limits(keepalive_expiry=_KEEP_ALIVE),
            # The system's certificates, and nothing else of the environment: a proxy would be measured as well.
            verify=ssl.create_default_context() if address.scheme == "https" else False,
            trust_env=False,
            transport=transport,
        )

    async def exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, take: Callable[[bytes], Any]
    ) -> None:
        """Send a request, with JSON or without, and hand each piece of the response's body to `take` as it comes.

        Raises:
            ExchangeError: no connection, a broken one, no end within the time limit, or a status other than 200.
        """
        content = None if body is None else msgspec.json.encode(body)
        headers = None if body is None else {"Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._client.stream(method, path, content=content, headers=headers) as response,
            ):
                if response.status_code != 200:
                    detail = (await response.aread()).decode(errors="replace")[:_DETAIL_LENGTH].strip()
                    raise ExchangeError(f"HTTP {response.status_code}" + (f": {detail}" if detail else ""))
                async for piece in response.aiter_bytes():
                    take(piece)
        except TimeoutError:
            raise ExchangeError(f"No end of the response within {self._timeout:g} s.") from None
        except httpx.ConnectError as error:
            raise ExchangeError(f"No connection to {self.url}: {error}.") from None
        except httpx.HTTPError as error:
            raise ExchangeError(f"The connection broke: {str(error) or type(error).__name__}") from None

    async def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON object that the server answers; raises as `exchange` and `parse_object` do."""
        whole = bytearray()
        await self.exchange(method, path, body, whole.extend)
        return parse_object(bytes(whole))

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


def parse_object(data: bytes) -> dict[str, Any]:
    """Return a JSON object; `ExchangeError` when it is something else, or the error that a server reports."""
    try:
        value = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise ExchangeError(f"The server sent what is not JSON: {data[:80]!r} ({error}).") from None
    if not isinstance(value, dict):
        raise ExchangeError(f"The server sent {data[:80]!r} where an object belongs.")
    if reported := value.get("error") or value.get("detail"):
        raise ExchangeError(str(reported.get("message", reported) if isinstance(reported, dict) else reported))
    return value
