"""Seeded cases: the inputs that parity is judged on."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.cases import TREE_NODES, make_cases, random_tree
from engines.torch_backend import torch_engines
from export.contract import contracts
from tests.tiny_drafter import tiny_drafter, tiny_target

TARGET = tiny_target(num_layers=2)
DRAFTER = tiny_drafter(TARGET)
REFERENCE = torch_engines(TARGET, DRAFTER)


@given(st.integers(1, 30), st.integers(0, 9999))
def test_a_random_tree_is_closed_under_ancestors(nodes: int, seed: int) -> None:
    mask, depths = random_tree(nodes, torch.Generator().manual_seed(seed))
    assert mask[:, 0].all()  # the root is everyone's ancestor
    assert torch.equal(mask.sum(-1) - 1, depths)
    for node in range(nodes):
        for ancestor in mask[node].nonzero().flatten().tolist():
            assert ancestor <= node
            assert not (mask[ancestor] & ~mask[node]).any()


def test_every_graph_is_fed_as_its_contract_says() -> None:
    found = contracts(TARGET.config, DRAFTER.config)
    cases = list(
        make_cases(REFERENCE, TARGET.config, DRAFTER.config, batches=(1, 4), prefixes=(2, 9))
    )
    for case in cases:
        sizes = found[case.graph].check(case.feeds)
        steps = TREE_NODES if case.name.startswith("tree") else sizes["T"]
        assert sizes["T"] == steps
        assert case.feeds["attention_mask"].any(-1).all()  # no row is blind
        assert (case.feeds["position_ids"] >= 0).all()
    kinds = {(case.graph, case.name.split(",")[0]) for case in cases}
    assert kinds == {
        *[("target", kind) for kind in ("prefill", "decode", "tree")],
        *[("drafter_extend", kind) for kind in ("prefill", "decode")],
        *[("drafter_step", kind) for kind in ("decode", "tree")],
    }


def test_prefixes_of_a_batch_differ_in_length() -> None:
    cases = make_cases(REFERENCE, TARGET.config, DRAFTER.config, batches=(4,), prefixes=(9,))
    decode = next(c for c in cases if c.name.startswith("decode"))
    assert decode.feeds["position_ids"].flatten().tolist() == [9, 8, 7, 6]
    assert decode.feeds["attention_mask"].sum(-1).flatten().tolist() == [10, 9, 8, 7]


def test_a_prefix_longer_than_the_context_is_cut() -> None:
    short = TARGET.config.model_copy(update={"max_positions": 20})
    cases = make_cases(REFERENCE, short, DRAFTER.config, batches=(1,), prefixes=(50,))
    assert {case.name.split("prefix ")[1] for case in cases} == {str(20 - TREE_NODES - 1)}


def test_cases_are_the_same_every_time() -> None:
    def made() -> list[dict[str, torch.Tensor]]:
        cases = make_cases(REFERENCE, TARGET.config, DRAFTER.config, batches=(2,), prefixes=(3,))
        return [case.feeds for case in cases]

    for one, other in zip(made(), made(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
