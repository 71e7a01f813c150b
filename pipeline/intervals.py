"""Confidence intervals by bootstrap over prompts: pooled ratios, medians, paired comparisons.

The rounds of one answer depend on one another, so whole prompts are drawn, not rounds (a cluster
bootstrap, percentile method; Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters
13 and 16). All intervals over the same number of prompts use the same draws: a comparison of two
drafters is paired, and a figure is the same whenever it is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
LEVEL = 0.95
_SEED = 0
_BLOCK = 2**20  # draws times prompts that are worked on at once: 8 MiB as float64

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.unsignedinteger]


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
    ranked = values[order]
    blocks = (block[:, order] * there[order] for block in _draws(len(values)))
    drawn = np.concatenate([_medians(block, ranked) for block in blocks])
    return _estimate(np.float64(np.median(values[there])), drawn, int(there.sum()))


def _medians(block: Counts, ranked: Floats) -> Floats:
    """The median of each draw, [B], from how often it holds each of the rising values: [B, P]."""
    counts = block.cumsum(axis=1, dtype=np.int64)  # up to each value
    found = counts[:, -1]  # values in a draw, [B]
    low, high = (found + 1) // 2, found // 2 + 1  # the middle one, or the middle two
    places = [(counts >= rank[:, None]).argmax(axis=1) for rank in (low, high)]
    drawn: Floats = (ranked[places[0]] + ranked[places[1]]) / 2
    drawn[found == 0] = np.nan
    return drawn


def _ratios(figure: Pooled) -> tuple[np.float64, Floats]:
    """The ratio itself, and that of each draw, [N]; not finite where nothing is below the line."""
    columns = np.stack(figure, axis=1)  # [P, 2]
    sums = columns.sum(axis=0)  # [2]
    drawn = np.concatenate([block @ columns for block in _draws(len(columns))])  # [N, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[0] / sums[1], drawn[:, 0] / drawn[:, 1]


@lru_cache(maxsize=1)
def _draws(prompts: int) -> tuple[Counts, ...]:
    """How often each draw with replacement holds each prompt, in blocks: [B, P], rows summing to P,
    N rows in all. Kept as the smallest integers that hold them, a byte each.
    """
    return tuple(block.astype(np.min_scalar_type(block.max())) for block in _blocks(prompts))


def _blocks(prompts: int) -> Iterator[npt.NDArray[np.int64]]:
    """The same draws in any division: the generator gives them row by row."""
    generator = np.random.default_rng(_SEED)
    shares = np.full(prompts, 1.0 / prompts)
    rows = max(1, _BLOCK // prompts)
    for start in range(0, RESAMPLES, rows):
        yield generator.multinomial(prompts, shares, size=min(rows, RESAMPLES - start))


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
