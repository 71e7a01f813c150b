"""ONNX Runtime sessions: bound to the caller's memory, outputs in their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from drafter.errors import UsageError
from engines import Engine, EngineSet, open_engines
from engines.base import CachedRows, decode_by_run
from engines.cases import Feeds, make_cases
from engines.onnxruntime import OnnxRuntimeEngine
from engines.torch_backend import TorchEngine, torch_engines
from export.contract import TORCH_DTYPES, target_contract
from tests.engines.conftest import Source

SIZES = {"B": 1, "T": 3, "P": 4, "R": 2}


def target_feeds(source: Source, **sizes: int) -> Feeds:
    """Zeros, with a mask that lets everything be seen."""
    config = source.target.config
    contract = target_contract(config, len(source.target.taps))
    shapes = {s.name: (s.shape(SIZES | sizes), TORCH_DTYPES[s.dtype]) for s in contract.inputs}
    feeds = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    feeds["attention_mask"].fill_(True)
    return feeds


def copied(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs that outlive the next run."""
    return {name: tensor.clone() for name, tensor in outputs.items()}


def reference(source: Source) -> dict[str, TorchEngine]:
    """The same graphs in PyTorch."""
    return dict(torch_engines(source.target, source.drafter))  # type: ignore[arg-type]


def test_engines_are_named_as_their_graphs_and_tensors(source: Source, engines: EngineSet) -> None:
    names = [engine.name for engine in (engines.target, engines.extend, engines.step)]
    assert names == ["target", "drafter_extend", "drafter_step"]
    assert engines.step.input_names[:2] == ("input_ids", "parent_state")
    assert set(engines.target.run(target_feeds(source))) == set(engines.target.output_names)


def test_a_prefix_of_a_longer_buffer_is_read_where_it_lies(
    source: Source, engines: EngineSet
) -> None:
    feeds = target_feeds(source)
    buffer = torch.zeros(1, 50, source.target.config.kv_size)
    feeds["past_value_1"] = buffer[:, :4]
    before = copied(engines.target.run(feeds))
    buffer[:, :4] = torch.randn(4, source.target.config.kv_size)
    after = engines.target.run(feeds)
    expected = reference(source)["target"].run(feeds)
    assert not torch.equal(before["logits"], after["logits"])
    torch.testing.assert_close(after["logits"], expected["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        after["new_key_1"], before["new_key_1"]
    )  # made before layer 1 attends


def test_outputs_live_in_memory_that_is_used_again(source: Source, engines: EngineSet) -> None:
    feeds = target_feeds(source)
    first = engines.target.run(feeds)["logits"]
    kept = first.clone()
    feeds["input_ids"] += 1
    second = engines.target.run(feeds)["logits"]
    assert second.data_ptr() == first.data_ptr()
    assert not torch.equal(kept, second)


@pytest.mark.parametrize(
    "sizes",
    [{"T": 1, "R": 1}, {"T": 9, "R": 9}, {"B": 4}, {"P": 0}, {"P": 40, "R": 3}, {"T": 2}],
)
def test_sizes_may_change_from_run_to_run(
    source: Source, engines: EngineSet, sizes: dict[str, int]
) -> None:
    for wanted in (sizes, {}, sizes):
        feeds = target_feeds(source, **wanted)
        feeds["input_ids"] += torch.arange(feeds["input_ids"].shape[1])
        expected = reference(source)["target"].run(feeds)
        found = engines.target.run(feeds)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=2e-4)


def test_more_sizes_than_are_kept_are_no_problem(source: Source, engines: EngineSet) -> None:
    for length in range(1, 70):
        feeds = target_feeds(source, T=length, R=1)
        assert engines.target.run(feeds)["taps"].shape[1] == length
    torch.testing.assert_close(
        engines.target.run(feeds)["logits"],
        reference(source)["target"].run(feeds)["logits"],
        atol=2e-4,
        rtol=0,
    )


