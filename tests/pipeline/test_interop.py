"""`pipeline export-drafter`: an artifact for another engine, with how alike the two are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.pipeline.command import assert_refused, run_command


@pytest.mark.parametrize("layout", ["vllm", "sglang", "speculators"])
def test_a_drafter_is_written_for_another_engine(
    cache: Path, tiny_llama_dir: Path, tiny_drafter_dir: Path, tmp_path: Path, layout: str
) -> None:
    out = tmp_path / "out"
    result = run_command(
        "export-drafter",
        f"--target={tiny_llama_dir}",
        f"--drafter={tiny_drafter_dir}",
        f"--format={layout}",
        "--precision=fp32",
        f"--out={out}",
        "--json",
    )
    assert result.code == 0, result.err
    assert result.json["path"] == str(out)
    assert 0.0 < result.json["details"]["top_8_agreement"] <= 1.0
    assert result.json["details"]["positions"] > 20
    config = json.loads((out / "config.json").read_text())
    weights = load_file(out / "model.safetensors")
    assert weights["lm_head.weight"].shape[0] == config["draft_vocab_size"]


def test_an_unknown_format_is_one_sentence_and_leaves_nothing(
    cache: Path, tiny_llama_dir: Path, tiny_drafter_dir: Path, tmp_path: Path
) -> None:
    result = run_command(
        "export-drafter",
        f"--target={tiny_llama_dir}",
        f"--drafter={tiny_drafter_dir}",
        "--format=onnx",
        f"--out={tmp_path / 'out'}",
    )
    assert_refused(result, 2, "'onnx' is unknown", "vllm, sglang, speculators")
    assert not (tmp_path / "out").exists()
