"""`run_check`: PyTorch against exported graphs and engine; folders that do not belong together."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from drafter.errors import CheckFailed, UsageError
from pipeline.check import CheckReport, run_check
from pipeline.workspace import last_engine, sources_of
from tests.engines.damage import scale_weight, sign_again
from tests.pipeline.conftest import write_tiny_drafter
from tests.tiny_llama import write_tiny_llama

ROW_KEYS = ["graph", "case", "against", "tensor", "max_abs", "max_rel", "topk_agreement", "ok"]


class Folders:
    """An engine and what it was made from, copied so that a test may damage it."""

    def __init__(self, built_cache: Path, into: Path) -> None:
        engine = last_engine()
        assert built_cache in engine.parents
        sources = sources_of(engine)
        assert sources is not None
        self.engine = shutil.copytree(engine, into / "engine")
        self.export = shutil.copytree(sources.export, into / "export")
        self.target, self.drafter = sources.target, sources.drafter

    def check(self, **options: object) -> CheckReport:
        """The report of a short check, exported graphs included."""
        return run_check(
            self.engine,
            self.target,
            self.drafter,
            self.export,
            **({"threads": 1, "batches": (1, 2), "prefixes": (3, 20)} | options),  # type: ignore[arg-type]
        )


@pytest.fixture
def folders(built_cache: Path, tmp_path: Path) -> Folders:
    """The folders of the tiny run."""
    return Folders(built_cache, tmp_path)


def test_a_right_engine_passes_in_every_graph_case_and_tensor(folders: Folders) -> None:
    told: list[str] = []
    report = folders.check(progress=told.append)
    assert report.ok
    assert report.first_divergence is None
    report.raise_if_failed()
    rows = report.rows()
    assert all(list(row) == ROW_KEYS for row in rows)
    assert json.loads(json.dumps(rows)) == rows
    assert {row["against"] for row in rows} == {"onnx", "engine"}
    cases = {(row["graph"], row["case"].split(",")[0]) for row in rows}
    assert {("target", "tree"), ("target", "prefill"), ("drafter_step", "tree")} <= cases
    assert {row["case"].split(", ", 1)[1] for row in rows} == {
        f"batch {batch}, prefix {prefix}" for batch in (1, 2) for prefix in (3, 20)
    }
    assert {row["tensor"] for row in rows if row["graph"] == "drafter_extend"} == {
        *("new_key", "new_value", "state", "log_sum_exp", "topk_logprobs")
    }
    scores = [row for row in rows if row["tensor"] in ("logits", "topk_logprobs")]
    assert all(row["topk_agreement"] == 1.0 and row["max_abs"] <= 1e-3 for row in scores)
    assert told == [
        "opening the exported graphs",
        "loading the PyTorch models",
        "comparing onnx and engine with PyTorch",
    ]


def test_the_table_shows_the_worst_case_of_every_tensor(folders: Folders) -> None:
    screen = StringIO()
    report = folders.check(batches=(1,))
    Console(file=screen, width=120).print(report.table())
    shown = screen.getvalue()
    assert "Parity with PyTorch" in shown
    worst = max(row["max_abs"] for row in report.rows() if row["tensor"] == "logits")
    assert f"{worst:.1e}" in shown
    assert "NO" not in shown


def test_a_wrong_engine_is_reported_and_its_first_bad_tensor_named(folders: Folders) -> None:
    scale_weight(folders.engine, "target", "layers.3.self_attn.v_proj+k_proj+q_proj.weight", 1.02)
    sign_again(folders.engine)
    report = folders.check()
    assert not report.ok
    with pytest.raises(CheckFailed, match=r"engine: target, prefill, .*: new_key_3 is the first"):
        report.raise_if_failed()
    bad = {(row["against"], row["tensor"]) for row in report.rows() if not row["ok"]}
    assert {against for against, _ in bad} == {"engine"}
    assert ("engine", "new_value") in bad
    assert any(row[0] == "engine" and row[1] == "logits" for row in bad)
    screen = StringIO()
    Console(file=screen, width=120).print(report.table())
    assert "NO" in screen.getvalue()


def test_a_tampered_export_is_refused(folders: Folders) -> None:
    scale_weight(folders.export, "target", "layers.0.mlp.down_proj.weight", 1.02)
    with pytest.raises(UsageError, match=r"weights\.bin has sha256 .* run `pipeline export`"):
        folders.check()


def test_without_an_export_only_the_engine_is_compared(folders: Folders) -> None:
    report = run_check(
        folders.engine, folders.target, folders.drafter, threads=1, batches=(1,), prefixes=(3,)
    )
    assert report.ok
    assert {row["against"] for row in report.rows()} == {"engine"}


def test_a_tampered_engine_is_refused(folders: Folders) -> None:
    scale_weight(folders.engine, "target", "layers.0.mlp.gate_proj+up_proj.weight", 2.0)
    with pytest.raises(UsageError, match=r"weights\.bin has sha256 .* run `pipeline build-engine`"):
        folders.check()


def test_an_engine_of_another_export_is_refused(folders: Folders) -> None:
    scale_weight(folders.export, "target", "layers.0.mlp.up_proj.weight", 2.0)
    sign_again(folders.export)
    with pytest.raises(UsageError, match=r"was not built from .*export: it names export"):
        folders.check()


def test_sources_that_changed_since_are_refused(folders: Folders, tmp_path: Path) -> None:
    folders.target = write_tiny_llama(tmp_path / "other", seed=5)
    with pytest.raises(UsageError, match=r"was not made from .*other: its target is"):
        folders.check()


def test_another_drafter_is_refused(folders: Folders, tmp_path: Path) -> None:
    folders.drafter = write_tiny_drafter(tmp_path / "other", folders.target)
    changed = folders.drafter / "config.json"
    changed.write_text(json.dumps(json.loads(changed.read_text()) | {"top_k": 4}))
    sign_again(folders.drafter)
    with pytest.raises(UsageError, match="its drafter is"):
        folders.check()
    with pytest.raises(UsageError, match="their configs differ; run `pipeline build-engine`"):
        run_check(folders.engine, folders.target, folders.drafter, threads=1)
