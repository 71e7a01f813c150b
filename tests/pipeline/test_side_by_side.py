"""Several drafters of one target: opened together, they answer as each would alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from drafter.errors import UsageError
from engines.identity import target_digest
from runtime.generator import Generator
from runtime.side_by_side import load_side_by_side
from tests.pipeline.conftest import build_tiny_engine
from tests.tiny_llama import write_tiny_llama


def test_drafters_share_the_target_and_answer_as_they_do_alone(three_engines: list[Path]) -> None:
    together = load_side_by_side(three_engines, threads=1)
    for folder, shared in zip(three_engines, together, strict=True):
        alone = Generator.load(folder, threads=1)
        one, other = (
            generator.generate("A tree", max_tokens=12, temperature=1.0, seed=3)
            for generator in (alone, shared)
        )
        assert one.token_ids == other.token_ids
        assert one.acceptance_by_depth == other.acceptance_by_depth


def test_only_drafters_of_the_same_taps_share_a_target(three_engines: list[Path]) -> None:
    one, same, other = load_side_by_side(three_engines, threads=1)
    stream = one.stream("A tree", max_tokens=4)
    next(stream)
    with pytest.raises(UsageError, match="still answering"):
        same.generate("Another", max_tokens=2)
    assert other.generate("Another", max_tokens=2).token_ids
    stream.close()
    assert same.generate("Another", max_tokens=2).token_ids


def test_the_digest_is_of_the_target_alone(three_engines: list[Path], tmp_path: Path) -> None:
    assert len({target_digest(folder) for folder in three_engines}) == 1
    other = build_tiny_engine(tmp_path, write_tiny_llama(tmp_path / "target", seed=1))
    assert target_digest(other) != target_digest(three_engines[0])
    with pytest.raises(UsageError, match=r"another target .* than"):
        load_side_by_side([three_engines[0], other], threads=1)


@pytest.mark.parametrize(
    ("backend", "precision", "words"),
    [
        ("torch", "fp32", r"another backend \(torch\) than .* \(onnxruntime\)"),
        ("onnxruntime", "int8", r"another target precision \(int8\) than .* \(fp32\)"),
    ],
)
def test_one_target_run_in_two_manners_is_refused(
    three_engines: list[Path],
    tiny_llama_dir: Path,
    tmp_path: Path,
    backend: str,
    precision: str,
    words: str,
) -> None:
    """Else the first folder's target would run for both, and the report name one manner."""
    other = build_tiny_engine(tmp_path, tiny_llama_dir, backend, precision)
    with pytest.raises(UsageError, match=words):
        load_side_by_side([three_engines[0], other], threads=1)
