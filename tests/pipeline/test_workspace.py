"""Where artifacts lie and what was built last."""

from __future__ import annotations

from pathlib import Path

import pytest

from drafter.errors import MissingError, UsageError
from drafter.sources import TargetFolder
from pipeline.stages import find_drafter, pretrained_folder
from pipeline.workspace import (
    last_engine,
    last_export,
    remember_engine,
    remember_export,
    sources_of,
    target_workspace,
)


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_before_anything_was_built_the_command_that_builds_is_named(cache: Path) -> None:
    with pytest.raises(MissingError, match="pipeline run"):
        last_engine()
    with pytest.raises(MissingError, match="pipeline export"):
        last_export()


def test_the_last_engine_and_its_sources_are_remembered(cache: Path, tmp_path: Path) -> None:
    first, second = folder(tmp_path / "e1"), folder(tmp_path / "e2")
    export, target, drafter = (folder(tmp_path / name) for name in ("x", "t", "d"))
    remember_export(export, target, drafter)
    remember_engine(first, export)
    remember_engine(second, export)
    assert last_export() == export
    assert last_engine() == second
    assert sources_of(first) == (export, target, drafter)


def test_an_engine_from_elsewhere_has_no_known_sources(cache: Path, tmp_path: Path) -> None:
    assert sources_of(tmp_path) is None


def test_a_last_engine_that_is_gone_is_said_to_be_gone(cache: Path, tmp_path: Path) -> None:
    engine = folder(tmp_path / "e")
    remember_engine(engine, folder(tmp_path / "x"))
    engine.rmdir()
    with pytest.raises(MissingError, match="is gone"):
        last_engine()


def test_a_damaged_memory_says_how_to_mend_it(cache: Path, tmp_path: Path) -> None:
    remember_engine(folder(tmp_path / "e"), folder(tmp_path / "x"))
    (cache / "workspace" / "built.json").write_text("{")
    with pytest.raises(UsageError, match="remove it"):
        last_engine()


def test_two_targets_of_one_name_do_not_share_a_folder(cache: Path) -> None:
    one = TargetFolder(Path("/a/llama"), "llama", "11111111aa", "/a/llama")
    other = TargetFolder(Path("/b/llama"), "llama", "22222222bb", "/b/llama")
    assert target_workspace(one) != target_workspace(other)


def test_only_the_built_in_target_itself_has_the_plain_name_and_the_packaged_drafter(
    cache: Path,
) -> None:
    """A fine-tune in a folder of the same name is another target."""
    real = TargetFolder(Path("/t"), "smollm2-135m", "11111111aa", "wheel", builtin=True)
    tuned = TargetFolder(Path("/u/smollm2-135m"), "smollm2-135m", "22222222bb", "/u/smollm2-135m")
    assert target_workspace(real) == cache / "workspace" / "smollm2-135m"
    assert target_workspace(tuned) == cache / "workspace" / "smollm2-135m-22222222"
    assert find_drafter(real, None) == pretrained_folder() / "smollm2-135m"
    with pytest.raises(MissingError, match="pipeline train --target /u/smollm2-135m"):
        find_drafter(tuned, None)


@pytest.mark.parametrize("name", ["org/model", "../up", "a b", "..", ""])
def test_every_name_stays_inside_the_workspace(cache: Path, name: str) -> None:
    target = TargetFolder(Path("/x"), name, "1234567890", "x")
    assert target_workspace(target).parent == cache / "workspace"
