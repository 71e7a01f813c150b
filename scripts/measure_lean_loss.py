"""Peak memory of the memory-lean loss against the eager form, each measurement in its own process.

    python scripts/measure_lean_loss.py          # V = 151,936; the lean form at 8,192 rows
    python scripts/measure_lean_loss.py --vocab 20000 --eager 256,512 --lean 512,4096

The eager form keeps the scores, laws and gradients of all rows and draft steps at once, which no
machine of ours can hold at 8,192 rows; so it is measured at smaller numbers of rows, the last two
of which show that it grows in proportion, and extrapolated by that line. The lean form is really
run at every number of rows. At the numbers that both forms ran at, the value and the gradients of
all head inputs and parameters are compared. Extra memory: peak resident memory beyond that before
the loss, with inputs, parameters and their gradients (which both forms need) in place.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from drafter.head_loss import STEP_WEIGHTS, Objective, eager_loss
from drafter.lean_loss import Scoring, lean_loss
from drafter.losses import LOSSES


def peak_kilobytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(form: str, rows: int, options: argparse.Namespace, out: Path) -> None:
    """One forward and backward pass through a low-rank head; writes what it took and found."""
    generator = torch.Generator().manual_seed(0)
    vocab, hidden, rank, steps = options.vocab, options.hidden, options.rank, options.steps
    target_rows = torch.randn(vocab, hidden, generator=generator) * hidden**-0.5
    down = nn.Parameter(torch.randn(rank, hidden, generator=generator) * hidden**-0.5)
    up = nn.Parameter(torch.randn(vocab, rank, generator=generator) * rank**-0.5)
    states = torch.randn(rows, hidden, generator=generator)
    inputs = [torch.randn(rows, hidden, generator=generator) for _ in range(steps)]
    tensors = [down, up, *(h.requires_grad_() for h in inputs)]
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)
    objective = Objective(LOSSES[options.loss], STEP_WEIGHTS["geometric"](steps, 0.8))

    def score(h: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(h, down), up)

    teach = partial(F.linear, weight=target_rows)
    nothing = torch.zeros(vocab)
    (score(inputs[0][:8]) ** 2).sum().backward()  # libraries and threads are there
    for tensor in tensors:
        tensor.grad.zero_()
    before = peak_kilobytes()
    if form == "eager":
        scores = [score(h) for h in inputs]
        loss, _ = eager_loss(scores, teach(states), nothing, objective)
    else:
        loss, _ = lean_loss(inputs, states, Scoring(score, teach, [down, up], nothing), objective)
    loss.backward()
    after = peak_kilobytes()
    gradients = {str(i): tensor.grad for i, tensor in enumerate(tensors)}
    save_file(gradients, out / f"{form}-{rows}.safetensors")
    print(json.dumps({"extra_gb": (after - before) / 1e6, "value": loss.item()}))


def largest_difference(out: Path, rows: int) -> float:
    """The largest difference of any gradient, as a part of its tensor's largest entry."""
    lean, eager = (load_file(out / f"{form}-{rows}.safetensors") for form in ("lean", "eager"))
    return max(float((lean[i] - eager[i]).abs().max() / eager[i].abs().max()) for i in eager)


def measured(options: argparse.Namespace, form: str, rows: int, out: Path) -> dict[str, Any]:
    """Run `measure` in a process of its own."""
    same = [
        f"--{name}={getattr(options, name)}"
        for name in ("vocab", "hidden", "rank", "steps", "loss")
    ]
    command = [sys.executable, __file__, *same, f"--one={form}", f"--rows={rows}", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the {form} form did not run at {rows} rows:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    print(f"{form:>5} {rows:>6} rows: {found['extra_gb']:7.3f} GB, value {found['value']:.6f}")
    return found


def compare(options: argparse.Namespace, out: Path) -> None:
    """Measure both forms and print how they compare."""
    eager = {n: measured(options, "eager", n, out) for n in options.eager}
    lean = {n: measured(options, "lean", n, out) for n in sorted({*options.lean, *options.eager})}
    for n, found in eager.items():
        apart = abs(found["value"] - lean[n]["value"]) / abs(found["value"])
        print(f"at {n} rows: value {apart:.1e}, gradients {largest_difference(out, n):.1e} apart")
    (a, low), (b, high) = list(eager.items())[-2:]
    slope = (high["extra_gb"] - low["extra_gb"]) / (b - a)
    for n in options.lean:
        guess = high["extra_gb"] + slope * (n - b)
        ratio = guess / lean[n]["extra_gb"]
        print(f"at {n} rows: eager about {guess:.1f} GB (by the line), lean {ratio:.1f} times less")


def numbers(text: str) -> list[int]:
    """Numbers with commas between them, rising."""
    return sorted(int(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="draft steps K")
    parser.add_argument("--loss", default="lk_hybrid", choices=sorted(LOSSES))
    parser.add_argument("--eager", type=numbers, default=[128, 256, 512])
    parser.add_argument("--lean", type=numbers, default=[8192])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.rows, options, options.out)
        return
    with TemporaryDirectory() as folder:
        compare(options, Path(folder))


if __name__ == "__main__":
    main()
