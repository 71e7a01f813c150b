"""`--tensorboard DIR`: every step once in the events, also those that a killed run had written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drafter.train_log import StepReport, read_log
from pipeline.metrics import line, tensorboard
from tests.pipeline.command import assert_refused, run_command

OPTIONS = ("--batch-tokens=64", "--sampled-rows=0", "--precision=fp32", "--rank=8", "--rescore=0")


def report(step: int, loss: float = 2.0) -> StepReport:
    return StepReport(
        step=step,
        steps=9,
        loss=loss,
        alpha=[0.5, 0.25],
        expected_tau=1.625,
        gradient_norm=0.5,
        learning_rate=1e-3,
        tokens_per_second=100.0,
        eta=61.0,
        time_shares={"forward_backward": 0.9, "other": 0.1},
    )


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_the_events_of_a_run_are_its_log(cache: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    texts = tmp_path / "dialogues.jsonl"
    row = {"prompt_ids": [1, 5, 6, 7], "response_ids": [8, 9, 10, 11, 12, 2]}
    texts.write_text((json.dumps(row) + "\n") * 20)
    out, folder = tmp_path / "drafter", tmp_path / "events"
    where = (f"--dialogues={texts}", f"--out={out}", f"--tensorboard={folder}", "--epochs=2")
    result = run_command("train", f"--target={tiny_llama_dir}", *OPTIONS, *where)
    assert result.code == 0, result.err
    log, found = list(read_log(out)), events(folder)
    losses = found.Scalars("loss")
    assert [event.step for event in losses] == [row.step for row in log]
    assert [event.value for event in losses] == pytest.approx([row.loss for row in log])
    assert found.Scalars("alpha/step_4")[-1].value == pytest.approx(log[-1].alpha[3])
    share = found.Scalars("time/forward_backward")[-1].value
    assert share == pytest.approx(log[-1].time_shares["forward_backward"])


def test_steps_that_are_made_again_replace_those_of_the_killed_run(tmp_path: Path) -> None:
    with tensorboard(tmp_path) as show:
        for step in (1, 2, 3):
            show(report(step, loss=9.0))
    with tensorboard(tmp_path) as show:
        for step in (2, 3, 4):
            show(report(step, loss=1.0))
    losses = events(tmp_path).Scalars("loss")
    assert [(event.step, event.value) for event in losses] == [(1, 9), (2, 1), (3, 1), (4, 1)]


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    with tensorboard(None) as show:
        show(report(1))
    assert not list(tmp_path.iterdir())


def test_a_missing_tensorboard_is_one_sentence(
    cache: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.metrics.find_spec", lambda _: None)
    result = run_command("train", f"--target={tiny_llama_dir}", "--tensorboard=events")
    assert_refused(result, 3, "tensorboard", "pip install 'slimspec[train]'")


def test_a_step_in_a_line() -> None:
    assert line(report(3)) == (
        "step 3/9, loss 2.000, alpha 0.50 0.25, tau 1.62, 100 tokens/s, 1:01 left"
    )
