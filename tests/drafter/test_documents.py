"""Captured documents read when they are asked for: the same as eager ones, never all in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafter.batch_decode import Text
from drafter.capture import (
    Online,
    capture,
    capture_shards,
    captured_bytes,
    parts_of,
    read_captured,
    write_captured,
)
from drafter.corpus import (
    ShardLimits,
    StoredCorpus,
    check_tokenizer,
    documents_per_shard,
    in_shards,
    read_corpus,
    read_shard,
    write_shards,
)
from drafter.documents import Captured, Stored, lengths_of, take, texts_of, what_was_seen, with_mask
from drafter.errors import UsageError
from drafter.generate import GenerateConfig, generate_corpus
from drafter.training import TrainConfig, train
from tests.tiny_drafter import tiny_captured, tiny_documents, tiny_drafter, tiny_target

TARGET = tiny_target()
TENSORS = ("ids", "mask", "taps", "states", "likeliest")
SMALL = ShardLimits(documents=512, megabytes=0.02)


def corpus(folder: Path, count: int = 30, limits: ShardLimits = SMALL) -> Path:
    folder.mkdir()
    write_shards(folder, tiny_documents(count), limits, tokenizer="t")
    return folder


def assert_same(a: Iterable[Captured], b: Iterable[Captured]) -> None:
    for one, other in zip(a, b, strict=True):
        for name in TENSORS:
            left, right = getattr(one, name), getattr(other, name)
            assert left.dtype == right.dtype
            assert torch.equal(left, right), name


@given(
    sizes=st.lists(st.integers(1, 900), min_size=1, max_size=40),
    most=st.integers(1, 9),
    room=st.integers(1000, 5000),
)
@settings(deadline=None, max_examples=60)
def test_groups_keep_the_order_and_both_limits_and_none_could_take_one_more(
    sizes: list[int], most: int, room: int
) -> None:
    limits = ShardLimits(most, (2048 + room) / 1e6)
    groups = list(in_shards(sizes, lambda size: size, limits))
    assert [size for group in groups for size in group] == sizes
    used = [sum(size + 8 for size in group) for group in groups]
    assert all(len(group) <= most for group in groups)
    assert max(used) <= room
    for i in range(len(groups) - 1):
        assert len(groups[i]) == most or used[i] + groups[i + 1][0] + 8 > room


def test_no_file_is_larger_than_asked(tmp_path: Path) -> None:
    """Of corpora, of what is captured of them, and of what is kept while a corpus is made."""
    made = corpus(tmp_path / "corpus", 40, ShardLimits(megabytes=0.0025))
    capture_shards(TARGET, made, tmp_path / "captured", limits=SMALL)
    config = GenerateConfig(
        max_new_tokens=20, batch=4, keep_states=True, shard_megabytes=0.02, temperatures=(1.0,)
    )
    prompts = [[5 + i % 7, 6, 7, 8] for i in range(40)]
    generate_corpus(TARGET, prompts, tmp_path / "own", config, fingerprint="f")
    for folder, limit in (("corpus", 2500), ("captured", 20_000), ("own", 20_000)):
        files = [*(tmp_path / folder).rglob("*.safetensors")]
        assert len(files) > 2, folder
        assert max(path.stat().st_size for path in files) <= limit, folder
    assert len(read_corpus(tmp_path / "own")) == 40
    kept = read_captured(tmp_path / "own" / "captured", what_was_seen(TARGET.taps, "f"))
    assert [d.ids.tolist() for d in kept] == [d.ids.tolist() for d in read_corpus(tmp_path / "own")]
    assert not [*(tmp_path / "own").rglob(".*")], "the spool is gone"


def test_a_count_of_documents_bounds_files_too(tmp_path: Path) -> None:
    made = corpus(tmp_path / "corpus", 10, ShardLimits(documents=3))
    assert [len(read_shard(path)) for path in sorted(made.iterdir())] == [3, 3, 3, 1]
    assert documents_per_shard(100, ShardLimits(512, 0.01)) == (10_000 - 2048) // 508
    assert documents_per_shard(10**9, ShardLimits(512, 1.0)) == 1


def test_a_document_larger_than_a_file_may_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(UsageError, match=r"does not fit into a shard of 0\.002 MB"):
        write_shards(tmp_path / "c", tiny_documents(1), ShardLimits(megabytes=0.002))


def test_states_that_may_fit_into_no_file_are_refused_before_the_first_answer(
    tmp_path: Path,
) -> None:
    """By the longest answer there could be."""
    tokens = 3 + 40
    fits = captured_bytes(tokens, TARGET.config, TARGET.taps) + 2048 + 8

    def make(most: int, size: int) -> int:
        config = GenerateConfig(max_new_tokens=most, keep_states=True, shard_megabytes=size / 1e6)
        return generate_corpus(TARGET, [[5, 6], [5, 6, 7]], tmp_path / "c", config)

    for most, size in ((40, fits - 1), (41, fits)):
        with pytest.raises(UsageError, match=r"does not fit into a shard.*--shard-megabytes"):
            make(most, size)
        assert not (tmp_path / "c").exists()
    assert make(40, fits) > 0


def test_the_bytes_of_a_captured_document_are_those_of_its_tensors(tmp_path: Path) -> None:
    (seen,) = tiny_captured(TARGET, 1)
    path = tmp_path / "shard-00000.safetensors"
    write_captured(path, [seen], TARGET.taps, "f", "bf16")
    stored = load_file(path)
    found = sum(stored[name].nbytes for name in TENSORS)
    assert captured_bytes(len(seen.ids), TARGET.config, TARGET.taps) == found


def test_lazy_documents_are_the_eager_ones(tmp_path: Path) -> None:
    made = corpus(tmp_path / "corpus")
    capture_shards(TARGET, made, tmp_path / "captured", limits=SMALL)
    assert len([*(tmp_path / "captured").iterdir()]) > 2
    lazy, eager = read_captured(tmp_path / "captured"), list(capture(TARGET, read_corpus(made)))
    assert_same(lazy, eager)
    for one, other in zip(StoredCorpus(made), read_corpus(made), strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.mask, other.mask)
    assert list(lengths_of(lazy)) == lengths_of(eager) == [len(d.ids) for d in eager]
    assert_same(lazy[5:20][2:4], eager[7:9])
    assert_same([lazy[-1]], eager[-1:])
    assert_same(take(lazy[3:], [4, 0]), take(eager[3:], [4, 0]))
    for a, b in zip(texts_of(lazy[2:]), texts_of(eager[2:]), strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.mask, b.mask)
    with pytest.raises(IndexError):
        lazy[30]


def test_other_masks_are_seen_wherever_a_document_is_read(tmp_path: Path) -> None:
    write_captured(
        tmp_path / "shard-00000.safetensors", tiny_captured(TARGET, 4), (0,), "f", "bf16"
    )
    lazy = with_mask(read_captured(tmp_path), lambda mask: ~mask)[1:]
    for found, text, plain in zip(lazy, texts_of(lazy), read_captured(tmp_path)[1:], strict=True):
        assert torch.equal(found.mask, ~plain.mask)
        assert torch.equal(text.mask, ~plain.mask)
        assert torch.equal(found.taps, plain.taps)


class Watching(Stored):
    """Counts the documents that are in memory at a time."""

    most = 0

    def take(self, indices: Iterable[int]) -> list[Captured]:
        found = super().take(indices)
        self.alive: weakref.WeakSet[Tensor]
        alive = getattr(self, "alive", None) or weakref.WeakSet()
        for document in found:
            alive.add(document.taps)
        self.alive = alive
        self.most = max(self.most, len(alive))
        return found


def test_training_holds_one_batch_of_documents(tmp_path: Path) -> None:
    """Counted, not timed: 30 documents, two or three of them in memory."""
    config = TrainConfig(
        epochs=2,
        batch_tokens=60,
        draft_steps=2,
        sampled_rows=0,
        precision="fp32",
        supervise="all",
    )
    made = corpus(tmp_path / "corpus")
    capture_shards(TARGET, made, tmp_path / "captured", limits=SMALL)
    documents = Watching(tmp_path / "captured")
    lazily = train(tiny_drafter(TARGET), documents, config, tmp_path / "lazy")
    assert 1 <= documents.most <= 8
    eager = list(read_captured(tmp_path / "captured"))
    eagerly = train(tiny_drafter(TARGET), eager, config, tmp_path / "eager")
    for name, weight in lazily.state_dict().items():
        assert torch.equal(weight, eagerly.state_dict()[name]), name


def test_making_a_corpus_holds_no_more_texts_than_are_answered_together(tmp_path: Path) -> None:
    config = GenerateConfig(max_new_tokens=12, batch=4, keep_states=True, temperatures=(1.0,))
    seen: list[tuple[int, int]] = []

    def count(*_: int) -> None:
        objects = gc.get_objects()
        kept = [o for o in objects if type(o) is Text and o.seen]
        seen.append((len(kept), sum(type(o) is Captured for o in objects)))

    gc.collect()
    before = sum(type(o) is Captured for o in gc.get_objects())
    generate_corpus(TARGET, [[5, 6, 7]] * 24, tmp_path, config, count)
    assert len(seen) == 24
    assert max(texts for texts, _ in seen) <= 4 + 1
    assert max(documents for _, documents in seen) <= before + 1


def test_a_killed_capture_goes_on_in_the_middle_of_a_shard_to_the_same_bits(
    tmp_path: Path,
) -> None:
    """The windows of like length stay where they were, so that no last bit differs."""
    made = corpus(tmp_path / "corpus", 100, ShardLimits())
    (shard,) = made.iterdir()
    for name in ("whole", "parts"):
        capture_shards(TARGET, made, tmp_path / name, fingerprint="f", limits=SMALL)
    parts = parts_of(tmp_path / "parts", shard)
    assert len(parts) > 4
    stamp = parts[0].stat().st_mtime_ns
    for path in parts[2:]:
        path.unlink()
    done: list[int] = []
    capture_shards(
        TARGET,
        made,
        tmp_path / "parts",
        lambda count, total: done.append(count),
        fingerprint="f",
        limits=SMALL,
    )
    assert done[0] > sum(read_captured(tmp_path / "parts").lengths[:5])
    assert done[-1] == sum(len(d.ids) for d in read_shard(shard))
    assert parts[0].stat().st_mtime_ns == stamp
    assert {path.name for path in parts} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert_same(read_captured(tmp_path / "parts"), read_captured(tmp_path / "whole"))
    parts[1].unlink()
    with pytest.raises(UsageError, match="is not captured from"):
        capture_shards(TARGET, made, tmp_path / "parts", limits=SMALL)


def test_a_capture_of_a_larger_corpus_is_refused(tmp_path: Path) -> None:
    write_captured(
        tmp_path / "shard-00000.safetensors", tiny_captured(TARGET, 9), (0,), "f", "bf16"
    )
    with pytest.raises(UsageError, match="is not captured from"):
        capture_shards(TARGET, corpus(tmp_path / "c", 4), tmp_path)


@pytest.mark.parametrize("batch", [1, 8])
def test_documents_seen_on_line_are_those_that_are_stored(batch: int, tmp_path: Path) -> None:
    """To the bit where each runs alone; else to the rounding of the company's sums."""
    made = corpus(tmp_path / "corpus")
    capture_shards(TARGET, made, tmp_path / "captured", batch=batch)
    stored = read_captured(tmp_path / "captured")
    online = Online(TARGET, StoredCorpus(made), batch)
    assert online.lengths == stored.lengths
    picked = [17, 3, 29, 4]
    if batch == 1:
        assert_same(online.take(picked), stored.take(picked))
    for a, b in zip(online.take(picked), stored.take(picked), strict=True):
        torch.testing.assert_close(a.taps, b.taps, atol=1e-3, rtol=1e-2)
        torch.testing.assert_close(a.states, b.states, atol=1e-3, rtol=1e-2)


