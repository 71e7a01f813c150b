"""The law a token is drawn from, and the dice that draw it.

`target_law` turns the target's logits into the law p of the next token. Order, as in transformers:
temperature, top-k, top-p, min-p, each on what the one before left. Temperature 0 is greedy: the
whole mass on the largest logit. All ties go to the lower id: top-k keeps exactly k tokens, top-p
the smallest leading set whose mass reaches p. Plain and speculative decoding use this one law.

Chance enters through `Dice` only, so a test can replace the seeded dice by one that walks through
every outcome with its exact probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from drafter.errors import CheckFailed, UsageError

Law = npt.NDArray[np.float64]  # [V], sums to 1 (up to rounding)
Logits = npt.NDArray[np.float32]  # [V]

_FIRST_BAR, _LAST_BAR = 2.0**-6, 2.0**-30  # probabilities between which top-p lowers its bar
_BLOCK = 256  # weights that are summed up together when a draw is looked up


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How tokens are chosen. Raises UsageError for a value out of range.

    `temperature` 0 is greedy and ignores the rest. `top_k` 0, `top_p` 1 and `min_p` 0 are off.
    `seed` None draws a fresh seed for each request.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _need(_finite(self.temperature) and self.temperature >= 0, self, "temperature", ">= 0")
        _need(_whole(self.top_k) and self.top_k >= 0, self, "top_k", "a whole number >= 0 (0: off)")
        _need(_finite(self.top_p) and 0 < self.top_p <= 1, self, "top_p", "above 0 and at most 1")
        _need(_finite(self.min_p) and 0 <= self.min_p <= 1, self, "min_p", "between 0 and 1")
        seed_ok = self.seed is None or (_whole(self.seed) and self.seed >= 0)
        _need(seed_ok, self, "seed", "a whole number >= 0")

    @property
    def greedy(self) -> bool:
        """Whether the law is a point mass on the largest logit."""
        return self.temperature == 0

    @property
    def reproducible(self) -> bool:
        """Whether draws depend on a seed, which alone must decide them: what the draft tree follows
        must then not depend on other requests.
        """
        return not self.greedy and self.seed is not None


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _need(holds: bool, config: SamplingConfig, name: str, wanted: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {getattr(config, name)!r}; it must be {wanted}.")


GREEDY = SamplingConfig()


def argmax(logits: Logits) -> int:
    """The id of the largest logit, the lowest one on a tie. Raises CheckFailed on NaN."""
    best = int(logits.argmax())  # numpy answers the first of equals, and the first NaN if any
    if not math.isfinite(logits[best]):
        raise _broken(float(logits[best]))
    return best


def target_law(logits: Logits, config: SamplingConfig) -> Law:
    """The law of the next token, float64 [V]; a fresh array that the caller may change.

    Raises CheckFailed when the logits hold NaN or +inf, or nothing but -inf.
    """
    law: Law
    if config.greedy:
        law = np.zeros(logits.shape[0], dtype=np.float64)
        law[argmax(logits)] = 1.0
        return law
    top = logits.max()  # NaN if any is NaN
    if not math.isfinite(top):
        raise _broken(float(top))
    ids = _top_k_ids(logits, config.top_k)
    scores = logits if ids is None else logits[ids]
    weights = _weights(scores, float(top), config.temperature)
    if config.top_p < 1.0:
        weights *= _nucleus(weights / weights.sum(), config.top_p)
    if config.min_p > 0.0:
        weights[weights < config.min_p * weights.max()] = 0.0
    weights /= weights.sum()
    if ids is None:
        return weights
    law = np.zeros(logits.shape[0], dtype=np.float64)
    law[ids] = weights
    return law


def _weights(scores: Logits, top: float, temperature: float) -> Law:
    """exp((score - top) / temperature), float64; 1 for the largest."""
    shifted = scores.astype(np.float64)
    shifted -= top
    with np.errstate(over="ignore"):  # a tiny temperature sends the rest to -inf, that is weight 0
        shifted /= temperature
    np.exp(shifted, out=shifted)
    return shifted


def _top_k_ids(logits: Logits, k: int) -> npt.NDArray[np.int64] | None:
    """Ids of the k largest logits, ascending; of equals the lower ids. None: all of them."""
    count = logits.shape[0]
    if k == 0 or k >= count:
        return None
    bar = np.partition(logits, count - k)[count - k]
    above = np.flatnonzero(logits > bar)
    level = np.flatnonzero(logits == bar)[: k - above.shape[0]]
    return np.sort(np.concatenate((above, level)))


def _nucleus(probs: Law, top_p: float) -> npt.NDArray[np.bool_]:
    """Which tokens make up the smallest leading set of mass >= top_p (ties: lower id first).

    Sorts only tokens above a bar, lowered until their mass is enough: at most 1/bar pass it.
    """
    bar = _FIRST_BAR
    while True:
        leading = np.flatnonzero(probs >= bar)
        if bar == 0.0 or probs[leading].sum() >= top_p:
            leading = leading[np.argsort(-probs[leading], kind="stable")]
            mass = np.cumsum(probs[leading])
            if bar == 0.0 or mass[-1] >= top_p:  # the two sums may round differently
                break
        bar = bar / 16 if bar > _LAST_BAR else 0.0
    keep = np.zeros(probs.shape[0], dtype=np.bool_)
    keep[leading[: int(np.searchsorted(mass, top_p, side="left")) + 1]] = True
    return keep


def _broken(value: float) -> CheckFailed:
    return CheckFailed(
        f"the target's largest logit is {value}; it must be finite: "
        "run `pipeline check` on this engine."
    )


class Dice(Protocol):
    """Every random decision of a request."""

    def flip(self, chance: float) -> bool:
        """True with probability `chance`; never for chance 0, always for chance 1."""
        ...

    def pick(self, weights: Law) -> int:
        """An index with probability proportional to its weight; never one of weight 0."""
        ...


class SeededDice:
    """Dice of one request: numpy's PCG64 under the request's seed (None: fresh entropy)."""

    def __init__(self, seed: int | None = None) -> None:
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def flip(self, chance: float) -> bool:
        """See `Dice`. The coin lies in [0, 1), so `<` refuses chance 0 even at coin 0."""
        return bool(self._rng.random() < chance)

    def pick(self, weights: Law) -> int:
        """See `Dice`. Inverse of the cumulative sum, at a point in [0, total)."""
        return invert(weights, self._rng.random())


def invert(weights: Law, point: float) -> int:
    """The index whose share of the cumulative sum holds `point` in [0, 1), weight 0 never.

    First the block of `_BLOCK` entries that holds it, then the entry: summing up all of a
    vocabulary one by one would take ten times as long.
    """
    ends = np.cumsum(np.add.reduceat(weights, np.arange(0, weights.shape[0], _BLOCK)))
    block, rest = _share(ends, point * ends[-1])
    first = block * _BLOCK
    inside, _ = _share(np.cumsum(weights[first : first + _BLOCK]), rest)
    return first + inside


def _share(ends: Law, aim: float) -> tuple[int, float]:
    """The first index whose running sum exceeds `aim`, and how far `aim` lies into its share.

    side="right" steps over entries that add nothing; where rounding carried `aim` to the end, it
    is the last entry that adds anything.
    """
    index = int(np.searchsorted(ends, aim, side="right"))
    if index == ends.shape[0]:
        index = int(np.searchsorted(ends, ends[-1], side="left"))
    return index, max(0.0, aim - float(ends[index - 1])) if index else aim


def choose(logits: Logits, config: SamplingConfig, dice: Dice) -> int:
    """The next token of plain decoding: argmax, or a draw from the target's law."""
    if config.greedy:
        return argmax(logits)
    return dice.pick(target_law(logits, config))
