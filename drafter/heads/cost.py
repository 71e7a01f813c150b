"""What one forward of a head costs: weights read, and multiplications and additions.

A head lists its matrices as `Product`s. Their weights are read once for all states of a forward;
rows that are picked for each state (rescoring) are read anew for each. A byte count is of weights
alone: at a few states it is what a forward waits for, and what a smaller head saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """z = M x with M [rows, columns]; `name` as a checkpoint has it below the head.

    `gathered`: the rows are picked for each state from a larger matrix, which keeps its float.
    """

    name: str
    rows: int
    columns: int
    gathered: bool = False

    @property
    def weights(self) -> int:
        """Weights of M."""
        return self.rows * self.columns


@dataclass(frozen=True)
class HeadCost:
    """Of one forward: `bytes` of weights read, `flops` (a multiplication and an addition are 2)."""

    bytes: int
    flops: int


def float32_bytes(product: Product) -> int:
    """Bytes of its weights as an fp32 engine stores them."""
    return 4 * product.weights


def forward_cost(
    products: Iterable[Product],
    states: int = 1,
    stored: Callable[[Product], int] = float32_bytes,
) -> HeadCost:
    """The cost of a forward of `states` states; `stored` gives the bytes of a product's weights."""
    read, flops = 0, 0
    for product in products:
        read += stored(product) * (states if product.gathered else 1)
        flops += 2 * states * product.weights
    return HeadCost(read, flops)
