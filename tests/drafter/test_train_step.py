"""One optimiser step: packed or padded, in one batch or in several, it is the same step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drafter.average import Average
from drafter.batches import NOBODY, pack, packed_order, packed_rows, supervised_positions
from drafter.capture import Captured, capture
from drafter.corpus import document
from drafter.losses import LOSSES
from drafter.train_config import TrainConfig
from drafter.train_log import Clock
from drafter.train_step import Learner, train_step
from drafter.training import batch_plan
from drafter.unroll import document_mask
from tests.tiny_drafter import tiny_captured, tiny_drafter, tiny_target

TARGET = tiny_target()
DOCUMENTS = tiny_captured(TARGET, 12)
# No clipping, or the gradients that are compared would have been scaled.
EXACT: dict[str, Any] = {"precision": "fp32", "draft_steps": 3, "clip": 1e9, "warmup_steps": 0}


def step(
    documents: list[Captured], batch: list[list[int]], **options: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What one step finds, and its gradients by name."""
    drafter = tiny_drafter(TARGET, rescore=16)
    learner = Learner(drafter, TrainConfig(**(EXACT | options)))
    found = train_step(learner, documents, batch, 0, 10, Clock())
    return found, {name: p.grad for name, p in drafter.named_parameters() if p.grad is not None}


def assert_same_step(one: Any, other: Any) -> None:
    (values, gradients), (more_values, more_gradients) = one, other
    assert values["loss"] == pytest.approx(more_values["loss"], rel=1e-5)
    assert values["alpha"] == pytest.approx(more_values["alpha"], abs=1e-5)
    assert gradients.keys() == more_gradients.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - more_gradients[name]).abs().max() <= 1e-5 * largest, name


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 14)), min_size=1, max_size=9))
@settings(max_examples=15, deadline=None)
def test_packed_documents_give_the_loss_and_gradients_of_padded_ones(
    shapes: list[tuple[int, int]],
) -> None:
    generator = torch.Generator().manual_seed(len(shapes))

    def ids(count: int) -> list[int]:
        return torch.randint(3, 61, (count,), generator=generator).tolist()

    texts = [document(ids(prompt), ids(response)) for prompt, response in shapes]
    texts.append(document(ids(4), ids(8)))  # something to learn from, whatever was drawn
    documents = list(capture(TARGET, texts))
    batch = [list(range(len(documents)))]
    padded, packed = step(documents, batch), step(documents, batch, packing=True)
    assert_same_step(padded, packed)


def test_a_packed_token_sees_its_own_document_and_counts_from_its_beginning() -> None:
    texts = [document([3, 4], [5] * rest) for rest in (3, 3, 10)]
    batch = pack(list(capture(TARGET, texts)))  # 5 + 5 tokens beside each other, 12 in a row
    assert batch.owners is not None
    row = next(r for r, owners in enumerate(batch.owners.tolist()) if 0 in owners)
    places = batch.places[row][batch.owners[row] != NOBODY].tolist()
    assert places == [*range(5)] * 2
    mask = document_mask(batch.owners)[row, 0]
    assert mask[5].nonzero().squeeze(1).tolist() == [5]
    assert mask[4].nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 4]


def test_no_supervision_reaches_across_a_border() -> None:
    mask = torch.ones(1, 6, dtype=torch.bool)
    places = torch.tensor([[0, 1, 2, 0, 1, 2]])
    _, positions = supervised_positions(mask, 2, places)
    assert positions.tolist() == [2, 5]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(40, 200))
@settings(max_examples=40, deadline=None)
def test_packing_holds_every_document_once_in_rows_and_batches_of_bounded_size(
    lengths: list[int], tokens: int
) -> None:
    rows = packed_rows(lengths)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= max(lengths) for row in rows)
    batches = packed_order(lengths, tokens, 3, 1)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= tokens for batch in batches)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sampled_rows", [0, 20])
def test_micro_batches_give_the_step_of_one_batch(loss: str, sampled_rows: int) -> None:
    """Of unlike sizes: a mean of means would be another loss."""
    options = {"loss": loss, "sampled_rows": sampled_rows}
    together = step(DOCUMENTS, [list(range(12))], **options)
    apart = step(DOCUMENTS, [[0, 1, 2, 3, 4, 5, 6], [7], [8, 9, 10, 11]], **options)
    assert_same_step(together, apart)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        held = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in held:
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize(
    "shape",
    [{"rescore": 16}, {"rescore": 0}, {"head": "target", "rescore": 0}],
    ids=["rescored", "plain", "target"],
)
def test_scoring_all_rows_copies_no_matrix(shape: dict[str, Any]) -> None:
    """In the step that training takes: nothing is as large as the target's rows, or as the scores
    of more than a chunk's positions.
    """
    target = tiny_target(vocab_size=5000)
    documents = tiny_captured(target, 2)
    learner = Learner(tiny_drafter(target, **shape), TrainConfig(**EXACT, sampled_rows=0))
    head_rows = 5000 * 32  # those of the target; the head's own factor is 5000 x 4
    positions = sum(int(d.mask[3:].sum()) for d in documents)
    assert 5000 * positions < head_rows, "scores of all positions must not hide a copy"
    with Largest() as found:
        train_step(learner, documents, [[0, 1]], 0, 10, Clock())
    assert 0 < found.elements < head_rows


def test_all_rows_give_the_step_of_a_sample_that_holds_them_all() -> None:
    every = step(DOCUMENTS, [[*range(12)]], sampled_rows=0)
    assert_same_step(every, step(DOCUMENTS, [[*range(12)]], sampled_rows=61))


def test_position_weights_do_not_depend_on_the_micro_batches() -> None:
    options = {"step_weights": "d-pace", "loss": "lk_hybrid"}
    together = step(DOCUMENTS, [list(range(12))], **options)
    assert_same_step(together, step(DOCUMENTS, [[0, 1, 2], [*range(3, 12)]], **options))


def test_a_step_takes_so_many_micro_batches_of_its_epoch() -> None:
    lengths = [len(d.ids) for d in DOCUMENTS]
    config = TrainConfig(batch_tokens=64, epochs=2)
    parts = batch_plan(config, lengths)
    steps = batch_plan(config.model_copy(update={"accumulate": 3}), lengths)
    assert [p for batch in steps for p in batch] == [batch[0] for batch in parts]
    assert len(steps[0]) == 3
    in_an_epoch = len(parts) // 2
    assert len(steps) == 2 * -(-in_an_epoch // 3), "the last of an epoch may be smaller"


def test_the_running_mean_forgets_its_start_and_then_keeps_its_decay() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(5.0)
        average = Average(model, 0.9)
        model.weight.fill_(1.0)
        average.update(0)
        assert float(average.means["weight"]) == pytest.approx(0.1 * 5 + 0.9 * 1)
        before = float(average.means["weight"])
        average.update(10_000)
        assert float(average.means["weight"]) == pytest.approx(0.9 * before + 0.1 * 1)


def test_the_time_of_a_step_is_shared_out_whole() -> None:
    clock = Clock()
    found = train_step(
        Learner(tiny_drafter(TARGET), TrainConfig(**EXACT)), DOCUMENTS, [[0, 1]], 0, 10, clock
    )
    shares = clock.report(found, 60, 1, 10).time_shares
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(share >= 0 for share in shares.values()), shares
    assert shares["forward_backward"] > shares["exchange"]
