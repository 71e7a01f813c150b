"""Confidence intervals by bootstrap over prompts: pooled ratios, medians, paired comparisons.

The rounds of one answer depend on one another, so whole prompts are drawn, not rounds (a cluster
bootstrap, percentile method; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters
13 and 16). All intervals over the same number of prompts use the same draws: a comparison of two
drafters is paired, and a figure is the same whenever it is computed again.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
LEVEL = 0.95
_SEED = 0

Floats = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A figure and its interval at `LEVEL`.

    `value` is None where nothing defines it, the bounds also where fewer than two prompts do.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


class Pooled(NamedTuple):
    """A figure that is a ratio of two sums over prompts: `above` and `below` [P]."""

    above: Floats
    below: Floats


def pooled(figure: Pooled) -> Estimate:
    """sum(above) / sum(below) with its interval."""
    return _estimate(*_ratios(figure), len(figure.below))


def ratio(figure: Pooled, base: Pooled) -> Estimate:
    """`figure` over `base`, both of the same prompts in the same order."""
    (value, drawn), (base_value, base_drawn) = _ratios(figure), _ratios(base)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _estimate(value / base_value, drawn / base_drawn, _paired(figure, base))


def difference(figure: Pooled, base: Pooled) -> Estimate:
    """`figure` minus `base`, both of the same prompts in the same order."""
    (value, drawn), (base_value, base_drawn) = _ratios(figure), _ratios(base)
    return _estimate(value - base_value, drawn - base_drawn, _paired(figure, base))


def median(values: Floats) -> Estimate:
    """The median of one value a prompt, [P]; NaN where a prompt has none, which leaves it out."""
    there = np.isfinite(values)
    if not there.any():
        return Estimate(None)
    order = np.argsort(values)  # NaN last
    counts = (_draws(len(values)) * there)[:, order].cumsum(axis=1)  # [N, P], up to each value
    found = counts[:, -1]  # values in a draw, [N]
    low, high = (found + 1) // 2, found // 2 + 1  # the middle one, or the middle two
    places = [(counts >= rank[:, None]).argmax(axis=1) for rank in (low, high)]
    drawn = (values[order[places[0]]] + values[order[places[1]]]) / 2
    drawn[found == 0] = np.nan
    return _estimate(np.float64(np.median(values[there])), drawn, int(there.sum()))


def _ratios(figure: Pooled) -> tuple[np.float64, Floats]:
    """The ratio itself, and that of each draw, [N]; not finite where nothing is below the line."""
    columns = np.stack(figure, axis=1)  # [P, 2]
    sums, drawn = columns.sum(axis=0), _draws(len(columns)) @ columns  # [2], [N, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[0] / sums[1], drawn[:, 0] / drawn[:, 1]


@lru_cache(maxsize=2)
def _draws(prompts: int) -> Floats:
    """How often each draw with replacement holds each prompt: [N, P], rows summing to P."""
    generator = np.random.default_rng(_SEED)
    shares = np.full(prompts, 1.0 / prompts)
    return generator.multinomial(prompts, shares, size=RESAMPLES).astype(np.float64)


def _estimate(value: np.float64, drawn: Floats, prompts: int) -> Estimate:
    if not np.isfinite(value):
        return Estimate(None)
    drawn = drawn[np.isfinite(drawn)]
    if prompts < 2 or not len(drawn):
        return Estimate(float(value))
    outside = 50.0 * (1.0 - LEVEL)
    low, high = np.percentile(drawn, (outside, 100.0 - outside))
    return Estimate(float(value), float(low), float(high))


def _paired(figure: Pooled, base: Pooled) -> int:
    if len(figure.below) != len(base.below):
        raise ValueError(
            f"{len(figure.below)} and {len(base.below)} prompts; a pair needs the same"
        )
    return len(base.below)
