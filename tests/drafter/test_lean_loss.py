"""The loss without the scores of all rows: the eager one's value, gradients and alphas, in a part
of its memory.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from drafter.head_loss import STEP_WEIGHTS, Objective, eager_loss
from drafter.lean_loss import Scoring, lean_loss
from drafter.losses import LOSSES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("weights", ["geometric", "d-pace"])
@pytest.mark.parametrize("truncated", [False, True])
def test_is_the_eager_loss(name: str, chunk: int, weights: str, truncated: bool) -> None:
    """Through a low-rank head: gradients of both factors and of what the head reads, to 1e-5."""
    generator = torch.Generator().manual_seed(4)
    down = nn.Parameter(torch.randn(5, 12, generator=generator))
    up = nn.Parameter(torch.randn(31, 5, generator=generator))
    rows = torch.randn(31, 12, generator=generator)
    inputs = [torch.randn(20, 12, generator=generator, requires_grad=True) for _ in range(3)]
    states = torch.randn(20, 12, generator=generator)
    log_weight = torch.rand(31, generator=generator)
    kept = torch.arange(31) % 3 > 0 if truncated else None

    def score(h: torch.Tensor) -> torch.Tensor:
        z = h @ down.T @ up.T
        return z if kept is None else z.masked_fill(~kept, float("-inf"))

    objective = Objective(LOSSES[name], STEP_WEIGHTS[weights](3, 0.8))
    wanted, wanted_alphas = eager_loss(
        [score(h) for h in inputs], states @ rows.T, log_weight, objective, kept
    )
    scoring = Scoring(score, partial(F.linear, weight=rows), [down, up], log_weight, kept)
    got, alphas = lean_loss(inputs, states, scoring, objective, chunk)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert alphas == pytest.approx(wanted_alphas, abs=1e-6)
    tensors = [*inputs, down, up]
    mine, theirs = torch.autograd.grad(2 * got, tensors), torch.autograd.grad(2 * wanted, tensors)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_no_rows_at_all_give_no_loss() -> None:
    rows = torch.randn(9, 4)
    scoring = Scoring(
        partial(F.linear, weight=rows), partial(F.linear, weight=rows), [], torch.zeros(9)
    )
    objective = Objective(LOSSES["lk_hybrid"], STEP_WEIGHTS["geometric"](2, 0.8))
    none = torch.zeros(0, 4)
    value, alphas = lean_loss([none, none], none, scoring, objective)
    assert float(value) == 0.0
    assert alphas == [0.0, 0.0]


MEMORY = """
import resource, sys, torch
from functools import partial
from torch.nn import functional as F
from drafter.head_loss import STEP_WEIGHTS, Objective, eager_loss
from drafter.lean_loss import Scoring, lean_loss
from drafter.losses import LOSSES
torch.set_num_threads(1)
N, V, H, K = 1024, 20_000, 16, 2
rows, states = torch.randn(V, H), torch.randn(N, H)
inputs = [torch.randn(N, H, requires_grad=True) for _ in range(K)]
objective = Objective(LOSSES["lk_hybrid"], STEP_WEIGHTS["geometric"](K, 0.8))
score = partial(F.linear, weight=rows)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(score(inputs[0][:64]) ** 2).sum().backward()  # libraries and threads are there
before = peak()
if sys.argv[1] == "eager":
    loss, _ = eager_loss([score(h) for h in inputs], score(states), torch.zeros(V), objective)
else:
    loss, _ = lean_loss(inputs, states, Scoring(score, score, [], torch.zeros(V)), objective)
loss.backward()
print(peak() - before)
"""


def test_takes_a_sixth_of_the_memory_at_most() -> None:
    """Peak resident memory beyond the start's, each in its own process: V = 20,000, N = 1,024."""

    def extra(form: str) -> int:
        command = [sys.executable, "-c", MEMORY, form]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return int(done.stdout)

    eager, lean = extra("eager"), extra("lean")
    assert eager > 500_000, "kilobytes: the eager form is too small to compare with"
    assert lean <= eager / 6
