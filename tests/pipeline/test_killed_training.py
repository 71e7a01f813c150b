"""SIGKILL at any moment: the same command goes on, and the drafter is that of a run left alone."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from pipeline.cli import main
from tests.pipeline.test_training import dialogues  # noqa: F401  (a fixture)

OPTIONS = (
    "--batch-tokens=48",
    "--sampled-rows=16",
    "--precision=fp32",
    "--rank=8",
    "--rescore=16",
    "--loss=lk_hybrid",
    "--epochs=8",
    "--accumulate=2",
    "--packing",
    "--ema=0.9",
    "--checkpoint-minutes=1e-9",  # after every step: half of the kills meet a state being written
)
# Children of a server that has imported everything start at once, and are processes of their own.
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["pipeline.training", "drafter.training", "drafter.start"])


def start(target: Path, corpus: Path, folder: Path) -> BaseProcess:
    """`pipeline train` in a process of its own."""
    where = (f"--dialogues={corpus}", f"--run={folder / 'run'}", f"--out={folder / 'd'}")
    arguments = ["train", f"--target={target}", *OPTIONS, *where]
    process = START.Process(target=main, args=(arguments,))
    process.start()
    return process


def finish(process: BaseProcess) -> None:
    process.join(120)
    assert process.exitcode == 0


def test_a_run_killed_again_and_again_ends_with_the_weights_of_one_left_alone(
    cache: Path,
    tiny_llama_dir: Path,
    dialogues: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(tiny_llama_dir, dialogues, whole))
    steps = (whole / "d" / "log.jsonl").read_text().count("\n")
    chance = random.Random(5)
    torn = 0
    for attempt in range(6):
        process = start(tiny_llama_dir, dialogues, killed)
        _wait_for_a_step(killed / "run", process)
        if attempt % 2:
            _wait_for_a_state_being_written(killed / "run", process)
        else:
            time.sleep(chance.random() * 0.1)  # a step and its saved state take a third of it
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was killed before its end"
        torn += bool(_half_written(killed / "run"))
    assert torn, "at least one kill met a state that was being written"
    finish(start(tiny_llama_dir, dialogues, killed))
    weights = [(folder / "d" / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1]
    logs = [(folder / "d" / "log.jsonl").read_text().count("\n") for folder in (whole, killed)]
    assert logs == [steps, steps]
    assert not _half_written(killed / "run"), "the last state took the leftovers away"


def _half_written(run: Path) -> list[Path]:
    return [*run.glob("state-*.partial"), *run.glob(".state.json.*")]


def _wait_for_a_state_being_written(run: Path, process: BaseProcess) -> None:
    while process.is_alive() and not _half_written(run):
        pass


def _wait_for_a_step(run: Path, process: BaseProcess) -> None:
    """Until this process has logged a step of its own."""
    log = run / "log.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    while process.is_alive() and (not log.exists() or log.stat().st_mtime_ns == before):
        time.sleep(0.002)
    if process.is_alive():
        # The first change may be the start of the process, which cuts the log to the saved state.
        size = log.stat().st_size
        while process.is_alive() and log.stat().st_size == size:
            time.sleep(0.002)
