"""Dice that walk through every outcome of a random procedure, with its exact probability."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from runtime.sampling import Dice, Law

Outcome = TypeVar("Outcome", bound=Hashable)


class ScriptedDice:
    """Follows a script of branch numbers; beyond its end takes the first branch there is."""

    def __init__(self, script: list[int]) -> None:
        self.probability: Any = 1
        self.taken: list[int] = []
        self.branches: list[int] = []
        self._script = script

    def flip(self, chance: float) -> bool:
        """A branch for True and one for False, without the impossible one."""
        assert 0 <= chance <= 1
        options = [(value, p) for value, p in ((True, chance), (False, 1 - chance)) if p > 0]
        return bool(self._take(options))

    def pick(self, weights: Law) -> int:
        """A branch for every index of positive weight."""
        total = sum(weights.tolist())
        assert total > 0
        return int(self._take([(i, w / total) for i, w in enumerate(weights.tolist()) if w > 0]))

    def _take(self, options: list[tuple[Any, Any]]) -> Any:
        step = len(self.taken)
        branch = self._script[step] if step < len(self._script) else 0
        self.taken.append(branch)
        self.branches.append(len(options))
        value, probability = options[branch]
        self.probability *= probability
        return value


def law_of(procedure: Callable[[Dice], Outcome]) -> dict[Outcome, Any]:
    """Every outcome of `procedure` with its probability, by running all of its branches."""
    law: dict[Outcome, Any] = defaultdict(int)
    script: list[int] = []
    while True:
        dice = ScriptedDice(script)
        law[procedure(dice)] += dice.probability
        script = dice.taken
        while script and script[-1] + 1 == dice.branches[len(script) - 1]:
            script.pop()
        if not script:
            return dict(law)
        script[-1] += 1
