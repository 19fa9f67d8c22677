"""By which names the service may be called, so that no page reaches it under a name of its own (DNS rebinding)."""

import fnmatch
import ipaddress
import re
from typing import Any, Final

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from edge_phi3.api.errors import WrongHostError
from edge_phi3.settings import Settings

_HOST: Final = re.compile(r"(\[[^\]]*\]|[^:]*)(?::\d*)?")


class HostList:
    """The names that requests may bear in ``Host``: those of the options; only local ones on loopback without any.

    Addresses are always taken: only names can be made to point elsewhere. So is a request without ``Host``, which no
    browser sends.
    """

    def __init__(self, settings: Settings) -> None:
        names = settings.allowed_host or (
            ("localhost", "*.localhost", settings.host) if _is_loopback(settings.host) else ("*",)
        )
        self._names = re.compile("|".join(fnmatch.translate(name.lower()) for name in names))

    async def guard(self, connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        """Refuse a request to another name (`WrongHostError`); a Litestar guard."""
        host = connection.headers.get("host", "")
        if not self.takes(host):
            raise WrongHostError(
                f"This service is not called {host[:60]!r}; to let it be, start it with --allowed-host and that name."
            )

    def takes(self, header: str) -> bool:
        """Return whether a request may bear such a ``Host``."""
        host = match[1].strip("[]").rstrip(".").lower() if (match := _HOST.fullmatch(header)) else header
        return not header or self._names.match(host) is not None or _is_address(host)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback if _is_address(host) else host == "localhost"
