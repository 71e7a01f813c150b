"""A tree's logits are those of its paths; a committed path is as if it were in the prompt."""

from __future__ import annotations

import numpy as np

from runtime.tree import DraftTree
from tests.runtime.tiny_engines import full_pass, tiny

PROMPT = [1, 2, 3, 5, 2, 7]
TREE = DraftTree(
    tokens=[4, 8, 9, 1, 8, 2],
    parents=[-1, 0, 0, 1, 2, 4],
    depths=[0, 1, 1, 2, 2, 3],
    scores=[0.0] * 6,
)


def test_each_node_sees_the_prefix_and_its_own_path() -> None:
    model = tiny(2)
    model.target.prefill(PROMPT)
    logits = model.target.verify(TREE)
    for node in range(len(TREE)):
        path = [TREE.tokens[step] for step in [0, *TREE.path(node)]]
        expected = full_pass(model.decoder, PROMPT + path)[0][-1]
        np.testing.assert_allclose(logits[node], expected, rtol=1e-3, atol=1e-4)


def test_commit_keeps_the_path_and_returns_its_taps() -> None:
    model = tiny(2)
    model.target.prefill(PROMPT)
    model.target.verify(TREE)
    taps = model.target.commit([0, 2, 4])
    text = [*PROMPT, 4, 9, 8]
    _, expected_taps, _ = full_pass(model.decoder, text)
    np.testing.assert_allclose(taps[0], expected_taps[-3:], rtol=1e-3, atol=1e-4)
    assert model.target.length == len(text)
    logits = model.target.verify(DraftTree.root_only(3))
    expected = full_pass(model.decoder, [*text, 3])[0][-1]
    np.testing.assert_allclose(logits[0], expected, rtol=1e-3, atol=1e-4)


def test_prefill_in_chunks_equals_prefill_at_once() -> None:
    model = tiny(2)
    chunks = [model.target.prefill(part) for part in (PROMPT[:1], PROMPT[1:4], PROMPT[4:])]
    expected_logits, expected_taps, _ = full_pass(model.decoder, PROMPT)
    np.testing.assert_allclose(chunks[-1].logits, expected_logits[-1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(chunks[-1].taps[0], expected_taps[4:], rtol=1e-3, atol=1e-4)


def test_truncate_goes_back() -> None:
    model = tiny(2)
    model.target.prefill(PROMPT)
    first = model.target.verify(TREE).copy()
    model.target.commit([0, 1])
    model.target.truncate(len(PROMPT))
    np.testing.assert_allclose(model.target.verify(TREE), first, rtol=1e-4, atol=1e-5)
