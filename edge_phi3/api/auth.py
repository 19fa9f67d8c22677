"""Who may use the service: API keys."""

import hmac
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import structlog
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from edge_phi3.api.errors import UnauthorizedError
from edge_phi3.api.exchange import exchange_of
from edge_phi3.api_keys import digest_of
from edge_phi3.settings_sources import SettingsError

logger = structlog.get_logger(__name__)

_LOOK_SECONDS: Final = 0.25
"""How often the file of keys is looked at."""


class KeyRing:
    """The API keys that the service knows, as digests with their clients' names; without any, all are let in."""

    def __init__(self, keys: Mapping[bytes, str]) -> None:
        self._keys = dict(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __deepcopy__(self, _: object) -> "KeyRing":
        """Return itself: Litestar copies guards, and what they belong to, with the routes."""
        return self

    def find(self, connection: ASGIConnection[Any, Any, Any, Any]) -> str | None:
        """Return the name of the known key that a request carries, or None; the request's log line has it too.

        Every key is compared, each in constant time, so that the time taken reveals nothing about them.
        """
        scheme, _, bearer = connection.headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else connection.headers.get("x-api-key", "")
        digest = digest_of(key)
        found = [name for known, name in self._keys.items() if hmac.compare_digest(digest, known)]
        exchange_of(connection.scope).key = found[0] if found else None
        return found[0] if found else None

    async def guard(self, connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        """Refuse a request without a known key (`UnauthorizedError`); a Litestar guard."""
        if self._keys and self.find(connection) is None:
            raise UnauthorizedError(
                "This service needs an API key: send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`."
            )

    def follow(self, path: Path, read: Callable[[], Mapping[bytes, str]], stop: threading.Event) -> None:
        """Until `stop`, take what `read` returns in place of the keys whenever the file at `path` has changed.

        A file that cannot be read, or holds no key, leaves the keys as they are: nobody is let in or locked out by it.
        """
        seen: object = None
        while not stop.wait(_LOOK_SECONDS):
            try:
                found = path.stat()
                state: object = (found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev)
            except OSError as error:
                state = error.errno
            if state == seen:
                continue
            seen = state
            try:
                keys = dict(read())
            except SettingsError as error:
                logger.error("API keys stay as they were", reason=str(error))
            else:
                if keys != self._keys:
                    self._keys = keys
                    logger.info("API keys read anew", names=sorted(set(keys.values())))
