"""The self-check finds any wrong weight, and names the first tensor it spoils."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest

from drafter.errors import CheckFailed
from engines.backends import find_backend, read_engine
from engines.selfcheck import self_check
from export.contract import GRAPHS
from tests.engines.conftest import Source
from tests.engines.damage import scale_weight

QKV = "v_proj+k_proj+q_proj"  # merged, in the order in which the graph makes them


def check(source: Source, folder: Path) -> None:
    """Run the self-check on an engine folder as it lies there."""
    _, manifest = read_engine(folder, verify=False)
    backend = find_backend(manifest.backend)
    target, drafter = copy.deepcopy((source.target, source.drafter))  # int8 checks change them
    self_check(manifest, lambda: backend.open(manifest, 1, GRAPHS), target, drafter)


@pytest.mark.parametrize("kind", ["engine_dir", "int8_dir"])
def test_a_right_engine_passes(source: Source, kind: str, request: pytest.FixtureRequest) -> None:
    check(source, request.getfixturevalue(kind))


@pytest.mark.parametrize(
    ("graph", "weight", "named"),
    [
        ("target", f"layers.0.self_attn.{QKV}.weight", "target, prefill, batch 1.*: new_key_0"),
        ("target", "layers.0.mlp.down_proj.weight", "target, .*: new_key_1"),
        ("target", "layers.2.mlp.down_proj.weight", "target, .*: logits"),
        ("target", "norm.weight", "target, .*: logits"),
        ("drafter_extend", "fc.weight", "drafter_extend, .*: state"),
        ("drafter_extend", "mlp.gate_proj+up_proj.weight", "drafter_extend, .*: state"),
        ("drafter_extend", "head.up.weight", "drafter_extend, .*: log_sum_exp"),
    ],
)
def test_a_wrong_weight_is_found_where_it_first_shows(
    source: Source, engine_dir: Path, tmp_path: Path, graph: str, weight: str, named: str
) -> None:
    folder = shutil.copytree(engine_dir, tmp_path / "engine")
    scale_weight(folder, graph, weight, 1.02)
    with pytest.raises(CheckFailed, match=f"engine: {named} is the first tensor to differ"):
        check(source, folder)


@pytest.mark.parametrize(
    ("graph", "weight", "named"),
    [
        ("target", f"layers.1.self_attn.{QKV}.weight.scales", "target, .*: new_key_1"),
        ("drafter_step", "mlp.gate_proj+up_proj.weight.scales", "drafter_extend, .*: state"),
    ],
)
def test_a_wrong_int8_weight_is_found_exactly(
    source: Source, int8_dir: Path, tmp_path: Path, graph: str, weight: str, named: str
) -> None:
    folder = shutil.copytree(int8_dir, tmp_path / "engine")
    scale_weight(folder, graph, weight, 1.02)
    with pytest.raises(CheckFailed, match=f"engine, float activations: {named} is the first"):
        check(source, folder)
