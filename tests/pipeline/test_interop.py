"""`pipeline export-drafter`: an artifact for another engine, with how alike the two are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.pipeline.command import assert_refused, run_command
from tests.pipeline.conftest import run_arguments


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
    rows = result.json["details"]["agreement"]
    assert [(row["matrix"], row["against"], row["states"]) for row in rows] == [
        (matrix, against, states)
        for matrix, against in (("written", "head"), ("product", "factors"), ("product", "head"))
        for states in ("normal", "prompts")
    ]
    assert rows[1]["positions"] > 20
    config = json.loads((out / "config.json").read_text())
    weights = load_file(out / "model.safetensors")
    assert weights["lm_head.weight"].shape[0] == config["draft_vocab_size"]


@pytest.mark.parametrize("layout", ["sglang", "speculators"])
def test_a_published_drafter_is_read_and_runs(
    cache: Path,
    tiny_llama_dir: Path,
    tiny_drafter_dir: Path,
    prompt_file: Path,
    tmp_path: Path,
    layout: str,
) -> None:
    """There and back: parity and identical texts are what `run` exits with 0 for."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    both = (f"--target={tiny_llama_dir}",)
    written = run_command(
        "export-drafter",
        *both,
        *(f"--drafter={tiny_drafter_dir}", f"--format={layout}", f"--out={theirs}"),
    )
    assert written.code == 0, written.err
    convention = ("--tap-ids=output",) if layout == "sglang" else ()
    read = run_command("import-drafter", theirs, *both, *convention, f"--out={ours}", "--json")
    assert read.code == 0, read.err
    assert read.json["details"]["head"] == "dense"
    arguments = run_arguments(tiny_llama_dir, ours, prompt_file, tmp_path / "report.json")
    result = run_command(*arguments)
    assert result.code == 0, result.err


def test_a_published_drafter_needs_its_convention_and_its_folder(
    cache: Path, tiny_llama_dir: Path, tiny_drafter_dir: Path, tmp_path: Path
) -> None:
    target = f"--target={tiny_llama_dir}"
    wrong = run_command("import-drafter", tmp_path, target, "--tap-ids=middle")
    assert_refused(wrong, 2, "--tap-ids", "input or output")
    assert_refused(run_command("import-drafter", tmp_path, target), 2, "no config.json")


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
