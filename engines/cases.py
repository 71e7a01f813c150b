"""Seeded inputs for every graph: prefill, decode and a random tree, batch 1 and 4, short and long
prefixes.

The reference makes the prefixes (cache rows, taps, states) that later cases read, so that the
numbers are those a model really meets. In a batch the prefixes differ in length: shorter ones are
padded in front and masked out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.config import DrafterConfig, TargetConfig
from engines.base import Engine
from export.contract import GraphName

BATCHES = (1, 4)
PREFIXES = (3, 120)
TREE_NODES = 12
COMMITTED = 3
SEED = 20_251_101
Feeds = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One run of one graph; `name` says what it stands for, e.g. `tree, batch 4, prefix 120`."""

    graph: GraphName
    name: str
    feeds: Feeds


@dataclass(frozen=True)
class _Prefix:
    """Sizes and padding of a batch of prefixes: `pads` [B] rows in front are no tokens."""

    length: int
    pads: Tensor

    @property
    def batch(self) -> int:
        return len(self.pads)

    def mask(self, among: Tensor) -> Tensor:
        """bool [B, 1, T, P + T]: the prefix's tokens and, among the new rows, `among` [T, T]."""
        steps = among.shape[0]
        real = torch.arange(self.length)[None] >= self.pads[:, None]  # [B, P]
        past = real[:, None, None].expand(self.batch, 1, steps, self.length)
        new = among[None, None].expand(self.batch, 1, steps, steps)
        return torch.cat((past, new), dim=-1).contiguous()

    def positions(self, offsets: Tensor) -> Tensor:
        """int64 [B, T]: the positions `offsets` [T] after the prefix."""
        return self.length - self.pads[:, None] + offsets[None]


def make_cases(
    reference: Mapping[GraphName, Engine],
    target: TargetConfig,
    drafter: DrafterConfig,
    *,
    batches: Sequence[int] = BATCHES,
    prefixes: Sequence[int] = PREFIXES,
    seed: int = SEED,
) -> Iterator[Case]:
    """Cases of all three graphs. `reference` runs the fp32 prefixes; it is not what is checked."""
    longest = min(target.max_positions, drafter.max_positions) - TREE_NODES - 1
    for batch in batches:
        for length in sorted({min(prefix, longest) for prefix in prefixes}):
            generator = torch.Generator().manual_seed(seed + 1000 * batch + length)
            yield from _cases_of(reference, target, drafter, batch, length, generator)


def random_tree(nodes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ancestor mask bool [N, N] (self included) and depths int64 [N] of a random tree rooted at
    node 0.
    """
    mask = torch.eye(nodes, dtype=torch.bool)
    depths = torch.zeros(nodes, dtype=torch.int64)
    for node in range(1, nodes):
        parent = int(torch.randint(node, (1,), generator=generator))
        mask[node] |= mask[parent]
        depths[node] = depths[parent] + 1
    return mask, depths


def _cases_of(
    reference: Mapping[GraphName, Engine],
    target: TargetConfig,
    drafter: DrafterConfig,
    batch: int,
    length: int,
    generator: torch.Generator,
) -> Iterator[Case]:
    def tokens(count: int) -> Tensor:
        return torch.randint(target.vocab_size, (batch, count), generator=generator)

    label = f"batch {batch}, prefix {length}"
    pads = (torch.arange(batch) % 4) % length
    prefix, nothing = _Prefix(length, pads), _Prefix(0, torch.zeros_like(pads))
    tree, depths = random_tree(TREE_NODES, generator)
    one, zero = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)

    def past(of: Mapping[str, Tensor], layers: int) -> Feeds:
        names = (f"{kind}_{i}" for i in range(layers) for kind in ("key", "value"))
        return {f"past_{name}": of[f"new_{name}"].clone() for name in names}

    def empty(layers: int, size: int) -> Feeds:
        names = (f"{kind}_{i}" for i in range(layers) for kind in ("key", "value"))
        return {f"past_{name}": torch.zeros(batch, 0, size) for name in names}

    def common(where: _Prefix, among: Tensor, offsets: Tensor) -> Feeds:
        return {
            "input_ids": tokens(len(offsets)),
            "position_ids": where.positions(offsets).clamp(min=0),
            "attention_mask": where.mask(among),
        }

    def rows(*wanted: int) -> Feeds:
        return {"rows": torch.tensor(wanted).expand(batch, -1).contiguous()}

    # A padded prefill: a pad attends itself only, so that no row is empty.
    steps = torch.arange(length)
    filled = common(nothing, torch.ones(length, length, dtype=torch.bool).tril(), steps)
    filled["position_ids"] = (steps[None] - pads[:, None]).clamp(min=0)
    real = (steps[None] >= pads[:, None])[:, None, None]  # [B, 1, 1, T]
    filled["attention_mask"] &= real | torch.eye(length, dtype=torch.bool)

    prefill = {**filled, **rows(length - 1), **empty(target.num_layers, target.kv_size)}
    yield Case("target", f"prefill, {label}", prefill)
    made = reference["target"].run(prefill)
    taps, cache = made["taps"].clone(), past(made, target.num_layers)
    yield Case("target", f"decode, {label}", {**common(prefix, one, zero), **rows(0), **cache})
    verify = {**common(prefix, tree, depths), **rows(*range(TREE_NODES)), **cache}
    yield Case("target", f"tree, {label}", verify)
    tree_taps = reference["target"].run(verify)["taps"][:, :COMMITTED].clone()

    first = {**filled, "taps": taps, **rows(length - 1), **empty(1, drafter.kv_size)}
    first["input_ids"] = tokens(length)
    yield Case("drafter_extend", f"prefill, {label}", first)
    made = reference["drafter_extend"].run(first)
    state, cache = made["state"].clone(), past(made, 1)
    chain = torch.ones(COMMITTED, COMMITTED, dtype=torch.bool).tril()
    commit = {**common(prefix, chain, torch.arange(COMMITTED)), "taps": tree_taps, **cache}
    yield Case("drafter_extend", f"decode, {label}", {**commit, **rows(COMMITTED - 1)})

    level = {**common(prefix, one, zero), "parent_state": state, **cache}
    yield Case("drafter_step", f"decode, {label}", level)
    states = state.expand(-1, TREE_NODES, -1).contiguous()
    level = {**common(prefix, tree, depths), "parent_state": states, **cache}
    yield Case("drafter_step", f"tree, {label}", level)
