"""Options checked, and where they come from: flags win over the environment, which wins over a TOML file."""

import difflib
import functools
import hashlib
import ipaddress
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Self

from pydantic import SecretStr, ValidationError, field_validator

from edge_phi3.conversion.quantization_types import UnknownQuantizationError, quantization_type
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.files import read_bounded
from edge_phi3.llama.options import Lora
from edge_phi3.options import Options, allowed_values, flag_of, group_of, key_of

ENV_PREFIX = "EDGE_PHI3_"

_MAX_BYTES = 1 << 20
"""Of a configuration file, or one of keys."""

_KEY_LINE: Final = re.compile(r"(?:([A-Za-z0-9._@-]{1,64})\s+)?([!-~]+)")


class SettingsError(EdgePhi3Error):
    """An option has a value that it cannot have, or a configuration file that cannot be read."""


class Settings(Options):
    """The service's options, checked, and from where they come."""

    @field_validator("api_key", "cors_origin", "allowed_host", "trusted_proxies", "lora", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Split the comma-separated form of an environment variable."""
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("lora")
    @classmethod
    def _check_lora(cls, value: tuple[Lora, ...]) -> tuple[Lora, ...]:
        names = [lora.name for lora in value if lora.name]
        if len(set(names)) < len(names) or not all(math.isfinite(lora.scale) for lora in value):
            raise ValueError("each name is given once, and a scale is a finite number")
        return value

    @field_validator("api_key")
    @classmethod
    def _refuse_short_keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(not key.get_secret_value().isascii() or not key.get_secret_value().strip() for key in value):
            raise ValueError("a key is made of ASCII characters and is not empty")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _known_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if text != "*":
                ipaddress.ip_network(text)  # says itself what is wrong
        return value

    @field_validator("quant")
    @classmethod
    def _known_quantization(cls, value: str) -> str:
        try:
            return quantization_type(value).name
        except UnknownQuantizationError as error:
            raise ValueError(str(error)) from error

    @classmethod
    def load(cls, flags: Mapping[str, object] | None = None, config_file: Path | None = None) -> Self:
        """Return the options from flags, by field name, then the environment, then a TOML file; or `SettingsError`."""
        flags, variables = flags or {}, _environment(cls.model_fields)
        merged = {**(read_toml(config_file, cls.model_fields) if config_file else {}), **variables, **flags}
        try:
            settings = cls.model_validate(merged)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            place = f"{key_of(name)} in {config_file}"
            if name in flags or name in variables:
                place = flag_of(name) if name in flags else ENV_PREFIX + name.upper()
            shown = "the value" if name.startswith("api_key") else repr(merged[name])
            why = f"; give {allowed_values(cls.model_fields[name])}"
            if first["type"] == "value_error":
                why = f": {first['ctx']['error']}".rstrip(".")
            raise SettingsError(f"{place}: {shown} is not allowed{why}.") from None
        _ = settings.keys
        return settings

    @functools.cached_property
    def keys(self) -> dict[bytes, str]:
        """The keys that clients may send, as `read_keys` found them first: a pipe can be read once."""
        return self.read_keys()

    def read_keys(self) -> dict[bytes, str]:
        """Return the digest of each key that clients may send, and its name; none when the service is open.

        A wrong `api_key_file` is a `SettingsError`.
        """
        given = [digest_of(key.get_secret_value()) for key in self.api_key]
        named = _read_key_file(self.api_key_file) if self.api_key_file else {}
        return {digest: named.get(digest) or f"key-{digest.hex()[:6]}" for digest in [*given, *named]}


def digest_of(key: str) -> bytes:
    """Return what is kept of an API key, 32 bytes for any."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read_key_file(path: Path) -> dict[bytes, str]:
    """Return the digest of each key in a file of lines ``KEY`` or ``NAME KEY``, and its name, empty without one.

    Several keys may have one name: one client, of which some computers have the new key and some the old one. No text
    of the file is in an error.
    """
    try:
        lines = read_bounded(path, _MAX_BYTES, regular=False).decode("ascii").splitlines()
    except UnicodeError:
        raise SettingsError(f"--api-key-file: {path} holds characters that are not ASCII.") from None
    except OSError as error:
        raise SettingsError(f"--api-key-file: {path} cannot be read: {error.strerror}.") from None
    keys: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if (found := _KEY_LINE.fullmatch(line.strip())) is None:
            raise SettingsError(
                f"--api-key-file: line {number} of {path} is neither a key nor a name and a key; a name has at most 64"
                " letters, digits and ._@-, and neither has a space in it."
            )
        keys[digest_of(found[2])] = found[1] or ""
    if not keys:
        raise SettingsError(f"--api-key-file: {path} holds no key; write one a line.")
    return keys


def _environment(names: Iterable[str]) -> dict[str, object]:
    """Return the options in the environment; an empty variable counts as not set.

    Kubernetes sets ``EDGE_PHI3_PORT=tcp://10.0.0.1:80`` in every pod beside a Service of the name edge-phi3.
    """
    found = {name: os.environ.get(ENV_PREFIX + name.upper(), "") for name in names}
    return {name: value for name, value in found.items() if value and not (name == "port" and "://" in value)}


def read_toml(path: Path, names: Iterable[str]) -> dict[str, object]:
    """Return the options in a TOML file, by field name; `SettingsError` when it cannot be read or holds another key."""
    known = list(names)
    try:
        text = read_bounded(path, _MAX_BYTES, regular=False).decode("utf-8")
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


def to_toml(settings: Settings) -> str:
    """Return all options as a TOML file that `Settings.load` reads back, each with its meaning as a comment.

    Keys of clients are not written: they belong in a file of their own or in the environment.
    """
    lines: list[str] = []
    groups: set[str] = set()
    for name, field in type(settings).model_fields.items():
        key, value = key_of(name), settings.model_dump(include={name})[name]
        if (group := group_of(field)) not in groups:
            lines.append(f"{chr(10) if groups else ''}# -- {group} --")
            groups.add(group)
        lines.append(f"# {field.description}")
        if name == "api_key":
            lines.append(f"# {key} = [] # {len(value)} given, not shown")
        else:
            lines.append(f"# {key} =" if value is None else f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    # A JSON string, number or boolean is also a TOML one.
    return json.dumps(value, ensure_ascii=False)
