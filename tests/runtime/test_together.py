"""A pass for several sequences gives each what a pass of its own would give."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.base import Arrays
from runtime.cache import KeyValueCache
from runtime.slots import Slots
from runtime.target import Feeds
from runtime.together import Part, padded, run_together
from tests.runtime.tiny_engines import Tiny, tiny

MODEL = tiny(0, kind="random", max_context=200)


def cached(layers: int, size: int, length: int, random: np.random.Generator) -> KeyValueCache:
    cache = KeyValueCache(layers, size, 200)
    cache.commit(random.standard_normal((2 * layers, length, size), dtype=np.float32))
    return cache


def tree_mask(count: int, seen: int, random: np.random.Generator) -> npt.NDArray[np.bool_]:
    among = np.tri(count, dtype=np.bool_) & (random.random((count, count)) < 0.7)
    among |= np.eye(count, dtype=np.bool_)
    return np.concatenate((np.ones((count, seen), np.bool_), among), axis=1)[None, None]


def feeds_of(model: Tiny, graph: str, steps: int, length: int, seed: int) -> Feeds:
    """Random inputs of one sequence."""
    random = np.random.default_rng(seed)
    width = {"taps": 48, "parent_state": 16}
    feeds: Feeds = {}
    for spec in model.engines[graph].contract.inputs:
        if spec.name in width:
            shape = (1, steps, width[spec.name])
            feeds[spec.name] = random.standard_normal(shape, dtype=np.float32)
        elif spec.name == "attention_mask":
            feeds[spec.name] = tree_mask(steps, length, random)
        elif spec.name == "rows":
            feeds[spec.name] = np.sort(random.integers(0, steps, (1, 1 + seed % steps)))
        elif not spec.name.startswith("past_"):
            feeds[spec.name] = random.integers(0, 24, (1, steps))
    return feeds


sizes = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 70)), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(sizes=sizes, graph=st.sampled_from(["target", "extend", "step"]), order=st.randoms())
def test_each_gets_what_it_would_get_alone(
    sizes: list[tuple[int, int]], graph: str, order: st.DataObject
) -> None:
    engine = MODEL.engines[graph]
    layers = sum(name.startswith("past_key") for name in engine.input_names)
    size = next(s.axes[-1] for s in engine.contract.inputs if s.name == "past_key_0")
    assert isinstance(size, int)
    slots = Slots(layers, size, 6, 200)
    alone: list[Arrays] = []
    parts: list[Part] = []
    for seed, (steps, length) in enumerate(sizes):
        cache = cached(layers, size, length, np.random.default_rng(seed))
        feeds = feeds_of(MODEL, graph, steps, length, seed)
        outputs = engine.decode(feeds, cache.past())
        alone.append({name: array.copy() for name, array in outputs.items()})
        parts.append(Part(feeds, slots.join(cache)))
    chosen = [i for i in range(len(sizes)) if len(sizes) == 1 or i != len(sizes) // 2]
    order.shuffle(chosen)  # type: ignore[attr-defined]
    for i, found in zip(chosen, run_together(engine, [parts[i] for i in chosen]), strict=True):
        for name, expected in alone[i].items():
            assert found[name].shape == expected.shape
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-4)


def test_a_padded_token_attends_itself_only_and_nobody_attends_it() -> None:
    slots = Slots(1, 2, 3, 100)
    parts = []
    for steps, length in ((2, 3), (1, 0)):
        cache = cached(1, 2, length, np.random.default_rng(0))
        mask = np.ones((1, 1, steps, length + steps), np.bool_)
        parts.append(
            Part(
                {"input_ids": np.ones((1, steps), np.int64), "attention_mask": mask},
                slots.join(cache),
            )
        )
    mask = padded(parts, [0, 2], batch=3, capacity=5)["attention_mask"][:, 0]
    assert torch.from_numpy(mask).int().tolist() == [
        [[1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 1, 1]],
        [[0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1]],  # a slot that takes no part
        [[0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1]],
    ]


def test_one_alone_is_not_padded() -> None:
    slots = Slots(MODEL.decoder.config.num_layers, MODEL.decoder.config.kv_size, 3, 200)
    caches = [cached(3, 8, length, np.random.default_rng(length)) for length in (50, 7)]
    _, short = [slots.join(cache) for cache in caches]
    run_together(MODEL.engines["target"], [Part(feeds_of(MODEL, "target", 2, 7, 0), short)])
    assert MODEL.engines["target"].calls[-1]["past_key_0"].shape == (1, 7, 8)


@pytest.mark.parametrize("graph", ["target", "extend", "step"])
def test_rows_of_old_members_are_never_seen(graph: str) -> None:
    """Whatever finite rows lie where a short member has none, its outputs are the same bits."""
    engine = MODEL.engines[graph]
    layers = sum(name.startswith("past_key") for name in engine.input_names)
    size = next(s.axes[-1] for s in engine.contract.inputs if s.name == "past_key_0")
    assert isinstance(size, int)
    slots = Slots(layers, size, 3, 200)
    parts = []
    for length in (40, 9):
        cache = cached(layers, size, length, np.random.default_rng(length))
        parts.append(Part(feeds_of(MODEL, graph, 3, length, 1), slots.join(cache)))
    before = {k: v.copy() for k, v in run_together(engine, parts)[1].items()}
    slots.block[:, 1, 9:] = 1e6
    for name, array in run_together(engine, parts)[1].items():
        np.testing.assert_array_equal(array, before[name])
