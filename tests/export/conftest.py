"""One export of every family, each with another head; made once, read only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from drafter.artifact import Manifest
from export.model import export_model
from tests.tiny_families import Pair, write_pair

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"tied": True, "rescore": 24},
    "mistral": {"tied": False, "rescore": 24},
    "qwen2": {"tied": True, "rescore": 0, "top_k": 5},
    "qwen3": {"tied": False, "head": "target"},
}


@dataclass(frozen=True)
class Exported:
    """An export folder, its manifest and what it was made from."""

    pair: Pair
    folder: Path
    manifest: Manifest
    told: list[tuple[str, float]]  # progress reports


@pytest.fixture(scope="session", params=VARIANTS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Each variant in turn."""
    folder = tmp_path_factory.mktemp(request.param)
    pair = write_pair(folder, request.param, **VARIANTS[request.param])
    told: list[tuple[str, float]] = []
    manifest = export_model(
        pair.target,
        pair.drafter,
        folder / "export",
        name="tiny",
        progress=lambda what, share: told.append((what, share)),
    )
    return Exported(pair, folder / "export", manifest, told)
