"""How often a client may ask: a token bucket for each key, or for each address."""

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from edge_phi3.api.auth import KeyRing
from edge_phi3.api.errors import RateLimitedError
from edge_phi3.api.exchange import exchange_of

RATE_HEADERS: Final = tuple(f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset"))
"""The headers of OpenAI's API that say how many requests there are, how many are left, and when all are again."""

_SECONDS: Final = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}

_CLIENTS: Final = 1 << 16
"""How many clients are remembered: those that asked last. Their keys and times take about 15 MB."""


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

    async def guard(self, connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        """Refuse a request that comes too soon (`RateLimitedError`); a Litestar guard.

        A wrong key counts for the address, or guessing keys would be free of the limit.
        """
        key = self._keys.find(connection) if self._keys else None
        left, full, late = self.take(_place(connection) if key is None else f"key {key}")
        values = (b"%d" % self._count, b"%d" % left, b"%ds" % math.ceil(full))
        exchange_of(connection.scope).headers += zip(map(str.encode, RATE_HEADERS), values, strict=True)
        if late:
            raise RateLimitedError(math.ceil(late))


def _place(connection: ASGIConnection[Any, Any, Any, Any]) -> str:
    """Return the address that a request comes from; of IPv6 the network, all of which a client has to itself."""
    host = connection.client.host if connection.client else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host[:64]
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)
