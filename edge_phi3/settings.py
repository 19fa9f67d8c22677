"""Where options come from: flags win over the environment, which wins over a TOML file."""

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

from edge_phi3.conversion.quantization_types import UnknownQuantizationError, quantization_type
from edge_phi3.files import read_bounded
from edge_phi3.llama.options import Lora
from edge_phi3.options import Options
from edge_phi3.settings_sources import ENV_PREFIX, MAX_BYTES, SettingsError, environment, read_toml
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
        settings.api_keys()
        return settings

    def api_keys(self) -> list[str]:
        """Return the keys that clients may send, those of `api_key_file` too; none when the service is open."""
        keys = [key.get_secret_value() for key in self.api_key]
        if self.api_key_file is not None:
            try:
                lines = read_bounded(self.api_key_file, MAX_BYTES, regular=False).decode("ascii").splitlines()
            except (OSError, UnicodeError) as error:
                why = getattr(error, "strerror", error)
                raise SettingsError(f"--api-key-file: {self.api_key_file} cannot be read: {why}.") from None
            found = [line.strip() for line in lines if line.strip()]
            if not found:
                raise SettingsError(f"--api-key-file: {self.api_key_file} holds no key; write one a line.")
            keys += found
        return keys
