"""Training: batches, supervision, learning, and going on after a kill as if it never was."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.acceptance import expected_tau, measure_acceptance
from drafter.batches import collate, epoch_order, supervised_positions
from drafter.errors import UsageError
from drafter.heads.truncated import TruncatedHead
from drafter.losses import LOSSES
from drafter.run_state import load_state, save_state
from drafter.start import start_drafter
from drafter.train_config import TrainConfig, learning_rate
from drafter.train_log import StepReport, read_log
from drafter.training import batch_plan, train, with_prompt
from tests.tiny_drafter import VOCAB, tiny_captured, tiny_drafter, tiny_target

TARGET = tiny_target()
DOCUMENTS = tiny_captured(TARGET, 24)
FAST: dict[str, Any] = {
    "batch_tokens": 128,
    "draft_steps": 2,
    "warmup_steps": 3,
    "precision": "fp32",
    "learning_rate": 5e-3,
}


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(20, 200), st.integers(0, 5)
)
@settings(max_examples=40, deadline=None)
def test_an_epoch_holds_every_document_once_in_batches_of_bounded_size(
    lengths: list[int], tokens: int, epoch: int
) -> None:
    order = epoch_order(lengths, tokens, 7, epoch)
    assert sorted(i for batch in order for i in batch) == list(range(len(lengths)))
    for batch in order:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= tokens
    assert order == epoch_order(lengths, tokens, 7, epoch)


@pytest.mark.parametrize("steps", [1, 5, 9])
def test_a_number_of_steps_ends_the_run_wherever_a_pass_ends(steps: int) -> None:
    """The steps are those of the passes, as many as are asked for."""
    lengths = [10] * 12
    fields = FAST | {"batch_tokens": 30}
    passes = batch_plan(TrainConfig(**fields, epochs=3), lengths)
    assert len(passes) == 12
    assert batch_plan(TrainConfig(**fields, epochs=1, steps=steps), lengths) == passes[:steps]


def test_supervision_sits_on_response_tokens_that_every_step_can_reach() -> None:
    """Row 0: response at 3, 4; row 1: response at 1, which step 1 (slot j-2) cannot reach."""
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = mask[1, 1] = True
    rows, positions = supervised_positions(mask, 2)
    assert list(zip(rows.tolist(), positions.tolist(), strict=True)) == [(0, 3), (0, 4)]


def test_prompts_are_supervised_when_asked_for() -> None:
    """All but the last token, whose own mask stays: nothing may be known after it."""
    for last in (True, False):
        document = replace(DOCUMENTS[0], mask=DOCUMENTS[0].mask.clone())
        document.mask[-1] = last
        mask = with_prompt(document.mask)
        assert mask[:-1].all()
        assert bool(mask[-1]) is last
        assert not document.mask[0], "the document itself is left alone"


def test_a_document_that_teaches_nothing_is_no_obstacle(tmp_path: Path) -> None:
    """Such is an answer of one token whose states were kept while it was written."""
    silent = replace(DOCUMENTS[0], mask=torch.zeros_like(DOCUMENTS[0].mask))
    config = TrainConfig(**FAST, epochs=1)
    one = train(tiny_drafter(TARGET), [*DOCUMENTS[1:], silent], config, tmp_path / "one")
    assert [row.step for row in read_log(tmp_path / "one")] != []
    assert all(parameter.isfinite().all() for parameter in one.parameters())
    with pytest.raises(UsageError, match="batch of step 0"):
        train(tiny_drafter(TARGET), [silent], config, tmp_path / "none")


def test_supervising_all_changes_what_is_learnt(tmp_path: Path) -> None:
    states = []
    for name in ("answers", "all"):
        config = TrainConfig(**FAST, epochs=1, supervise=name)
        drafter = train(tiny_drafter(TARGET), DOCUMENTS, config, tmp_path / name, stop_after=1)
        states.append(drafter.fc.weight.detach().clone())
    assert not torch.equal(*states)


def test_padding_changes_no_supervised_state() -> None:
    """A short document beside a long one gives the loss it gives alone."""
    drafter = tiny_drafter(TARGET)
    by_length = sorted(DOCUMENTS, key=lambda d: len(d.ids))
    short, long = by_length[0], by_length[-1]
    alone = measure_acceptance(drafter, [short], 2)
    both, other = (
        measure_acceptance(drafter, [short, long], 2),
        measure_acceptance(drafter, [long], 2),
    )
    total = alone.tokens * alone.alpha[1] + other.tokens * other.alpha[1]
    assert both.tokens == alone.tokens + other.tokens
    assert both.alpha[1] * both.tokens == pytest.approx(total, rel=1e-5)


@torch.no_grad()
def test_acceptance_is_measured_by_its_definition() -> None:
    """Step 0, one document, by hand: min(p, q) summed, the target's argmax among the drafter's four
    best.
    """
    drafter = tiny_drafter(TARGET, head="target")
    document = DOCUMENTS[0]
    batch = collate([document])
    measured = measure_acceptance(drafter, [document], 1)
    none = torch.zeros(1, 0, drafter.config.kv_size)
    alphas, hits = [], []
    for j in document.mask.nonzero().squeeze(1).tolist():
        mask = torch.ones(1, 1, j, j, dtype=torch.bool).tril()
        out = drafter.extend(
            batch.ids[:, 1 : j + 1], batch.taps[:, :j], torch.arange(j)[None], mask, none, none
        )
        q = torch.softmax(drafter.head_input(out.state[0, -1]) @ TARGET.lm_head.weight.T, -1)
        p = torch.softmax(document.states[j].float() @ TARGET.lm_head.weight.T, -1)
        alphas.append(float(torch.minimum(p, q).sum()))
        hits.append(int(p.argmax()) in q.topk(4).indices.tolist())
    assert measured.alpha[0] == pytest.approx(sum(alphas) / len(alphas), rel=1e-4)
    assert measured.top4[0] == pytest.approx(sum(hits) / len(hits))


def test_expected_tau_counts_the_bonus() -> None:
    assert expected_tau([]) == 1.0
    assert expected_tau([0.5, 0.5]) == pytest.approx(1.75)


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_steps=10, final_rate=0.1)
    assert learning_rate(config, 0, 100) == pytest.approx(0.1)
    assert learning_rate(config, 9, 100) == 1.0
    assert learning_rate(config, 55, 100) == pytest.approx(0.55)
    assert learning_rate(config, 100, 100) == pytest.approx(0.1)


@pytest.mark.parametrize("loss", ["kl", "lk_hybrid"])
@pytest.mark.parametrize(
    ("head", "rescore", "gain"),
    [
        ("low_rank", 0, 0.06),
        ("low_rank", 16, 0.15),
        ("dense", 0, 0.15),
        ("target", 0, 0.15),
        ("truncated", 0, 0.08),
    ],
)
def test_training_raises_acceptance_on_what_it_saw(
    loss: str, head: str, rescore: int, gain: float, tmp_path: Path
) -> None:
    """Memorising 24 small documents: alpha must rise well above the start (less for a head of rank
    8).
    """
    size = 30 if head == "truncated" else None
    drafter = tiny_drafter(TARGET, head=head, rescore=rescore, draft_vocab_size=size)
    if isinstance(drafter.lm_head, TruncatedHead):
        drafter.lm_head.choose(torch.arange(0, 60, 2), TARGET.lm_head.weight)
    before = measure_acceptance(drafter, DOCUMENTS, 2)
    config = TrainConfig(**FAST, loss=loss, epochs=12, sampled_rows=24)
    train(drafter, DOCUMENTS, config, tmp_path)
    after = measure_acceptance(drafter, DOCUMENTS, 2)
    assert after.alpha[0] > before.alpha[0] + gain
    assert after.alpha[1] > before.alpha[1] + gain / 2


@torch.no_grad()
def test_the_preview_learns_to_rank_for_the_rescorer(tmp_path: Path) -> None:
    """With rescoring, the factors train too: their top 16 must come to hold the target's argmax."""

    def recall(drafter: Any) -> float:
        return measure_acceptance(drafter, DOCUMENTS, 1).top4[0]

    drafter = tiny_drafter(TARGET, head="low_rank", rescore=8)
    before = recall(drafter)
    with torch.enable_grad():
        train(drafter, DOCUMENTS, TrainConfig(**FAST, epochs=12, sampled_rows=24), tmp_path)
    assert recall(drafter) > before + 0.1


