"""What the calibrated costs of a machine promise the rounds that a bench saw.

The rounds' shape is measured (tokens, nodes, what the drafter was fed), their time is not: where
this is far from the measured gain, the costs are of a machine that was otherwise busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from statistics import fmean

from pipeline.bench.plan import Cell
from pipeline.bench.records import Record
from runtime.cost import CostModel, RoundShape, predicted


def calibrated_speedup(costs: CostModel, cell: Cell, records: Sequence[Record]) -> float | None:
    """Speed-up over plain decoding; None where there were no rounds, or of batches: costs are
    measured of one request at a time.
    """
    replies = [(record.group, reply) for record in records for reply in record.replies]
    figures = [reply.figures for _, reply in replies]
    rounds = sum(f["rounds"] for f in figures)
    if cell.batch > 1 or not rounds:
        return None
    shape = RoundShape(
        tau=sum(len(reply.token_ids) - 1 for _, reply in replies) / rounds,
        nodes=sum(f["nodes"] for f in figures) / rounds,
        extended=sum(f["extended"] for f in figures) / rounds,
        steps=[
            sum(nodes) / rounds
            for nodes in zip_longest(*(f["stepped"] for f in figures), fillvalue=0)
        ],
    )
    context = fmean(len(cell.ids[group]) + len(r.token_ids) / 2 for group, r in replies)
    return predicted(costs, shape, round(context)).speedup
