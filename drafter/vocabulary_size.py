"""How many tokens a truncated head should draft: coverage against latency (arXiv 2603.05210).

    k* = argmax U(k)  subject to  C(k) >= c_min
    U(k) = a C(k) + (1 - a) R(k),    R(k) = 1 - T(k) / T(V)
C(k) is the share of the answers' tokens that k drafted ones make up, T(k) the time of a drafter
step (layer and head) with k of the V tokens; which k they are, a ranking says. With a = 1/2 a token
pays for its row when its share of the text exceeds its row's share of the step.

The search is Optuna's tree-structured Parzen estimator, as in the paper, over the logarithm of k;
the smallest size that covers enough is tried first, since the best one often lies there.
`best_of_all` tries every size and is what the search is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from drafter.errors import MissingError, UsageError

if TYPE_CHECKING:
    from optuna.trial import Trial

TRIALS = 100


@dataclass(frozen=True)
class SizeTrial:
    """A size with its C, R and U."""

    size: int
    coverage: float
    saved: float
    utility: float


@dataclass(frozen=True)
class Tradeoff:
    """`coverage` [V]: C(k) at index k - 1, rising; `time(k)`: T(k) in any unit; `weight`: a."""

    coverage: Tensor
    time: Callable[[int], float]
    weight: float
    min_coverage: float

    def of(self, size: int) -> SizeTrial:
        """C, R and U of a size."""
        covered = float(self.coverage[size - 1])
        saved = 1.0 - self.time(size) / self.time(len(self.coverage))
        utility = self.weight * covered + (1.0 - self.weight) * saved
        return SizeTrial(size, covered, saved, utility)

    def enough(self, trial: SizeTrial) -> bool:
        """Whether it covers as much as it must."""
        return trial.coverage >= self.min_coverage

    def smallest(self, least: int) -> int:
        """The smallest size from `least` on that covers enough. Raises UsageError without one."""
        found = (self.coverage >= self.min_coverage).nonzero()
        if not len(found):
            raise UsageError(
                "nothing was counted to choose a draft vocabulary from; give another "
                "--draft-vocab-from or more documents."
            )
        return max(least, int(found[0]) + 1)


def linear_time(layer_weights: int, hidden_size: int) -> Callable[[int], float]:
    """T(k) = layer + k H, in weights: what FLOPs (2 a weight) and bytes read are both proportional
    to.
    """
    return lambda size: float(layer_weights + size * hidden_size)


def measured_time(
    sizes: Sequence[int], milliseconds: Sequence[float], layer_weights: int, hidden_size: int
) -> Callable[[int], float]:
    """T(k) in ms from heads timed at a few rising `sizes`, linear in between; the layer is counted
    as taking as long as so many weights of the largest head.
    """
    layer = milliseconds[-1] * layer_weights / (sizes[-1] * hidden_size)

    def time(size: int) -> float:
        place = min(max(1, sum(s < size for s in sizes)), len(sizes) - 1)
        (a, b), (low, high) = sizes[place - 1 : place + 1], milliseconds[place - 1 : place + 1]
        return layer + low + (high - low) * (size - a) / (b - a)

    return time


def search_size(
    tradeoff: Tradeoff, least: int, seed: int, trials: int = TRIALS
) -> tuple[SizeTrial, list[SizeTrial]]:
    """The best of `trials` sizes in [least, V], and all that were tried, in order. The same seed
    finds the same.

    Raises MissingError without Optuna, UsageError where no size covers enough.
    """
    try:
        import optuna
    except ImportError:
        raise MissingError(
            "the package optuna, which searches for the size of a draft vocabulary, is not "
            "installed; `pip install 'slimspec[train]'`, or give --draft-vocab a number."
        ) from None
    first = tradeoff.smallest(least)
    tried: list[SizeTrial] = []

    def objective(trial: Trial) -> float:
        made = tradeoff.of(trial.suggest_int("size", least, len(tradeoff.coverage), log=True))
        trial.set_constraint("coverage", tradeoff.min_coverage - made.coverage)  # holds at <= 0
        tried.append(made)
        return made.utility

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial({"size": first})
    study.optimize(objective, n_trials=trials)
    return max(filter(tradeoff.enough, tried), key=lambda made: made.utility), tried


def best_of_all(tradeoff: Tradeoff, least: int) -> SizeTrial:
    """The reference: the best of all sizes in [least, V]."""
    sizes = range(tradeoff.smallest(least), len(tradeoff.coverage) + 1)
    return max(map(tradeoff.of, sizes), key=lambda made: made.utility)


def coverage_curve(counts: Tensor, ranked: Tensor) -> Tensor:
    """C(k) for k = 1 .. V: counts int64 [V] and all ids in the order they are taken -> float64."""
    return counts[ranked].double().cumsum(0) / counts.sum().clamp(min=1)
