"""Progress: on standard error only, not too often, harmless to what it shows."""

from __future__ import annotations

import pytest

from pipeline import progress as module
from pipeline.progress import note, progress


def test_lines_say_what_is_new_and_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    with progress("export") as tell:
        tell("target", 0.25)
        tell("target", 0.5)
        tell("drafter", None)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["export: target (25%)", "export: drafter"]
    assert captured.out == ""


def test_a_fast_step_prints_one_line_not_hundreds(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("capture") as tell:
        for done in range(500):
            tell(f"{done} tokens", done / 500)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_brackets_in_names_are_text_and_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    note("a folder called [red] and [/]")
    assert capsys.readouterr().err == "a folder called [red] and [/]\n"


def test_on_a_terminal_a_bar_is_drawn_and_errors_pass_through(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes standard error for a terminal

    def stopped() -> None:
        with progress("train [x]") as tell:
            tell("step 1", 0.1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    captured = capsys.readouterr()
    assert "train [x]: step 1" in captured.err
    assert captured.out == ""
