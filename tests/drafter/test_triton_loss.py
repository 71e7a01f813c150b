"""The fused kernel against the eager form, in Triton's interpreter on the CPU; compiled for GPUs
that are not here.

Skipped where the package `triton` is missing: PyTorch for CPUs does not bring it. The interpreter
runs the kernel's own code in numpy; it has no `tl.dot` here to be wrong about.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from drafter import head_loss
from drafter.head_loss import (
    STEP_WEIGHTS,
    Objective,
    chunked_loss,
    eager_loss,
    geometric_weights,
)
from drafter.losses import LOSSES, Mix
from drafter.row_sample import all_rows

pytest.importorskip("triton", reason="the package triton is not installed")
MIXED = [name for name, loss in LOSSES.items() if loss.mix is not None]


@pytest.fixture(scope="module")
def fused() -> ModuleType:
    """`drafter.triton_loss`; tests/conftest.py has asked for the interpreter."""
    return importlib.import_module("drafter.triton_loss")


def scores(rows: int, columns: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * spread


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("columns", [5, 64, 3000])
@pytest.mark.parametrize("sampled", [False, True])
def test_value_alpha_and_gradients_are_those_of_the_eager_form(
    fused: ModuleType, name: str, columns: int, sampled: bool
) -> None:
    """Less than a block, a whole one, and more than one; with and without weighted columns."""
    teacher, loss = scores(4, columns, 0), LOSSES[name]
    steps = [scores(4, columns, 1).requires_grad_(), scores(4, columns, 2).requires_grad_()]
    log_weight = torch.rand(columns) if sampled else all_rows(columns).log_weight
    objective = Objective(loss, geometric_weights(2, 0.8))
    wanted, alphas = eager_loss(steps, teacher, log_weight, objective)
    assert loss.mix is not None
    mixes = [loss.mix(alpha) for alpha in alphas]
    scales = [weight / 4 for weight in objective.step_weights.by_step]
    made = fused.fused_gradients([z.detach() for z in steps], teacher, log_weight, mixes, scales)
    assert made.value == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert [total / 4 for total in made.alphas] == pytest.approx(alphas, abs=1e-6)
    for got, gradient in zip(made.gradients, torch.autograd.grad(wanted, steps), strict=True):
        torch.testing.assert_close(got, gradient, atol=1e-6, rtol=1e-4)


def test_bfloat16_scores_are_worked_on_in_float32(fused: ModuleType) -> None:
    teacher, drafted = scores(3, 300, 0).bfloat16(), scores(3, 300, 1).bfloat16()
    weight = torch.zeros(300)
    values, alphas, gradient = fused.fused_step(drafted, teacher, weight, Mix(kl=0.4, tv=0.6), 1.0)
    exact = fused.fused_step(drafted.float(), teacher.float(), weight, Mix(kl=0.4, tv=0.6), 1.0)
    torch.testing.assert_close(values, exact[0])
    torch.testing.assert_close(alphas, exact[1])
    assert gradient.dtype == torch.bfloat16
    # The interpreter cuts bfloat16 off where a GPU rounds: one part in 2^7.
    torch.testing.assert_close(gradient.float(), exact[2], atol=1e-6, rtol=2**-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weights", STEP_WEIGHTS)
@pytest.mark.parametrize("truncated", [False, True])
def test_the_chunked_loss_on_cuda_is_the_eager_one_by_the_kernel_or_without_it(
    fused: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    weights: str,
    truncated: bool,
) -> None:
    """As if the tensors were on CUDA; the kernel is used where it applies and nowhere else."""
    used: list[int] = []
    kernel = fused.fused_step
    monkeypatch.setattr(head_loss, "on_cuda", lambda _: True)
    monkeypatch.setattr(fused, "fused_step", lambda *given: used.append(1) or kernel(*given))
    teacher, kept = scores(6, 40, 0), torch.arange(40) % 3 > 0 if truncated else None
    steps = [scores(6, 40, 1), scores(6, 40, 2)]
    if kept is not None:
        steps = [z.masked_fill(~kept, float("-inf")) for z in steps]
    steps = [z.requires_grad_() for z in steps]
    objective = Objective(LOSSES[name], STEP_WEIGHTS[weights](2, 0.8))
    log_weight = torch.rand(40)
    wanted, wanted_alphas = eager_loss(steps, teacher, log_weight, objective, kept)
    got, alphas = chunked_loss(steps, teacher, log_weight, objective, 4, kept=kept)
    torch.testing.assert_close(got, wanted)
    assert alphas == pytest.approx(wanted_alphas, abs=1e-6)
    mine, theirs = torch.autograd.grad(2 * got, steps), torch.autograd.grad(2 * wanted, steps)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    applies = name in MIXED and weights != "d-pace" and not truncated
    assert len(used) == (2 if applies else 0)


def test_laws_far_apart_ties_and_impossible_tokens_stay_finite(fused: ModuleType) -> None:
    """alpha near 0, p equal to q, and scores of -inf in the teacher's row."""
    teacher, drafted = scores(3, 50, 0), scores(3, 50, 1)
    teacher[0, 0], drafted[0, 0] = 400.0, -400.0
    teacher[1] = drafted[1]
    teacher[2, 10:] = float("-inf")
    for name in MIXED:
        mix = LOSSES[name].mix
        assert mix is not None
        values, alphas, gradient = fused.fused_step(
            drafted, teacher, torch.zeros(50), mix(0.5), 1.0
        )
        assert torch.isfinite(values).all()
        assert torch.isfinite(gradient).all()
        assert float(alphas[1]) == pytest.approx(1.0)
        torch.testing.assert_close(gradient[1], torch.zeros(50), atol=1e-6, rtol=0)


def test_no_rows_give_no_loss(fused: ModuleType) -> None:
    none = torch.zeros(0, 8)
    made = fused.fused_gradients([none], none, torch.zeros(8), [Mix(kl=1.0)], [1.0])
    assert (made.value, made.alphas) == (0.0, [0.0])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_the_kernel_compiles_for_gpus_that_are_not_here(capability: int, kind: str) -> None:
    """To machine code; in a process of its own, where the interpreter was not asked for."""
    code = (
        "from drafter.triton_loss import compiled_for\n"
        f"made = compiled_for({capability}, '{kind}').asm\n"
        f"assert '.target sm_{capability}' in made['ptx'] and len(made['cubin']) > 1000\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    made = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