def test_training_on_line_gives_the_drafter_of_stored_states_to_the_bit(tmp_path: Path) -> None:
    made = corpus(tmp_path / "corpus")
    capture_shards(TARGET, made, tmp_path / "captured", batch=1)
    config = TrainConfig(epochs=2, batch_tokens=90, draft_steps=2, sampled_rows=16)
    both = []
    for name, documents in (
        ("stored", read_captured(tmp_path / "captured")),
        ("online", Online(TARGET, StoredCorpus(made), batch=1)),
    ):
        both.append(train(tiny_drafter(TARGET), documents, config, tmp_path / name).state_dict())
    for name, weight in both[0].items():
        assert torch.equal(weight, both[1][name]), name


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("cut", "no readable captured shard"),
        ("taps", "holds no taps"),
        ("short", "unlike numbers of tokens"),
        ("offsets", "offsets do not divide"),
    ],
)
def test_a_damaged_captured_shard_is_one_sentence(damage: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.safetensors"
    write_captured(path, tiny_captured(TARGET, 3), (0,), "f", "bf16")
    tensors = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "taps":
        save_file({k: v for k, v in tensors.items() if k != "taps"}, path)
    elif damage == "short":
        save_file(tensors | {"states": tensors["states"][1:].contiguous()}, path)
    else:
        save_file(tensors | {"offsets": tensors["offsets"] + 1}, path)
    with pytest.raises(UsageError, match=rf"{words}.*remove it and run the same command again"):
        read_captured(tmp_path)


def test_states_of_other_taps_or_another_target_are_refused(tmp_path: Path) -> None:
    write_captured(
        tmp_path / "shard-00000.safetensors", tiny_captured(TARGET, 3), (0, 1), "f", "bf16"
    )
    assert len(read_captured(tmp_path, what_was_seen((0, 1), "f"))) == 3
    for seen in (what_was_seen((0, 2), "f"), what_was_seen((0, 1), "g")):
        with pytest.raises(UsageError, match=r"holds taps \[0, 1\] of target f"):
            read_captured(tmp_path, seen)


def test_a_damaged_corpus_shard_is_one_sentence(tmp_path: Path) -> None:
    made = corpus(tmp_path / "corpus")
    path = sorted(made.iterdir())[0]
    tensors = load_file(path)
    save_file(tensors | {"offsets": tensors["offsets"].flip(0)}, path)
    with pytest.raises(UsageError, match=f"{path} is no readable corpus shard"):
        read_corpus(made)
    path.write_bytes(path.read_bytes()[:-3])
    for read in (read_corpus, StoredCorpus, lambda folder: check_tokenizer(folder, "t")):
        with pytest.raises(UsageError, match=f"{path} is no readable corpus shard"):
            read(made)


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    made = corpus(tmp_path / "corpus")
    check_tokenizer(made, "t")
    with pytest.raises(UsageError, match=r"of another tokenizer \(t.*pipeline corpus"):
        check_tokenizer(made, "u")
    (tmp_path / "silent").mkdir()
    write_shards(tmp_path / "silent", tiny_documents(3))
    check_tokenizer(tmp_path / "silent", "u")
