"""Where options come from: flags win over the environment, which wins over a TOML file."""

import functools
import ipaddress
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import (
    SecretStr,
    ValidationError,
    field_serializer,
    field_validator,
)

from edge_phi3.api_keys import digest_of, read_key_file
from edge_phi3.conversion.quantization_types import UnknownQuantizationError, quantization_type
from edge_phi3.llama.options import Lora
from edge_phi3.options import Options
from edge_phi3.settings_sources import ENV_PREFIX, SettingsError, environment, read_toml
from edge_phi3.settings_text import explain, flag_of, read_lora, write_lora

__all__ = ["ENV_PREFIX", "Settings", "SettingsError"]


class Settings(Options):
    """The service's options, checked, and from where they come."""

    @field_validator("api_key", "cors_origin", "allowed_host", "trusted_proxies", "lora", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Split the comma-separated form of an environment variable."""
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("speculation", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if type(value) is int else value

    @field_validator("lora", mode="before")
    @classmethod
    def _parse_lora(cls, value: object) -> object:
        if not isinstance(value, list | tuple):
            return value
        return [read_lora(item) if isinstance(item, str) else item for item in value]

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

    @field_serializer("lora")
    def _write_lora(self, value: tuple[Lora, ...]) -> list[str]:
        return [write_lora(*lora) for lora in value]

    @classmethod
    def load(cls, flags: Mapping[str, object] | None = None, config_file: Path | None = None) -> Self:
        """Return the options from flags (by field name), the environment, and a TOML file, in this order of precedence.

        Raises:
            SettingsError: a value, a key, or the file is wrong. The message names the flag, variable or key.
        """
        sources: list[tuple[str, Mapping[str, object]]] = [
            ("{flag}", flags or {}),
            ("{env}", environment(cls.model_fields)),
            (f"{{key}} in {config_file}", read_toml(config_file, cls.model_fields) if config_file else {}),
        ]
        merged: dict[str, object] = {}
        origin: dict[str, str] = {}
        for place, values in sources:
            for name, value in values.items():
                if name not in merged:
                    merged[name] = value
                    origin[name] = place.format(
                        flag=flag_of(name), env=ENV_PREFIX + name.upper(), key=flag_of(name)[2:]
                    )
        try:
            settings = cls.model_validate(merged)
        except ValidationError as error:
            raise SettingsError(explain(error, merged, origin, cls.model_fields)) from None
        _ = settings.keys
        return settings

    @functools.cached_property
    def keys(self) -> dict[bytes, str]:
        """The keys that clients may send, as `read_keys` found them first: a pipe can be read once."""
        return self.read_keys()

    def read_keys(self) -> dict[bytes, str]:
        """Return the digest of each key that clients may send, and its name; none when the service is open.

        Raises:
            SettingsError: `api_key_file` cannot be read, or is wrong.
        """
        given = {digest_of(key.get_secret_value()): f"key-{number}" for number, key in enumerate(self.api_key, 1)}
        return given | (read_key_file(self.api_key_file) if self.api_key_file else {})
