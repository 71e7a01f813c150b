"""`pipeline doctor`: the machine described without building or downloading anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from drafter.errors import MissingError
from pipeline.doctor import examine, require_usable
from pipeline.reports import DoctorReport
from tests.pipeline.command import run_command


def test_the_json_has_the_documented_keys(cache: Path) -> None:
    result = run_command("doctor", "--json")
    assert result.code == 0, result.err
    assert set(result.json) == {
        "schema",
        "machine",
        "versions",
        "backends",
        "cache",
        "targets",
        "last_engine",
        "problems",
    }
    assert result.json["machine"]["cores"] >= 1
    assert result.json["cache"]["cache"] == str(cache)
    assert DoctorReport.model_validate(result.json).to_json() == result.json


def test_the_default_backend_is_usable_and_others_say_what_they_lack(cache: Path) -> None:
    backends = {state.name: state for state in examine().backends}
    assert backends["onnxruntime"].usable
    assert backends["torch"].usable
    for state in backends.values():
        assert state.usable or state.detail


def test_nothing_is_made_in_an_empty_cache(cache: Path) -> None:
    run_command("doctor")
    assert not cache.exists()


def test_targets_and_the_last_engine_are_listed(built_cache: Path) -> None:
    report = examine()
    assert report.last_engine is not None
    assert Path(report.last_engine).name.startswith("engine-")


def test_off_line_without_a_target_is_a_problem_that_is_said(cache: Path) -> None:
    assert any("SLIMSPEC_OFFLINE" in problem for problem in examine().problems)


def test_a_machine_without_a_backend_is_told_what_to_install(cache: Path) -> None:
    report = examine()
    unusable = [state.model_copy(update={"usable": False}) for state in report.backends]
    with pytest.raises(MissingError, match="pip install"):
        require_usable(report.model_copy(update={"backends": unusable}))
