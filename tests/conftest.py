"""Fixtures shared by all tests: a tiny random target, and the real one where the cache has it."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported

import pytest

from drafter.errors import MissingError
from drafter.sources import DEFAULT_TARGET, resolve_target, silent
from tests.tiny_llama import write_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face style folder of a random Llama with 8 layers; read only."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def real_target_dir() -> Path:
    """The folder of the built-in default target; skips where it was never fetched."""
    try:
        return resolve_target(DEFAULT_TARGET, offline=True, progress=silent).path
    except MissingError as error:
        pytest.skip(f"the default target is not in the cache: {error}")
