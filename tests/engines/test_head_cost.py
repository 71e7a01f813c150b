"""The bytes that docs/heads.md promises are those that the engines count."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from drafter.config import DrafterConfig, RopeConfig
from engines.base import head_cost

PAGE = Path(__file__).parents[2] / "docs" / "heads.md"
TARGETS = ((49_152, 576), (151_936, 896))
HEADS = {
    "`dense`, `target`": ("dense", None, 0),
    "`truncated`, a quarter": ("truncated", None, 0),
    "`low_rank`, d/4": ("low_rank", 4, 0),
    "`low_rank`, d/8": ("low_rank", 8, 0),
    "`low_rank`, d/8, rescore 128": ("low_rank", 8, 128),
    "`low_rank`, d/16": ("low_rank", 16, 0),
    "`low_rank`, d/16, rescore 128": ("low_rank", 16, 128),
}


def config(vocab: int, size: int, head: str, divisor: int | None, rescore: int) -> DrafterConfig:
    """A drafter of the target's width; nothing but its head matters here."""
    return DrafterConfig(
        target_hidden_size=size,
        hidden_size=size,
        intermediate_size=size,
        num_heads=8,
        num_kv_heads=8,
        head_dim=size // 8,
        vocab_size=vocab,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        taps=(0, 1, 2),
        target_layers=3,
        head=head,
        lm_head_rank=size // divisor if divisor else None,
        rescore=rescore,
        draft_vocab_size=vocab // 4 if head == "truncated" else None,
    )


@pytest.mark.parametrize("name", HEADS)
def test_the_table_of_bytes_is_what_engines_count(name: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {re.escape(name)} \| (\d.*) \|$", page, re.MULTILINE)
    rounded = "int8-factors" if "low_rank" in name else "int8-drafter"
    counted = [
        head_cost(config(vocab, size, *HEADS[name]), precision).bytes
        for vocab, size in TARGETS
        for precision in ("fp32", rounded)
    ]
    assert row.split(" | ") == [f"{count / 1e6:.2f}" for count in counted]


def test_a_precision_rounds_what_it_names_and_rescored_rows_never() -> None:
    """d = 64, r = 8, V = 1000, m = 100, 2 states: 36 bytes a block of 32."""
    rescored = config(1000, 64, "low_rank", 8, 100)
    rows = 2 * 100 * 64 * 4
    wanted = {
        "fp32": 4 * 8 * (64 + 1000) + rows,
        "int8-preview": 4 * 8 * 64 + 36 * 1000 + rows,
        "int8-factors": 36 * (8 * 2 + 1000) + rows,
        "int8-drafter": 36 * (8 * 2 + 1000) + rows,
    }
    for precision, read in wanted.items():
        assert head_cost(rescored, precision, states=2).bytes == read, precision