def test_all_graphs_agree_with_pytorch_in_every_case(source: Source, engines: EngineSet) -> None:
    expected = torch_engines(source.target, source.drafter)
    opened: dict[str, Engine] = dict(engines.engines)
    for case in make_cases(expected, *source.configs, batches=(1, 2), prefixes=(4,)):
        wanted, found = expected[case.graph].run(case.feeds), opened[case.graph].run(case.feeds)
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("past_key_0", lambda t: t.double(), "'past_key_0' is torch.float64"),
        ("past_key_0", lambda t: t.mT.contiguous().mT, "'past_key_0' is not contiguous"),
        ("past_key_0", lambda t: t[:, :2].contiguous(), r"'past_value_0' is .* must be .* \[1, 2"),
        (
            "attention_mask",
            lambda t: t[..., :-1].contiguous(),
            r"must be cached rows \+ new tokens",
        ),
        ("rows", lambda t: t.int(), "'rows' is torch.int32"),
    ],
)
def test_a_feed_that_breaks_the_contract_is_named(
    source: Source, engines: EngineSet, name: str, change: object, message: str
) -> None:
    feeds = target_feeds(source)
    feeds[name] = change(feeds[name])  # type: ignore[operator]
    with pytest.raises(UsageError, match=message):
        engines.target.run(feeds)


def test_a_missing_feed_is_named(source: Source, engines: EngineSet) -> None:
    feeds = target_feeds(source)
    del feeds["past_value_2"]
    with pytest.raises(UsageError, match="needs the input 'past_value_2'"):
        engines.target.run(feeds)


@pytest.mark.parametrize("length", [0, 1, 6])
@pytest.mark.parametrize("batch", [1, 3])
def test_decode_equals_its_readable_form(
    source: Source, engines: EngineSet, batch: int, length: int
) -> None:
    """The same rows from one block, and the new ones in one block, in the contract's order; of one
    sequence a prefix, of several a range of slots.
    """
    opened: dict[str, Engine] = dict(engines.engines)
    for case in make_cases(
        torch_engines(source.target, source.drafter),
        *source.configs,
        batches=(batch,),
        prefixes=(4,),
    ):
        engine = opened[case.graph]
        cached = [n for n in engine.input_names if n.startswith("past_")]
        steps, size = case.feeds["input_ids"].shape[1], case.feeds[cached[0]].shape[2]
        random = np.random.default_rng(length)
        block = random.standard_normal((len(cached), 9, size), dtype=np.float32)
        if batch > 1:
            shape = (len(cached), batch + 2, length, size)
            block = random.standard_normal(shape, dtype=np.float32)[:, 1:-1]
        feeds = {n: case.feeds[n].numpy() for n in engine.input_names if n not in cached}
        feeds["attention_mask"] = np.ones((batch, 1, steps, length + steps), dtype=np.bool_)
        past = CachedRows(block, length)
        expected = {n: array.copy() for n, array in decode_by_run(engine, feeds, past).items()}
        found = engine.decode(feeds, past)
        assert set(found) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def test_decode_names_a_feed_of_the_wrong_size(source: Source, engines: EngineSet) -> None:
    feeds = {n: t.numpy() for n, t in target_feeds(source).items() if not n.startswith("past_")}
    size, layers = source.target.config.kv_size, source.target.config.num_layers
    block = np.zeros((2 * layers, 9, size), np.float32)
    with pytest.raises(UsageError, match="attention_mask"):
        engines.target.decode(feeds, CachedRows(block, 5))  # P is 4
    several = np.zeros((2 * layers, 2, 4, size), np.float32)
    wrongs = [(block[:-1], 4), (block, 10), (block.astype(np.float64), 4)]
    wrongs += [(several, 4), (several[:, :, :3], 3), (several[:, :1], 3)]
    for wrong, length in wrongs:
        with pytest.raises(UsageError, match="cached rows are"):
            engines.target.decode(feeds, CachedRows(wrong, length))
    few = {name: array for name, array in feeds.items() if name != "rows"}
    with pytest.raises(UsageError, match="needs the input 'rows'"):
        engines.target.decode(few, CachedRows(block, 4))
    narrow = feeds | {"position_ids": feeds["position_ids"].astype(np.int32)}
    with pytest.raises(UsageError, match="position_ids"):
        engines.target.decode(narrow, CachedRows(block, 4))


def test_outputs_of_a_tree_are_allocated_once_whatever_its_size(
    source: Source, engine_dir: Path
) -> None:
    engine = open_engines(engine_dir, threads=1).target
    assert isinstance(engine, OnnxRuntimeEngine)
    for steps in (1, 17, 5, 1, 32):
        engine.run(target_feeds(source, T=steps, R=steps))
    assert engine.allocations == 3  # logits, taps, the new rows of all layers
