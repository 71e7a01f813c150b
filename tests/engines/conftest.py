"""One exported pair and the engines built from it; made once, read only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from drafter.checkpoint import load_drafter, load_target
from drafter.config import DrafterConfig, TargetConfig
from drafter.decoder import TargetDecoder
from drafter.eagle3 import Drafter
from engines import EngineSet, build_engines, open_engines
from export.model import export_model
from tests.tiny_families import Pair, write_pair


@dataclass(frozen=True)
class Source:
    """A pair, its export and its PyTorch modules."""

    pair: Pair
    export: Path
    target: TargetDecoder
    drafter: Drafter

    @property
    def configs(self) -> tuple[TargetConfig, DrafterConfig]:
        """Of the target and of the drafter."""
        return self.target.config, self.drafter.config


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """An exported pair with a rescoring head."""
    folder = tmp_path_factory.mktemp("source")
    pair = write_pair(folder, "mistral", tied=True, layers=3, rescore=24)
    export_model(pair.target, pair.drafter, folder / "export")
    target = load_target(pair.target)
    return Source(pair, folder / "export", target, load_drafter(pair.drafter, target))


@pytest.fixture(scope="session")
def engine_dir(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 engine folder of ONNX Runtime."""
    folder = tmp_path_factory.mktemp("engines") / "fp32"
    build_engines(source.export, folder, threads=1)
    return folder


@pytest.fixture(scope="session")
def int8_dir(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int8 engine folder of ONNX Runtime."""
    folder = tmp_path_factory.mktemp("engines") / "int8"
    build_engines(source.export, folder, precision="int8", threads=1)
    return folder


@pytest.fixture(scope="session")
def engines(engine_dir: Path) -> EngineSet:
    """The fp32 engines, open."""
    return open_engines(engine_dir, threads=1)
