"""Comparing outputs: what counts as equal, and what is named first."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.parity import (
    EXACT,
    Tolerance,
    compare,
    computation_order,
    errors,
    errors_by_id,
    id_agreement,
)
from export.contract import drafter_contract, target_contract
from tests.tiny_drafter import tiny_drafter, tiny_target

TARGET = tiny_target(num_layers=2)
CONTRACT = target_contract(TARGET.config, 3)
STEP = drafter_contract(tiny_drafter(TARGET).config, "step")
SCORES = torch.tensor([[[5.0, 4.0, 3.0]]])
IDS = torch.tensor([[[7, 8, 9]]])
TIE = 1e-3


def outputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random outputs of the target graph."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"B": 1, "T": 2, "P": 0, "R": 2}
    return {s.name: torch.randn(s.shape(sizes), generator=generator) for s in CONTRACT.outputs}


def test_equal_outputs_are_equal() -> None:
    made = compare(CONTRACT, "case", outputs(), outputs(), EXACT)
    assert [c.tensor for c in made] == computation_order(CONTRACT)
    assert all(c.ok and c.max_abs == c.max_rel == 0 for c in made)
    assert made[-1].topk_agreement == 1.0


@pytest.mark.parametrize("name", ["new_value_0", "new_key_1", "taps", "logits"])
def test_a_changed_tensor_is_the_one_that_is_named(name: str) -> None:
    found = outputs()
    found[name] = found[name] + 0.01
    bad = [c.tensor for c in compare(CONTRACT, "case", outputs(), found, EXACT) if not c.ok]
    assert bad == [name]


def test_cache_rows_come_before_what_is_computed_from_them() -> None:
    order = computation_order(CONTRACT)
    assert order == ["new_key_0", "new_value_0", "new_key_1", "new_value_1", "taps", "logits"]
    assert computation_order(STEP)[-1] == "topk_ids"


def test_scores_are_compared_absolutely_and_states_by_row() -> None:
    expected, found = outputs(), outputs()
    expected["taps"][0, 0] *= 1e6
    found["taps"] = expected["taps"].clone()
    found["taps"][0, 0] += 1.0  # one part in a million of its row
    assert all(c.ok for c in compare(CONTRACT, "case", expected, found, EXACT))
    found["taps"][0, 1, 0] += 0.1  # its row is a million times smaller
    assert not all(c.ok for c in compare(CONTRACT, "case", expected, found, EXACT))
    found = {**outputs(), "logits": outputs()["logits"] + 2e-3}
    assert not compare(CONTRACT, "case", outputs(), found, EXACT)[-1].ok
    assert compare(CONTRACT, "case", outputs(), found, Tolerance(scores=3e-3))[-1].ok


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_infinitely_wrong(value: float) -> None:
    found = torch.zeros(1, 2, 3)
    found[0, 1, 2] = value
    assert errors(torch.zeros(1, 2, 3), found) == (math.inf, math.inf)


def test_another_shape_is_infinitely_wrong() -> None:
    assert errors(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)) == (math.inf, math.inf)


def test_equal_ids_agree() -> None:
    assert id_agreement(SCORES, IDS, SCORES, IDS, TIE) == 1.0


def test_a_different_id_with_a_different_score_disagrees() -> None:
    found = torch.tensor([[[7, 8, 99]]])
    worse = torch.tensor([[[5.0, 4.0, 3.5]]])
    assert id_agreement(SCORES, IDS, worse, found, TIE) == pytest.approx(2 / 3)


def test_swapped_ids_agree_only_when_their_scores_tie() -> None:
    swapped = torch.tensor([[[8, 7, 9]]])
    assert id_agreement(SCORES, IDS, SCORES, swapped, TIE) == pytest.approx(1 / 3)
    tied = torch.tensor([[[5.0, 5.0, 3.0]]])
    assert id_agreement(tied, IDS, tied, swapped, TIE) == 1.0


def test_an_unlisted_id_agrees_only_when_it_ties_with_the_last() -> None:
    found = torch.tensor([[[7, 8, 42]]])
    assert id_agreement(SCORES, IDS, SCORES + 1e-4, found, TIE) == 1.0
    assert id_agreement(SCORES, IDS, SCORES + 1e-2, found, TIE) == pytest.approx(2 / 3)
    first = torch.tensor([[[42, 8, 9]]])
    assert id_agreement(SCORES, IDS, SCORES, first, TIE) == pytest.approx(2 / 3)


@given(st.integers(0, 999), st.floats(1e-7, 1e-5))
def test_noise_far_below_the_tolerance_never_matters(seed: int, noise: float) -> None:
    expected = outputs(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    found = {
        name: t + noise * torch.randn(t.shape, generator=generator) for name, t in expected.items()
    }
    assert all(c.ok for c in compare(CONTRACT, "case", expected, found, EXACT))


def test_by_id_a_missing_candidate_costs_one_place_and_no_score() -> None:
    reference = {
        "topk_ids": torch.tensor([[[7, 3, 9, 4]]]),
        "topk_logprobs": torch.tensor([[[-1.0, -2.0, -3.0, -4.0]]]),
    }
    found = {  # 3 was not previewed: all below moved up
        "topk_ids": torch.tensor([[[7, 9, 4, 5]]]),
        "topk_logprobs": torch.tensor([[[-1.01, -3.0, -4.0, -5.0]]]),
    }
    largest, mean, agreement = errors_by_id(reference, found, in_place=1.0)
    assert (largest, mean) == (pytest.approx(0.01, rel=1e-4), pytest.approx(0.01 / 3, rel=1e-4))
    assert agreement == 0.75


def test_by_id_a_wrong_score_of_a_candidate_is_found_wherever_it_stands() -> None:
    reference = {
        "topk_ids": torch.tensor([[[7, 3, 9]]]),
        "topk_logprobs": torch.tensor([[[-1.0, -2.0, -3.0]]]),
    }
    found = {
        "topk_ids": torch.tensor([[[3, 7, 9]]]),
        "topk_logprobs": torch.tensor([[[-0.5, -1.0, -3.0]]]),
    }
    assert errors_by_id(reference, found, in_place=1.0) == (1.5, 0.5, 1.0)
    assert errors_by_id(reference, found, in_place=math.inf)[0] == math.inf


def test_by_id_candidates_that_do_not_stand_best_first_are_wrong() -> None:
    reference = {
        "topk_ids": torch.tensor([[[7, 3]]]),
        "topk_logprobs": torch.tensor([[[-1.0, -2.0]]]),
    }
    found = {name: tensor.flip(-1) for name, tensor in reference.items()}
    assert errors_by_id(reference, found, in_place=1.0)[0] == math.inf
