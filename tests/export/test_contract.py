"""The graph contract: what each graph takes and gives, and how feeds are checked against it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafter.errors import UsageError
from export.contract import (
    TORCH_DTYPES,
    GraphContract,
    contracts,
    drafter_contract,
    target_contract,
)
from tests.tiny_drafter import tiny_drafter, tiny_target

TARGET = tiny_target(num_layers=2)
DRAFTER = tiny_drafter(TARGET).config
ALL = contracts(TARGET.config, DRAFTER)
SIZES = {"B": 2, "T": 3, "P": 4, "R": 1}


def feeds(contract: GraphContract, **sizes: int) -> dict[str, torch.Tensor]:
    """Zeros of the right shapes."""
    return {
        spec.name: torch.zeros(spec.shape(SIZES | sizes), dtype=TORCH_DTYPES[spec.dtype])
        for spec in contract.inputs
    }


def table(contract: GraphContract) -> tuple[dict[str, object], dict[str, object]]:
    """Inputs and outputs as the documentation lists them."""
    return (
        {s.name: (s.dtype, s.axes) for s in contract.inputs},
        {s.name: (s.dtype, s.axes) for s in contract.outputs},
    )


def test_the_target_graph_is_the_documented_one() -> None:
    inputs, outputs = table(target_contract(TARGET.config, n_taps=3))
    past = {f"past_{k}_{i}": ("float32", ("B", "P", 16)) for i in (0, 1) for k in ("key", "value")}
    new = {f"new_{k}_{i}": ("float32", ("B", "T", 16)) for i in (0, 1) for k in ("key", "value")}
    assert inputs == {
        "input_ids": ("int64", ("B", "T")),
        "position_ids": ("int64", ("B", "T")),
        "attention_mask": ("bool", ("B", 1, "T", "S")),
        "rows": ("int64", ("B", "R")),
        **past,
    }
    assert outputs == {
        "logits": ("float32", ("B", "R", 61)),
        "taps": ("float32", ("B", "T", 96)),
        **new,
    }


@pytest.mark.parametrize(
    ("kind", "state", "rows"), [("extend", "taps", "R"), ("step", "parent_state", "T")]
)
def test_the_drafter_graphs_are_the_documented_ones(kind: str, state: str, rows: str) -> None:
    inputs, outputs = table(drafter_contract(DRAFTER, kind))  # type: ignore[arg-type]
    width = 32 * (len(DRAFTER.taps) if kind == "extend" else 1)
    assert inputs == {
        "input_ids": ("int64", ("B", "T")),
        state: ("float32", ("B", "T", width)),
        "position_ids": ("int64", ("B", "T")),
        "attention_mask": ("bool", ("B", 1, "T", "S")),
        **({"rows": ("int64", ("B", "R"))} if kind == "extend" else {}),
        "past_key_0": ("float32", ("B", "P", 16)),
        "past_value_0": ("float32", ("B", "P", 16)),
    }
    assert outputs == {
        "topk_logprobs": ("float32", ("B", rows, 6)),
        "topk_ids": ("int64", ("B", rows, 6)),
        "log_sum_exp": ("float32", ("B", rows)),
        "state": ("float32", ("B", rows, 32)),
        "new_key_0": ("float32", ("B", "T", 16)),
        "new_value_0": ("float32", ("B", "T", 16)),
    }


def test_no_graph_has_an_input_and_an_output_of_one_name() -> None:
    for contract in ALL.values():
        names = [s.name for s in (*contract.inputs, *contract.outputs)]
        assert len(names) == len(set(names))


@given(
    st.sampled_from(sorted(ALL)),
    st.tuples(*[st.integers(1, 5)] * 2, st.integers(0, 5), st.integers(1, 5)),
)
def test_feeds_of_any_sizes_that_fit_are_accepted(graph: str, sizes: tuple[int, ...]) -> None:
    wanted = dict(zip("BTPR", sizes, strict=True))
    found = ALL[graph].check(feeds(ALL[graph], **wanted))  # type: ignore[index]
    wanted["S"] = wanted["P"] + wanted["T"]
    assert found.items() <= wanted.items()


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("rows", None, "needs the input 'rows'"),
        ("input_ids", torch.zeros(2, 3, dtype=torch.int32), "torch.int32"),
        ("attention_mask", torch.zeros(2, 1, 3, 7), "must be bool"),
        ("attention_mask", torch.zeros(2, 3, 7, dtype=torch.bool), r"\[2, 3, 7\]"),
        ("attention_mask", torch.zeros(2, 1, 3, 8, dtype=torch.bool), "4 \\+ 3"),
        ("position_ids", torch.zeros(2, 4, dtype=torch.int64), r"must be int64 \[2, 3\]"),
        ("past_key_1", torch.zeros(2, 5, 16), r"'past_key_1' is .* must be float32 \[2, 4, 16\]"),
    ],
)
def test_a_feed_that_breaks_the_contract_is_named(
    name: str, wrong: torch.Tensor | None, message: str
) -> None:
    given_feeds = feeds(ALL["target"])
    if wrong is None:
        del given_feeds[name]
    else:
        given_feeds[name] = wrong
    with pytest.raises(UsageError, match=message):
        ALL["target"].check(given_feeds)
