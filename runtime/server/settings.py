"""The server's settings. Defaults are for one machine: loopback only, no key, short queue."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from drafter.errors import UsageError

API_KEY_VARIABLE = "SLIMSPEC_API_KEY"
MAX_STOPS = 4  # as OpenAI has it
MAX_STOP_CHARACTERS = 256


class ServerSettings(BaseModel):
    """What `serve` and `create_app` need. `from_options` reports mistakes as UsageError.

    `max_batch` None: what suits threads and memory. `prefix_cache_mib`: memory for the rows of
    earlier prompts; 0 turns that off. `model_name` None: the name in the engine's manifest.
    `api_key` None: what SLIMSPEC_API_KEY holds, and no key where that is not set either.
    `max_queue` counts waiting requests, not the running ones.
    """

    # An error must not print the key it is about.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    model_name: str | None = Field(default=None, min_length=1)
    api_key: SecretStr | None = Field(default=None)
    max_queue: int = Field(default=16, ge=0)
    max_batch: int | None = Field(default=None, ge=1)
    prefix_cache_mib: int = Field(default=256, ge=0)
    max_tokens_limit: int = Field(default=4096, ge=1)
    max_messages: int = Field(default=512, ge=1)
    max_body_bytes: int = Field(default=1 << 20, ge=1)
    header_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    upload_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    max_connections: int = Field(default=512, ge=1)
    request_timeout_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    grace_s: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    threads: int | None = Field(default=None, ge=1)
    speculate: bool = True
    cors_origins: tuple[str, ...] = ()  # none: browsers of other origins are refused

    @classmethod
    def from_options(cls, called: Mapping[str, str] | None = None, **options: Any) -> Self:
        """Settings from a caller's values. Raises UsageError that names the first mistake, by what
        the setting is `called` on a command line where that says so.
        """
        try:
            return cls(**options)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            reason = first["msg"].removeprefix("Value error, ")
            name = (called or {}).get(place, f"the server setting {place}")
            value = "wrong" if place == "api_key" else repr(options.get(place))
            reason = reason.removeprefix("Input ")
            raise UsageError(f"{name} is {value}: it {reason[:1].lower()}{reason[1:]}.") from None

    @model_validator(mode="before")
    @classmethod
    def _key_from_environment(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("api_key") is None:
            return {**data, "api_key": os.environ.get(API_KEY_VARIABLE)}
        return data

    @field_validator("api_key")
    @classmethod
    def _usable_key(cls, key: SecretStr | None) -> SecretStr | None:
        """An empty key would look like protection and be none; others must fit into a header."""
        if key is None:
            return None
        text = key.get_secret_value()
        if not text or not all("!" <= character <= "~" for character in text):
            raise ValueError(
                "an API key is 1 or more visible ASCII characters without spaces "
                f"(unset {API_KEY_VARIABLE} to serve without a key)"
            )
        return key
