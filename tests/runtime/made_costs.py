"""Cost tables made up for tests."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.cost import CostTable, Curve


def table(
    verify: Sequence[Curve] | None = None,
    node_ms: float = 1.0,
    step_ms: float = 2.0,
    own: float = 0.3,
    own_draft: float = 0.5,
) -> CostTable:
    """A target pass of 20 ms and `node_ms` for each further token; drafter calls of `step_ms`."""
    straight = Curve(batch=1, context=0, sizes=(1, 33), ms=(20.0, 20.0 + 32 * node_ms))
    call = Curve(batch=1, context=0, sizes=(1, 9), ms=(step_ms, 1.4 * step_ms))
    return CostTable(
        engine="e",
        machine={"cpu": "c"},
        threads=2,
        versions={},
        created="",
        spread=0.01,
        noisy=False,
        verify=tuple(verify) if verify else (straight,),
        extend=(call,),
        step=(call,),
        head_ms=0.2,
        own_ms=own,
        own_draft_ms=own_draft,
    )
