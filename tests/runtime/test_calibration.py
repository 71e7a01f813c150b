"""Measuring what passes cost: patience ends it, and small drafters can be measured."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import cast

import pytest

from engines.base import EngineSet
from runtime import calibration
from runtime.calibration import Timing
from tests.runtime.tiny_engines import tiny


@pytest.mark.parametrize("patience", [0.0, 0.35])
def test_it_ends_with_patience_once_every_pass_was_timed_twice(
    patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten passes of 10 ms or more: the third time round takes longer than there is patience."""
    monkeypatch.setattr(calibration, "PATIENCE", patience)
    timings = [Timing(lambda: time.sleep(0.01)) for _ in range(10)]
    calibration._time(timings, lambda _what, _share: None)
    counts = [len(timing.seconds) for timing in timings]
    assert min(counts) == 2
    assert max(counts) <= 3


def test_our_own_code_is_timed_with_a_drafter_of_few_candidates() -> None:
    model = tiny(1, top_k=2)
    config = model.decoder.config
    manifest = SimpleNamespace(
        target=config,
        drafter=model.drafter_config,
        max_context=model.target.max_context,
        vocab_size=config.vocab_size,
    )
    engines = cast("EngineSet", SimpleNamespace(manifest=manifest, **model.engines))
    assert min(calibration._own_seconds(engines)) > 0
