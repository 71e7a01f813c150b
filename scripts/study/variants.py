"""What the study compares: heads x losses x seeds, and starts of the d/8 head.

Every variant takes over the layer of one trained drafter (the body), gets a fresh head, and is
trained on the same documents for the same steps. A dense or truncated head starts from the target's
rows, a low-rank one from factors (`init`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from drafter.config import TargetConfig

LOSSES = ("kl", "lk_hybrid")
DENSE = "dense"


@dataclass(frozen=True)
class Head:
    """A head by name: `fields` of the drafter's config, `source` of a truncated vocabulary."""

    fields: dict[str, Any]
    source: str = "answers"


@dataclass(frozen=True)
class Variant:
    """One training run."""

    head: str
    loss: str
    seed: int
    init: str = "activation-pca"

    @property
    def name(self) -> str:
        """As a folder is called."""
        head = self.head.replace("/", "").replace(" ", "").replace("+", "-")
        return f"{head}_{self.loss}_{self.init}_{self.seed}"


def heads(target: TargetConfig) -> dict[str, Head]:
    """The compared heads of a target with hidden size d and vocabulary V."""
    d, quarter = target.hidden_size, target.vocab_size // 4

    def low_rank(rank: int, rescore: int = 0) -> Head:
        return Head({"head": "low_rank", "lm_head_rank": rank, "rescore": rescore})

    truncated = {"head": "truncated", "draft_vocab_size": quarter}
    return {
        DENSE: Head({"head": "dense"}),
        "d/4": low_rank(d // 4),
        "d/8": low_rank(d // 8),
        "d/16": low_rank(d // 16),
        "d/8 + rescored": low_rank(d // 8, 128),
        "d/16 + rescored": low_rank(d // 16, 128),
        "FR-Spec 25 %": Head(truncated, "corpus"),
        "VocabTrim 25 %": Head(truncated, "answers"),
    }


def variants(names: list[str], seeds: int) -> list[Variant]:
    """All runs, the seeds outermost: whoever stops early has every head once."""
    found = []
    for seed in range(seeds):
        found += [Variant(head, loss, seed) for loss in LOSSES for head in names]
        found += [Variant("d/8", "kl", seed, init) for init in ("random", "svd")]
    return found