def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    config = TrainConfig(**FAST, epochs=2, sampled_rows=24)
    whole = train(tiny_drafter(TARGET), DOCUMENTS, config, tmp_path / "whole")
    train(tiny_drafter(TARGET), DOCUMENTS, config, tmp_path / "parts", stop_after=3)
    parts = train(tiny_drafter(TARGET, seed=9), DOCUMENTS, config, tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    logged = [row.loss for row in read_log(tmp_path / "parts")]
    assert logged == [row.loss for row in read_log(tmp_path / "whole")]


def test_the_log_of_a_killed_run_holds_each_step_once(tmp_path: Path) -> None:
    """Steps logged after the last saved state, and a line cut short, are made again."""
    config = TrainConfig(**FAST, epochs=2, sampled_rows=24)
    train(tiny_drafter(TARGET), DOCUMENTS, config, tmp_path, stop_after=2)
    log = tmp_path / "log.jsonl"
    later = json.loads(log.read_text().splitlines()[-1]) | {"step": 3}
    log.write_text(log.read_text() + json.dumps(later) + "\n" + '{"step": 4, "lo')
    train(tiny_drafter(TARGET), DOCUMENTS, config, tmp_path)
    steps = [row.step for row in read_log(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))


def test_a_gradient_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(UsageError, match="The gradient norm is nan at step 0"):
        train(tiny_drafter(TARGET), DOCUMENTS, TrainConfig(**FAST, epochs=1), tmp_path)
    assert not list(tmp_path.glob("state*")), "no broken state is saved"


def test_an_interrupt_waits_for_the_step_and_loses_nothing(tmp_path: Path) -> None:
    config = TrainConfig(**FAST, epochs=2, sampled_rows=24)
    whole = train(tiny_drafter(TARGET), DOCUMENTS, config, tmp_path / "whole")

    def interrupt(row: StepReport) -> None:
        if row.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_drafter(TARGET), DOCUMENTS, config, tmp_path / "parts", interrupt)
    assert [row.step for row in read_log(tmp_path / "parts")] == [1, 2, 3, 4]
    parts = train(tiny_drafter(TARGET), DOCUMENTS, config, tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def test_a_run_of_other_options_is_not_resumed(tmp_path: Path) -> None:
    train(tiny_drafter(TARGET), DOCUMENTS, TrainConfig(**FAST, epochs=1), tmp_path, stop_after=1)
    with pytest.raises(UsageError, match="holds a run with epochs=1, now 2"):
        train(tiny_drafter(TARGET), DOCUMENTS, TrainConfig(**FAST, epochs=2), tmp_path)


def test_a_damaged_state_is_not_resumed(tmp_path: Path) -> None:
    config = TrainConfig(**FAST, epochs=1)
    train(tiny_drafter(TARGET), DOCUMENTS, config, tmp_path, stop_after=1)
    name = json.loads((tmp_path / "state.json").read_text())["tensors"]
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(UsageError, match="missing or damaged"):
        train(tiny_drafter(TARGET), DOCUMENTS, config, tmp_path)


def test_the_state_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    train(tiny_drafter(TARGET), DOCUMENTS, TrainConfig(**FAST, epochs=1), tmp_path, stop_after=1)
    assert flushed[0] == "state-1.safetensors.partial"
    assert flushed[1] == tmp_path.name, "the folder: its names are on disk too"
    assert flushed[2].startswith(".state.json")
    assert flushed[3:] == [tmp_path.name]


def test_weights_that_are_not_finite_never_replace_a_good_state(tmp_path: Path) -> None:
    """A step can ruin the weights; its loss, finite, was that of the weights before."""
    save_state(tmp_path, {"model.w": torch.ones(2)}, {}, 3)
    with pytest.raises(UsageError, match=r"model.w is not finite after step 4; the last saved"):
        save_state(tmp_path, {"model.w": torch.tensor([1.0, float("inf")])}, {}, 4)
    saved = load_state(tmp_path, {})
    assert saved is not None
    assert saved.step == 3
    assert torch.equal(saved.part("model")["w"], torch.ones(2))


def test_a_loss_that_is_not_finite_says_what_can_be_done(tmp_path: Path) -> None:
    drafter = tiny_drafter(TARGET)
    with torch.no_grad():
        next(drafter.parameters()).fill_(float("nan"))
    told = r"The loss is nan at step 0, of documents [\d, ]+ \(counted .*lower --learning-rate"
    with pytest.raises(UsageError, match=told):
        train(drafter, DOCUMENTS, TrainConfig(**FAST, epochs=1), tmp_path)


def test_every_registered_loss_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "another", LOSSES["kl"])
    assert TrainConfig(loss="another").loss == "another"
    with pytest.raises(ValueError, match=r"should be 'kl' or 'lk_hybrid' or .* or 'another'"):
        TrainConfig(loss="mse")


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="Extra inputs"):
        TrainConfig(learnin_rate=1.0)  # type: ignore[call-arg]


def test_a_started_head_scores_with_the_target_rows_of_the_projected_state() -> None:
    states = torch.cat([d.states for d in DOCUMENTS]).float()
    config = tiny_drafter(TARGET).config
    started = start_drafter(config, TARGET, states=states)
    assert started.lm_head.up.weight.shape == (VOCAB, 8)  # type: ignore[union-attr]
    torch.testing.assert_close(
        started.lm_head.up.weight,  # type: ignore[union-attr]
        TARGET.lm_head.weight @ started.lm_head.down.weight.T,  # type: ignore[union-attr, operator]
    )


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not valid JSON"), ('{"step": 3}', "has no config")]
)
def test_a_damaged_state_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UsageError, match=words):
        load_state(tmp_path, {})
