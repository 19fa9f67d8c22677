"""Where options come from beside flags: the environment, and a TOML file."""

import difflib
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path

from edge_phi3.errors import EdgePhi3Error
from edge_phi3.files import read_bounded
from edge_phi3.settings_text import key_of

ENV_PREFIX = "EDGE_PHI3_"

MAX_BYTES = 1 << 20
"""Of a configuration file, or one of keys."""


class SettingsError(EdgePhi3Error):
    """An option has a value that it cannot have, or a configuration file that cannot be read."""


def environment(names: Iterable[str]) -> dict[str, object]:
    """Return the options in the environment; an empty variable counts as not set.

    Kubernetes sets ``EDGE_PHI3_PORT=tcp://10.0.0.1:80`` in every pod beside a Service of the name edge-phi3.
    That is the Service's address and not our option.
    """
    found = {name: os.environ.get(ENV_PREFIX + name.upper(), "") for name in names}
    return {name: value for name, value in found.items() if value and not (name == "port" and "://" in value)}


def read_toml(path: Path, names: Iterable[str]) -> dict[str, object]:
    """Return the options in a TOML file, by field name; `SettingsError` when it cannot be read or holds another key."""
    known = list(names)
    try:
        text = read_bounded(path, MAX_BYTES, regular=False).decode("utf-8")
        if "\\u0000" in text or "\\U00000000" in text:
            raise ValueError("no option can hold a NUL")
        content = tomllib.loads(text)
    except OSError as error:
        raise SettingsError(f"The configuration file {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"The configuration file {path} is not valid TOML: {error}.") from None
    values = {key.replace("-", "_"): value for key, value in content.items()}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            hint = f" Did you mean {' or '.join(key_of(name) for name in close)}?" if close else ""
            raise SettingsError(f"The configuration file {path} has the key {key!r}, which is no option.{hint}")
    return values
