"""How rounded weights are stored; needs no ONNX package, so that opening an engine stays fast."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """`bits` (8 or 4) for a weight; `block` weights of a row share a float scale.

    `offset`: each block also has the whole number that means 0; without it the middle does.
    """

    bits: int
    block: int = 32
    offset: bool = False

    @property
    def middle(self) -> int:
        """The stored number that means 0 in a block without an offset."""
        return 1 << (self.bits - 1)

    def bytes(self, rows: int, columns: int) -> int:
        """Of a matrix as stored: a row is padded to whole blocks, its offsets to whole bytes."""
        blocks = -(-columns // self.block)
        offsets = -(-blocks * self.bits // 8) if self.offset else 0
        return rows * (blocks * (self.block * self.bits // 8 + 4) + offsets)


INT8 = Format(bits=8)
INT4 = Format(bits=4, offset=True)
