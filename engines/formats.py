"""How rounded weights are stored; needs no ONNX package, so that opening an engine stays fast."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """`bits` (8 or 4) for a weight; `block` weights of a row share a float scale.

    `shifted`: each block also has a float that step 0 means. Weights that lie on 2^bits evenly
    spaced values of their block, as those of a Q4_1 file do, are then stored without loss. Without
    it the middle step means 0.
    """

    bits: int
    block: int = 32
    shifted: bool = False

    @property
    def middle(self) -> int:
        """The step that means 0 in a block without a shift."""
        return 1 << (self.bits - 1)

    def bytes(self, rows: int, columns: int) -> int:
        """Of a matrix as stored: a row is padded to whole blocks."""
        blocks = -(-columns // self.block)
        return rows * blocks * (self.block * self.bits // 8 + (8 if self.shifted else 4))


INT8 = Format(bits=8)
INT4 = Format(bits=4, shifted=True)
