"""API keys as they are kept: a digest of each, with the name of its client."""

import hashlib
import re
from pathlib import Path
from typing import Final

from edge_phi3.files import read_bounded
from edge_phi3.settings_sources import MAX_BYTES, SettingsError

_LINE: Final = re.compile(r"(?:([A-Za-z0-9._@-]{1,64})\s+)?([!-~]+)")


def digest_of(key: str) -> bytes:
    """Return what is kept of a key, 32 bytes for any."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_key_file(path: Path) -> dict[bytes, str]:
    """Return the digest of each key in a file of lines ``KEY`` or ``NAME KEY``, and its name; "key-N" without one.

    Several keys may have one name: one client, of which some computers have the new key and some the old one.

    Raises:
        SettingsError: the file cannot be read, a line is neither, or there is none. No text of it is in the message.
    """
    try:
        lines = read_bounded(path, MAX_BYTES, regular=False).decode("ascii").splitlines()
    except UnicodeError:
        raise SettingsError(f"--api-key-file: {path} holds characters that are not ASCII.") from None
    except OSError as error:
        raise SettingsError(f"--api-key-file: {path} cannot be read: {error.strerror}.") from None
    keys: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if (found := _LINE.fullmatch(line.strip())) is None:
            raise SettingsError(
                f"--api-key-file: line {number} of {path} is neither a key nor a name and a key; a name has at most 64"
                " letters, digits and ._@-, and neither has a space in it."
            )
        keys[digest_of(found[2])] = found[1] or f"key-{len(keys) + 1}"
    if not keys:
        raise SettingsError(f"--api-key-file: {path} holds no key; write one a line.")
    return keys
