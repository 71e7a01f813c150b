"""`torchrun -m pipeline train`: several processes are one run, and train what one process would;
whole drafters with their gradients summed, or each process with a part of the weights (FSDP2).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from drafter.train_log import read_log
from tests.pipeline.command import environment

OPTIONS = (
    "--batch-tokens=48",
    "--sampled-rows=16",
    "--precision=fp32",
    "--rank=8",
    "--rescore=16",
    "--loss=lk_hybrid",
    "--epochs=2",
    "--draft-steps=2",
    "--json",
)
MORE = (*OPTIONS, "--accumulate=2", "--ema=0.9", "--packing")
ONE = ("-m", "pipeline")
# After `--` nothing is an option of torchrun: it would take our --run for its --run-path.
TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "-m",
    "pipeline",
    "--",
)


def dialogues(folder: Path) -> Path:
    """Dialogues of unlike lengths; some batches hold one alone, so that a process has none."""
    path = folder / "dialogues.jsonl"
    rows = [
        {"prompt_ids": [1, 5 + i, 6], "response_ids": [*range(8, 10 + (7 * i) % 30), 12 + i, 2]}
        for i in range(17)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(
    launcher: tuple[str, ...], target: Path, folder: Path, options: tuple[str, ...] = OPTIONS
) -> Path:
    """Run the command; returns the drafter that its one line of JSON names."""
    folder.mkdir(exist_ok=True)
    command = (sys.executable, *launcher, "train", f"--target={target}", *options)
    where = (f"--dialogues={dialogues(folder)}", f"--run={folder / 'run'}", f"--out={folder / 'd'}")
    done = subprocess.run(
        (*command, *where), capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, done.stdout
    return Path(json.loads(lines[0])["path"])


def assert_same_run(one: Path, two: Path) -> None:
    logs = [list(read_log(path)) for path in (one, two)]
    assert len(logs[0]) > 4
    for a, b in zip(*logs, strict=True):
        assert abs(a.loss - b.loss) < 1e-5 * abs(a.loss)
        assert max(abs(x - y) for x, y in zip(a.alpha, b.alpha, strict=True)) < 1e-5
        assert abs(a.gradient_norm - b.gradient_norm) < 1e-4 * a.gradient_norm
    weights = [load_file(path / "model.safetensors") for path in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-4, rtol=2e-3)
    assert json.loads((two / "manifest.json").read_text())["data"]["processes"] == 2


def test_two_processes_train_what_one_does(
    cache: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    one = train(ONE, tiny_llama_dir, tmp_path / "one")
    assert_same_run(one, train(TORCHRUN, tiny_llama_dir, tmp_path / "two"))


def test_two_processes_with_half_the_weights_each_train_what_one_does(
    cache: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Their states are whole: one process goes on with the run of the two, and finds it done."""
    one = train(ONE, tiny_llama_dir, tmp_path / "one", MORE)
    two = train(TORCHRUN, tiny_llama_dir, tmp_path / "two", (*MORE, "--shard"))
    assert_same_run(one, two)
    weights = (two / "model.safetensors").read_bytes()
    shutil.rmtree(two)
    again = train(ONE, tiny_llama_dir, tmp_path / "two", MORE)
    assert (again / "model.safetensors").read_bytes() == weights


def test_only_the_first_process_needs_to_see_where_the_drafter_is_written(
    cache: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Each process has an --out of its own, as on two machines; the same command is up to date."""
    out = f'--out="{tmp_path}/out-of-$RANK"'
    script = f'exec "{sys.executable}" -m pipeline "$@" {out}'
    launcher = (*TORCHRUN[:4], "--no-python", "bash", "--", "-c", script, "pipeline")
    options = (*OPTIONS, "--epochs=1", f"--dialogues={dialogues(tmp_path)}")
    where = (f"--target={tiny_llama_dir}", f"--run={tmp_path / 'run'}")
    for up_to_date in (False, True):
        done = subprocess.run(
            (sys.executable, *launcher, "train", *where, *options),
            capture_output=True,
            text=True,
            env=environment(),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
        assert json.loads(line)["up_to_date"] is up_to_date
    assert [path.name for path in tmp_path.glob("out-of-*")] == ["out-of-0"]
