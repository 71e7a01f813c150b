"""Targets from the Hugging Face hub, through its own client and cache.

Only JSON, safetensors and chat templates of the repository's top folder are fetched: never pickle
files, never code.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import httpx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from drafter.errors import MissingError, UsageError
from drafter.sources.folder import TargetFolder, local_target

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_WANTED = ["*.json", "*.safetensors", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]


def hub_target(name: str, *, offline: bool) -> TargetFolder:
    """Fetch `org/name` or `org/name@revision`.

    Raises UsageError for a bad name, MissingError where it cannot be had.
    """
    repository, _, revision = name.partition("@")
    try:
        path = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
            local_files_only=offline or os.environ.get("HF_HUB_OFFLINE") == "1",
        )
    except HFValidationError as error:
        raise UsageError(f"target {name:.120} is no Hugging Face id: {error}") from None
    except GatedRepoError:
        raise MissingError(
            f"target {name} is gated: accept its terms on the hub and run `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise MissingError(
            f"target {name} was not found on the Hugging Face hub; check the name (or log in with "
            "`hf auth login` where it is private)"
        ) from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise MissingError(_unreachable(name, offline, error)) from None
    return local_target(Path(path), name, f"Hugging Face hub {name}")


def _unreachable(name: str, offline: bool, error: Exception) -> str:
    command = f"`pipeline fetch --target {name}`"
    if offline:
        return f"target {name} is not in the Hugging Face cache; run {command} with a network"
    cause = str(error).strip().splitlines() or [type(error).__name__]
    return f"target {name} could not be fetched ({cause[0]}); check the network, then run {command}"
