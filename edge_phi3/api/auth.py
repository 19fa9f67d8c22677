"""Who may use the service: API keys."""

import hashlib
import hmac
from collections.abc import Iterable
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from edge_phi3.api.errors import UnauthorizedError


class KeyRing:
    """The API keys that the service knows, kept as digests of equal length; without any, every request is let in."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, connection: ASGIConnection[Any, Any, Any, Any]) -> int | None:
        """Return the number of the known key that a request carries, or None.

        Every key is compared, each in constant time, so that the time taken reveals nothing about them.
        """
        scheme, _, bearer = connection.headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else connection.headers.get("x-api-key", "")
        digest = _digest(key)
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return found.index(True) if any(found) else None

    async def guard(self, connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        """Refuse a request without a known key (`UnauthorizedError`); a Litestar guard."""
        if self._digests and self.find(connection) is None:
            raise UnauthorizedError(
                "This service needs an API key: send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`."
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
