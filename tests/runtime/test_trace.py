"""A trace is what Chrome and Perfetto read: spans that lie inside of one another, with figures."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from runtime.generator import Completion, Generator
from runtime.trace import Trace, trace_file
from runtime.tree import TreeConfig
from tests.runtime.test_generator import TinyTokenizer
from tests.runtime.tiny_engines import tiny

PROMPT = [3, 5, 7, 2]
TREE = TreeConfig(depth=3, width=2, budget=4)
PARTS = {"extend", "tree", "verify", "accept", "commit", "detokenise"}

Event = dict[str, Any]


def answer(trace: Trace | None, *, speculate: bool = True) -> Completion:
    made = tiny(1, noise=0.3)
    generator = Generator(made.target, made.drafter, TinyTokenizer(), tree=TREE)
    generator.track = None if trace is None else trace.track("a request")
    return generator.generate(PROMPT, max_tokens=12, speculate=speculate)


def traced(*, speculate: bool = True) -> tuple[Completion, list[Event]]:
    trace = Trace()
    found = answer(trace, speculate=speculate)
    return found, json.loads(json.dumps(trace_file(trace.events())))["traceEvents"]


def inside(outer: Event, events: list[Event]) -> list[Event]:
    """The spans that lie in `outer`, which must lie there wholly."""
    start, end = outer["ts"], outer["ts"] + outer["dur"]
    found = [e for e in events if e is not outer and start <= e["ts"] < end and e["ph"] == "X"]
    assert all(e["ts"] + e["dur"] <= end + 0.002 for e in found)  # rounded to nanoseconds
    return found


def test_events_have_the_fields_of_the_format() -> None:
    _, events = traced()
    names = [e for e in events if e["ph"] == "M"]
    assert [(e["name"], e["args"]["name"]) for e in names] == [("thread_name", "a request")]
    for event in events:
        assert event["ph"] in ("X", "M")
        assert isinstance(event["pid"], int)
        assert event["tid"] == 1
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["ts"] > 0


def test_rounds_hold_their_parts_and_do_not_overlap() -> None:
    found, events = traced()
    spans = [e for e in events if e["ph"] == "X"]
    rounds = [e for e in spans if e["name"] == "round"]
    (prompt,) = [e for e in spans if e["name"] == "prompt"]
    assert len(rounds) == found.rounds
    assert [e["name"] for e in inside(prompt, spans)] == ["prefill", "accept", "detokenise"]
    for one in rounds[:-1]:
        assert {e["name"] for e in inside(one, spans)} >= PARTS
    in_order = [prompt, *rounds]
    for before, after in pairwise(in_order):
        assert before["ts"] + before["dur"] <= after["ts"] + 0.002
    held = sum(len(inside(one, spans)) + 1 for one in in_order)
    assert held == len(spans)  # nothing lies outside


def test_steps_lie_in_the_tree_they_grow() -> None:
    _, events = traced()
    trees = [e for e in events if e["name"] == "tree"]
    steps = [e for e in events if e["name"] == "step"]
    assert steps
    assert sum(len(inside(tree, steps)) for tree in trees) == len(steps)
    assert {step["args"]["depth"] for step in steps} <= {1, 2}


def test_figures_are_those_of_the_answer() -> None:
    found, events = traced()
    rounds = [e["args"] for e in events if e["name"] == "round"]
    verified = [e["args"]["nodes"] for e in events if e["name"] == "verify"]
    assert sum(r["emitted"] for r in rounds) == len(found.token_ids) - 1
    accepted = Counter(depth for r in rounds for depth in range(r["accepted"]))
    assert [accepted[depth] for depth in range(3)] == found.accepted_at
    assert verified == [r["nodes"] + 1 for r in rounds]


def test_plain_decoding_has_no_draft() -> None:
    found, events = traced(speculate=False)
    names = Counter(e["name"] for e in events if e["ph"] == "X")
    assert names["verify"] == names["round"] == found.rounds == 11
    assert not names.keys() & {"extend", "step", "tree"}


@pytest.mark.parametrize("speculate", [True, False])
def test_watching_changes_no_token(speculate: bool) -> None:
    watched, _ = traced(speculate=speculate)
    assert watched.token_ids == answer(None, speculate=speculate).token_ids
