"""Ports for programs that must be told one before they listen."""

from __future__ import annotations

import random
import socket

_FIRST, _LAST = 20_000, 32_000
"""Below the ports that the system gives to outgoing connections, any of which could take a port before it is used."""


def free_port() -> int:
    """Return a port on loopback that nobody listens on."""
    dice = random.SystemRandom()
    while True:
        port = dice.randrange(_FIRST, _LAST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
