"""Options: command line over file over defaults, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from drafter.errors import UsageError
from drafter.sources import DEFAULT_TARGET
from drafter.train_config import TrainConfig
from pipeline.config import RunOptions, TreeOptions, options
from tests.pipeline.command import run_command


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"max_tokens": 5, "seed": 9}))
    chosen = options(RunOptions, file, max_tokens=7, temperature=None)
    assert (chosen.max_tokens, chosen.seed, chosen.temperature) == (7, 9, 0.0)


def test_toml_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('precision = "int8"\nbudget = 12\n')
    chosen = options(RunOptions, file)
    assert (chosen.precision, chosen.chosen()) == ("int8", {"budget": 12})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"budgets": 4}', ("budgets", "not an option")),
        ('{"budget": 0}', ("budget", "0", "greater than or equal to 1")),
        ('{"max_tokens": "many"}', ("max_tokens", "'many'")),
        ("[1]", ("list", "object is needed")),
        ("{", ("cannot be read",)),
    ],
)
def test_a_bad_file_is_refused_with_the_key(
    tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    with pytest.raises(UsageError) as refused:
        options(RunOptions, file)
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        options(RunOptions, tmp_path / "none.json")


def test_only_the_tree_values_that_were_given_change_the_tree() -> None:
    assert TreeOptions(depth=3).chosen() == {"depth": 3}


def test_the_default_target_is_the_one_of_the_sources() -> None:
    assert RunOptions().target == DEFAULT_TARGET


def test_the_help_of_train_shows_the_defaults_that_training_has() -> None:
    """The help is made without importing PyTorch, so it repeats the defaults; they must agree."""
    text = " ".join(run_command("train", "--help").out.split())
    for name, field in TrainConfig.model_fields.items():
        option = "--" + name.replace("_", "-")
        shown = re.search(rf"{option} (?:<\w+>|/) .*?\[default: ([^\]]+)\]", text)
        assert shown is not None, option
        if isinstance(field.default, bool):
            assert shown.group(1) == ("" if field.default else "no-") + name, option
            continue
        if field.default is None:  # what takes its place is said instead
            continue
        kind = type(field.default)
        assert kind(shown.group(1)) == field.default, option
