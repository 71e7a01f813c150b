"""Figures of a request: what counts and what does not."""

from __future__ import annotations

import pytest

from runtime.stats import RoundStats, Tally, Work


def tally_of(*passes: RoundStats, depth: int = 3) -> Tally:
    tally = Tally(depth=depth)
    for stats in passes:
        tally.add(stats)
    return tally


PROMPT = RoundStats(1, 0, 0, draft_s=0.5, verify_s=2.0, overhead_s=0.25, prompt=True)


def test_tau_counts_the_bonus_token_but_not_the_prompts_pass() -> None:
    tally = tally_of(PROMPT, RoundStats(3, 2, 8, 1, 2, 3), RoundStats(2, 1, 8, 1, 2, 3))
    assert (tally.tokens, tally.rounds, tally.target_passes) == (6, 2, 3)
    assert tally.tau == 2.5
    assert tally.tokens == 1 + tally.tau * tally.rounds


def test_acceptance_by_depth_is_a_share_of_the_rounds() -> None:
    tally = tally_of(PROMPT, *(RoundStats(n + 1, n, 8, 0, 0, 0) for n in (0, 1, 1, 2)))
    assert tally.acceptance_by_depth == [0.75, 0.25, 0.0]


@pytest.mark.parametrize(("emitted", "accepted"), [(5, 4), (4, 4), (2, 2), (1, 1)])
def test_what_a_stop_string_cut_off_was_not_accepted(emitted: int, accepted: int) -> None:
    trimmed = RoundStats(5, 4, 8, 1, 2, 3).trimmed(emitted, text_s=0.5)
    assert (trimmed.emitted, trimmed.accepted, trimmed.drafted) == (emitted, accepted, 8)
    assert (trimmed.overhead_s, trimmed.seconds) == (3.5, 6.5)


def test_times_are_kept_apart() -> None:
    tally = tally_of(PROMPT, RoundStats(3, 2, 8, 1, 2, 3), RoundStats(2, 1, 8, 10, 20, 30))
    expected = {"prefill_s": 2.75, "draft_s": 11, "verify_s": 22, "overhead_s": 33}
    assert tally.timings.as_dict() == expected
    assert tally.timings.total_s == pytest.approx(68.75)


def test_a_request_without_rounds_has_figures_too() -> None:
    tally = tally_of(PROMPT)
    assert (tally.tau, tally.acceptance_by_depth) == (1.0, [0.0, 0.0, 0.0])
    assert tally_of(PROMPT, depth=0).acceptance_by_depth == []


def test_work_is_summed_over_the_rounds_without_the_prompt() -> None:
    prompt = RoundStats(1, 0, 0, 0, 0, 0, prompt=True, work=Work(100, 100, 1))
    rounds = [RoundStats(2, 1, 8, 0, 0, 0, work=Work(9, 7, 3)) for _ in range(2)]
    assert tally_of(prompt, *rounds).work == Work(18, 14, 6)
