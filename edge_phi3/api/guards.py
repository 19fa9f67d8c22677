"""Who may ask, under which name, and how often: Litestar guards."""

import contextlib
import fnmatch
import hmac
import ipaddress
import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import structlog
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from edge_phi3.api.errors import RefusedError
from edge_phi3.api.exchange import exchange_of
from edge_phi3.settings import Settings, SettingsError, digest_of

logger = structlog.get_logger(__name__)

Connection = ASGIConnection[Any, Any, Any, Any]

RATE_HEADERS: Final = tuple(f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset"))
"""The headers of OpenAI's API that say how many requests there are, how many are left, and when all are again."""

_SECONDS: Final = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}

_CLIENTS: Final = 1 << 16
"""How many clients are remembered: those that asked last. Their keys and times take about 15 MB."""

_LOOK_SECONDS: Final = 0.25
"""How often the file of keys is looked at."""

_HOST: Final = re.compile(r"(\[[^\]]*\]|[^:]*)(?::\d*)?")


class KeyRing:
    """The API keys that the service knows, as digests with their clients' names; without any, all are let in."""

    def __init__(self, keys: Mapping[bytes, str]) -> None:
        self._keys = dict(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __deepcopy__(self, _: object) -> "KeyRing":
        """Return itself: Litestar copies guards, and what they belong to, with the routes."""
        return self

    def find(self, connection: Connection) -> str | None:
        """Return the name of the known key that a request carries, or None; the request's log line has it too.

        Every key is compared, each in constant time, so that the time taken reveals nothing about them.
        """
        scheme, _, bearer = connection.headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else connection.headers.get("x-api-key", "")
        digest = digest_of(key)
        found = [name for known, name in self._keys.items() if hmac.compare_digest(digest, known)]
        exchange_of(connection.scope).key = name = found[0] if found else None
        return name

    async def guard(self, connection: Connection, _: BaseRouteHandler) -> None:
        """Refuse a request without a known key; a Litestar guard."""
        if self.find(connection) is None:
            raise RefusedError(
                401, "This service needs an API key: send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`."
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


class HostList:
    """The names that requests may bear in ``Host``: those of the options; only local ones on loopback without any.

    Addresses are always taken: only names can be made to point elsewhere. So is a request without ``Host``, which no
    browser sends.
    """

    def __init__(self, settings: Settings) -> None:
        address = _address(settings.host)
        is_local = address.is_loopback if address else settings.host == "localhost"
        names = settings.allowed_host or (("localhost", "*.localhost", settings.host) if is_local else ("*",))
        self._names = re.compile("|".join(fnmatch.translate(name.lower()) for name in names))

    async def guard(self, connection: Connection, _: BaseRouteHandler) -> None:
        """Refuse a request to another name; a Litestar guard."""
        host = connection.headers.get("host", "")
        if not self.takes(host):
            raise RefusedError(
                421,
                f"This service is not called {host[:60]!r}; to let it be, start it with --allowed-host and that name.",
            )

    def takes(self, header: str) -> bool:
        """Return whether a request may bear such a ``Host``."""
        host = match[1].strip("[]").rstrip(".").lower() if (match := _HOST.fullmatch(header)) else header
        return not header or self._names.match(host) is not None or _address(host) is not None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    return None


class RateLimiter:
    """Lets each client ask `N` times at once, and as often again, evenly, in each unit of time."""

    def __init__(self, limit: str, keys: KeyRing, clock: Callable[[], float] = time.monotonic) -> None:
        count, unit = limit.split("/")
        self._count, self._seconds, self._keys, self._clock = int(count), _SECONDS[unit], keys, clock
        self._full_at: OrderedDict[str, float] = OrderedDict()  # when each client's bucket is full again

    def take(self, client: str) -> tuple[int, float, float]:
        """Take one token; return how many are left, when all are there again, and when the next is, if none was.

        Times are seconds from now; the last is 0 when there was a token.
        """
        now, each = self._clock(), self._seconds / self._count
        wait = max(0.0, self._full_at.pop(client, now) - now)
        late = wait + each - self._seconds
        if late > 1e-6:
            self._full_at[client] = now + wait
            return 0, wait, late
        wait += each
        self._full_at[client] = now + wait
        if len(self._full_at) > _CLIENTS:
            self._full_at.popitem(last=False)
        return math.floor((self._seconds - wait) / each + 1e-6), wait, 0.0

    async def guard(self, connection: Connection, _: BaseRouteHandler) -> None:
        """Refuse a request that comes too soon; a Litestar guard.

        A wrong key counts for the address, or guessing keys would be free of the limit.
        """
        key = self._keys.find(connection)
        left, full, late = self.take(_place(connection) if key is None else f"key {key}")
        values = (b"%d" % self._count, b"%d" % left, b"%ds" % math.ceil(full))
        exchange_of(connection.scope).headers += zip(map(str.encode, RATE_HEADERS), values, strict=True)
        if late:
            sentence = f"Too many requests (--rate-limit); try again in {math.ceil(late)} s."
            raise RefusedError(429, sentence, {"Retry-After": str(math.ceil(late))})


def _place(connection: Connection) -> str:
    """Return the address that a request comes from; of IPv6 the network, all of which a client has to itself."""
    host = connection.client.host if connection.client else ""
    if (address := _address(host.partition("%")[0])) is None:
        return host[:64]
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)
