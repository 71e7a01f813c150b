"""Reliability curves: the identity at first, the truth later, never falling."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.reliability import Reliability

RAW = np.log(np.linspace(0.002, 1.0, 60)).tolist()


def test_believes_the_drafter_at_first() -> None:
    curve = Reliability()
    assert [curve.log_chance(raw) for raw in RAW] == pytest.approx(RAW, abs=1e-9)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(-8.0, 0.001), st.booleans()), max_size=300))
def test_never_falls_and_stays_a_chance(seen: list[tuple[float, bool]]) -> None:
    curve = Reliability()
    for raw, accepted in seen:
        curve.see(raw, accepted)
    curve.refit()
    found = [curve.log_chance(raw) for raw in [*RAW, 0.001]]
    assert all(a <= b + 1e-12 for a, b in pairwise(found))
    assert max(found) <= 1e-12


def test_learns_that_a_drafter_is_too_sure_and_forgets_it_again() -> None:
    curve, rng = Reliability(), np.random.default_rng(0)

    def live(exponent: float) -> list[float]:
        for raw in rng.uniform(0.05, 1.0, 6000):
            curve.see(math.log(raw), bool(rng.random() < raw**exponent))
        curve.refit()
        return [math.exp(curve.log_chance(math.log(raw))) for raw in (0.3, 0.5, 0.8)]

    assert live(2.0) == pytest.approx([0.09, 0.25, 0.64], abs=0.09)
    assert live(1.0) == pytest.approx([0.3, 0.5, 0.8], abs=0.09)
