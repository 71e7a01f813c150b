"""The folder of a training run belongs to one run: another command changes nothing in it."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.run_folder import first_change, held
from tests.pipeline.command import (
    Result,
    assert_refused,
    command_line,
    environment,
    run_command,
)

OPTIONS = ("--batch-tokens=64", "--sampled-rows=0", "--precision=fp32", "--rank=8", "--epochs=1")


def dialogues(path: Path, first: int = 5) -> Path:
    """Eight short dialogues; `first` tells two files apart."""
    rows = [
        {"prompt_ids": [1, first + i, 6, 7], "response_ids": [8 + i, 9, 10, 11, 12 + i, 2]}
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Runs:
    """Commands on one run folder."""

    def __init__(self, target: Path, folder: Path) -> None:
        self.target, self.folder, self.run = target, folder, folder / "run"

    def train(self, corpus: Path, *more: str) -> Result:
        where = (f"--dialogues={corpus}", f"--run={self.run}", f"--out={self.folder / 'd'}")
        return run_command("train", f"--target={self.target}", *OPTIONS, *where, *more)

    def files(self) -> dict[str, bytes]:
        """All files of the run, by name."""
        found = (path for path in self.run.rglob("*") if path.is_file())
        return {str(path.relative_to(self.run)): path.read_bytes() for path in found}


@pytest.fixture
def runs(cache: Path, tiny_llama_dir: Path, tmp_path: Path) -> Runs:
    return Runs(tiny_llama_dir, tmp_path)


def test_a_refused_command_leaves_the_other_run_s_corpus_alone(runs: Runs, tmp_path: Path) -> None:
    assert runs.train(dialogues(tmp_path / "one.jsonl")).code == 0
    before = runs.files()
    assert "corpus/manifest.json" in before
    assert_refused(runs.train(dialogues(tmp_path / "two.jsonl", 20)), 2, "dialogues", "--run")
    assert runs.files() == before


def test_a_run_that_another_command_trains_is_refused_and_left_alone(
    runs: Runs, tmp_path: Path
) -> None:
    """The other one is at work between two steps; the same command, too, would cut its log."""
    file = dialogues(tmp_path / "one.jsonl")
    where = (f"--dialogues={file}", f"--run={runs.run}", f"--out={tmp_path / 'd'}")
    endless = ("--steps=1000000", "--checkpoint-minutes=1000")
    arguments = ("train", f"--target={runs.target}", *OPTIONS, *where, *endless)
    other = subprocess.Popen(command_line(*arguments), stderr=subprocess.DEVNULL, env=environment())
    try:
        while not (runs.run / "log.jsonl").exists():
            assert other.poll() is None
            time.sleep(0.02)
        other.send_signal(signal.SIGSTOP)
        before = runs.files()
        assert_refused(runs.train(file, *endless), 2, "another command", str(runs.run), "--run")
        assert runs.files() == before
    finally:
        other.kill()
        other.wait()
    with held(runs.run):
        pass  # what was killed holds nothing


def test_dialogues_that_cannot_be_trained_on_claim_no_folder(runs: Runs, tmp_path: Path) -> None:
    """Mended, they are trained on in the same folder."""
    file = dialogues(tmp_path / "one.jsonl")
    good = file.read_text()
    file.write_text(good + json.dumps({"prompt_ids": [1], "response_ids": [9] * 2000}) + "\n")
    assert_refused(runs.train(file), 2, "document 8 of", "positions")
    file.write_text(good)
    assert runs.train(file).code == 0


def test_what_changed_is_named_with_both_values() -> None:
    old = {"training": {"learning_rate": 0.001, "seed": 0}, "corpus": "a" * 64}
    new = {"training": {"learning_rate": 0.002, "seed": 0}, "corpus": "a" * 64}
    assert first_change(old, old) is None
    assert first_change(old, new) == "learning_rate 0.001, now 0.002"
    other = {**old, "corpus": "b" * 64}
    assert first_change(old, other) == "corpus aaaaaaaaaaaa..., now bbbbbbbbbbbb..."
    assert first_change(old, {**old, "start": "c" * 64}) == "start none, now cccccccccccc..."


def test_a_field_that_an_older_run_did_not_know_had_its_default() -> None:
    old: dict[str, Any] = {"training": {"epochs": 3}}
    same = {"training": {"epochs": 3, "pace_floor": 0.5}, "head_init": "activation-pca"}
    assert first_change(old, same) is None
    assert first_change(same, old) is None
    changed = {"training": {"epochs": 3, "pace_floor": 0.2}}
    assert first_change(old, changed) == "pace_floor 0.5, now 0.2"
