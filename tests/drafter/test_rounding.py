"""Weights as another dtype: none of them becomes infinite in silence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafter.errors import UsageError
from drafter.rounding import narrowest, rounded

LARGE = 70_000.0  # float16 ends at 65,504


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"norm.weight": torch.ones(3), "fc.weight": torch.tensor([[1.0, -value]])}


def test_a_value_that_the_dtype_cannot_hold_is_refused_with_the_way_out() -> None:
    words = r"d: the largest value of fc\.weight is 70000, but float16 ends at 65504; use fp32\."
    with pytest.raises(UsageError, match=words):
        rounded(weights(LARGE), torch.float16, "d", "use fp32")
    assert rounded(weights(LARGE), torch.bfloat16, "d", "")["fc.weight"].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_was_not_finite_before_is_not_blamed_on_the_dtype(
    value: float, dtype: torch.dtype
) -> None:
    with pytest.raises(UsageError, match=r"fc\.weight holds values that are not finite"):
        rounded(weights(value), dtype, "d", "use fp32")


def test_ids_stay_what_they_are() -> None:
    ids = torch.tensor([5, 70_000])
    assert torch.equal(rounded({"ids": ids}, torch.float16, "d", "")["ids"], ids)


@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_the_narrowest_dtype_holds_every_weight(value: float) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, value)
    dtype = narrowest(model)
    assert dtype == (torch.float16 if abs(value) <= 65_504 else torch.float32)
    assert rounded(model.state_dict(), dtype, "d", "")["weight"].isfinite().all()
