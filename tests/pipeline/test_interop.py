"""`pipeline export-drafter` and `import-drafter`: artifacts for and from other engines, with how
alike they are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafter.artifact import read_artifact
from drafter.tokenizer import ChatTokenizer
from pipeline.prompts import own_prompts
from pipeline.stages import fetch_target
from pipeline.workspace import target_workspace
from tests.pipeline.command import Result, assert_refused, run_command
from tests.pipeline.conftest import run_arguments
from tests.tiny_llama import write_tiny_llama


@pytest.fixture
def export(cache: Path, tiny_llama_dir: Path, tiny_drafter_dir: Path, tmp_path: Path) -> Any:
    """`export-drafter` of the tiny drafter, which has a rescoring head, to `tmp_path / "out"`."""

    def command(layout: str, *more: str) -> Result:
        return run_command(
            "export-drafter",
            f"--target={tiny_llama_dir}",
            f"--drafter={tiny_drafter_dir}",
            f"--format={layout}",
            f"--out={tmp_path / 'out'}",
            *more,
        )

    return command


@pytest.mark.parametrize("layout", ["vllm", "sglang", "speculators"])
def test_a_drafter_is_written_for_another_engine(export: Any, tmp_path: Path, layout: str) -> None:
    """Three files, of which engines open two: they look for others by name, never for ours."""
    result = export(layout, "--precision=fp32", "--json")
    assert result.code == 0, result.err
    out = tmp_path / "out"
    assert result.json["path"] == str(out)
    config = json.loads((out / "config.json").read_text())
    weights = load_file(out / "model.safetensors")
    assert weights["lm_head.weight"].shape[0] == config["draft_vocab_size"]
    files = {path.name for path in out.iterdir()}
    assert files == {"config.json", "model.safetensors", "manifest.json"}


def test_how_alike_the_heads_are_is_said_and_stored(export: Any, tmp_path: Path) -> None:
    said = export("vllm", "--precision=fp32").err
    assert "same best token" in said
    assert "The product of the factors alone would name our best token at" in said
    rows = export("vllm", "--precision=fp32", "--json").json["details"]["agreement"]
    assert [(row["matrix"], row["against"], row["states"]) for row in rows] == [
        (matrix, against, states)
        for matrix, against in (("written", "head"), ("product", "factors"), ("product", "head"))
        for states in ("normal", "prompts")
    ]
    assert rows[1]["positions"] > 20
    assert read_artifact(tmp_path / "out", "eagle3").data["agreement"] == rows


def test_prompts_are_compared_on_as_the_target_reads_them(
    export: Any, tiny_llama_dir: Path
) -> None:
    """In its chat template: a drafter is never asked anything else."""
    tokenizer = ChatTokenizer.load(tiny_llama_dir)
    turns = [[{"role": "user", "content": p.text}] for p in own_prompts(8).prompts]
    wanted = sum(len(tokenizer.apply_chat_template(turn)) - 1 for turn in turns)
    rows = export("vllm", "--json").json["details"]["agreement"]
    seen = {row["states"]: row["positions"] for row in rows}
    assert seen["prompts"] == min(wanted, 2048)


def test_the_same_export_again_is_up_to_date(
    export: Any, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    assert export("vllm", "--json").json["up_to_date"] is False
    again = export("vllm", "--json").json
    assert again["up_to_date"] is True
    assert again["details"]["agreement"]
    assert export("vllm", "--precision=fp32", "--json").json["up_to_date"] is False
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])  # damaged: made anew
    assert export("vllm", "--precision=fp32", "--json").json["up_to_date"] is False
    named = export("speculators", "--verifier=org/name", "--json")
    assert named.json["up_to_date"] is False
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/name"
    assert export("speculators", "--json").json["up_to_date"] is False
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    verifier = config["speculators_config"]["verifier"]
    assert verifier == {
        "name_or_path": str(tiny_llama_dir),
        "architectures": ["LlamaForCausalLM"],
    }


def test_a_corpus_with_states_is_compared_on_too(
    export: Any, cache: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    dialogues = tmp_path / "dialogues.jsonl"
    row = '{"prompt_ids": [1, 5, 6, 7], "response_ids": [8, 9, 10, 11, 12, 2]}\n'
    dialogues.write_text(row * 10)
    run = tmp_path / "run"
    data = (f"--target={tiny_llama_dir}", f"--dialogues={dialogues}", "--epochs=1")
    shape = ("--rank=8", "--rescore=0", f"--out={tmp_path / 'd'}")
    other = run_command("train", *data, *shape, f"--run={run}", "--taps=0,1,2")
    assert other.code == 0, other.err
    wrong = export("vllm", f"--corpus={run / 'captured'}")
    assert_refused(wrong, 2, "does not hold taps [2, 4, 5]", "--keep-states")
    run = tmp_path / "run-of-this"
    assert run_command("train", *data, *shape, f"--run={run}").code == 0
    result = export("vllm", f"--corpus={run / 'captured'}", "--json")
    assert result.code == 0, result.err
    seen = {row["states"]: row["positions"] for row in result.json["details"]["agreement"]}
    assert seen["corpus"] == 10 * 9
    assert export("vllm", f"--corpus={run / 'captured'}", "--json").json["up_to_date"] is True
    assert export("vllm", "--json").json["up_to_date"] is False
    assert_refused(export("vllm", f"--corpus={tmp_path}"), 2, "holds no corpus shards")


@pytest.mark.parametrize("layout", ["sglang", "speculators"])
def test_a_published_drafter_is_read_and_runs(
    export: Any, tiny_llama_dir: Path, prompt_file: Path, tmp_path: Path, layout: str
) -> None:
    """There and back: parity and identical texts are what `run` exits with 0 for."""
    ours = tmp_path / "ours"
    written = export(layout)
    assert written.code == 0, written.err
    convention = ("--tap-ids=output",) if layout == "sglang" else ()
    reading = (tmp_path / "out", f"--target={tiny_llama_dir}", *convention, f"--out={ours}")
    read = run_command("import-drafter", *reading, "--json")
    assert read.code == 0, read.err
    assert read.json["details"]["head"] == "dense"
    assert read.json["details"]["variants"] == []
    assert read.json["up_to_date"] is False
    assert run_command("import-drafter", *reading, "--json").json["up_to_date"] is True
    arguments = run_arguments(tiny_llama_dir, ours, prompt_file, tmp_path / "report.json")
    result = run_command(*arguments)
    assert result.code == 0, result.err


def test_a_published_drafter_with_an_embedding_of_its_own_runs_and_its_cost_is_said(
    export: Any, tiny_llama_dir: Path, prompt_file: Path, tmp_path: Path
) -> None:
    """`run` compares graphs and engine with PyTorch, and the texts with plain decoding."""
    theirs, ours = tmp_path / "out", tmp_path / "ours"
    assert export("vllm").code == 0
    tensors = load_file(theirs / "model.safetensors")
    table = torch.randn(320, 32).bfloat16()
    save_file(tensors | {"embed_tokens.weight": table}, theirs / "model.safetensors")
    reading = (theirs, f"--target={tiny_llama_dir}", "--tap-ids=input", f"--out={ours}")
    read = run_command("import-drafter", *reading, "--json")
    assert read.code == 0, read.err
    assert read.json["details"]["own_embedding_bytes"] == 320 * 32 * 4
    assert "a table of its own, not the target's: 0.0 MB more" in read.err
    assert torch.equal(load_file(ours / "model.safetensors")["embed_tokens.weight"], table)
    arguments = run_arguments(tiny_llama_dir, ours, prompt_file, tmp_path / "report.json")
    result = run_command(*arguments)
    assert result.code == 0, result.err
    dialogues = tmp_path / "dialogues.jsonl"
    dialogues.write_text('{"prompt_ids": [1, 5, 6], "response_ids": [8, 9, 7, 2]}\n' * 9)
    for name, way in (("started", "--start"), ("embodied", "--body")):
        training = (f"--dialogues={dialogues}", f"{way}={ours}", "--steps=1", "--precision=fp32")
        where = (f"--run={tmp_path / f'run-{name}'}", f"--out={tmp_path / name}")
        trained = run_command("train", f"--target={tiny_llama_dir}", *training, *where)
        assert trained.code == 0, trained.err
        kept = load_file(tmp_path / name / "model.safetensors")["embed_tokens.weight"]
        assert torch.equal(kept.float(), table.half().float()), name


def test_an_import_is_made_anew_where_its_source_or_its_meaning_changed(
    export: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "out"

    def read(convention: str) -> Result:
        target = f"--target={tiny_llama_dir}"
        return run_command(
            *("import-drafter", theirs, target, f"--tap-ids={convention}"),
            *(f"--out={tmp_path / 'ours'}", "--json"),
        )

    assert export("vllm").code == 0
    assert read("input").json["details"]["taps"] == [2, 4, 5]
    assert read("output").json["details"]["taps"] == [3, 5, 6]
    assert read("output").json["up_to_date"] is True
    tensors = load_file(theirs / "model.safetensors")
    save_file(tensors | {"norm.weight": tensors["norm.weight"] * 2}, theirs / "model.safetensors")
    assert read("output").json["up_to_date"] is False
    assert read("output").json["up_to_date"] is True


def test_an_import_leaves_the_trained_drafter_alone(
    export: Any, cache: Path, tiny_llama_dir: Path, tiny_drafter_dir: Path, tmp_path: Path
) -> None:
    assert export("vllm").code == 0
    workspace = target_workspace(fetch_target(str(tiny_llama_dir)))
    shutil.copytree(tiny_drafter_dir, workspace / "drafter")
    trained = read_artifact(workspace / "drafter", "drafter")
    target = f"--target={tiny_llama_dir}"
    read = run_command("import-drafter", tmp_path / "out", target, "--tap-ids=input")
    assert read.code == 0, read.err
    assert Path(read.out.strip()) == (workspace / "drafter-imported").resolve()
    assert read_artifact(workspace / "drafter", "drafter") == trained


def test_an_import_keeps_weights_of_several_dtypes_to_the_bit(
    export: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """float16 and bfloat16 are equally wide, and neither holds the other's values."""
    theirs, ours = tmp_path / "out", tmp_path / "ours"
    assert export("vllm", "--precision=fp32").code == 0
    tensors = load_file(theirs / "model.safetensors")
    mixed = {n: t.to(torch.bfloat16 if "norm" in n else torch.float16) for n, t in tensors.items()}
    mixed["norm.weight"] = mixed["norm.weight"] * 2.0**17  # more than float16 holds
    mixed["fc.weight"][0, 0] = 1 + 2.0**-10  # finer than bfloat16
    save_file(mixed, theirs / "model.safetensors")
    reading = ("import-drafter", theirs, f"--target={tiny_llama_dir}", "--tap-ids=input")
    result = run_command(*reading, f"--out={ours}")
    assert result.code == 0, result.err
    kept = load_file(ours / "model.safetensors")
    for name, tensor in mixed.items():
        assert torch.equal(kept[name], tensor.float()), name


def test_a_drafter_of_another_target_is_neither_imported_nor_started_from(
    export: Any, cache: Path, tiny_drafter_dir: Path, tmp_path: Path
) -> None:
    assert export("vllm").code == 0
    deeper = write_tiny_llama(tmp_path / "deeper", num_hidden_layers=9)
    wider = write_tiny_llama(tmp_path / "wider", hidden_size=48, num_attention_heads=6)
    out = f"--out={tmp_path / 'ours'}"
    read = run_command("import-drafter", tmp_path / "out", f"--target={wider}", out)
    assert_refused(read, 2, "drafts for another target", "target_hidden_size is 32", "is 48")
    dialogues = tmp_path / "dialogues.jsonl"
    dialogues.write_text('{"prompt_ids": [1, 5, 6], "response_ids": [8, 9, 2]}\n' * 9)
    for target, field in ((deeper, "target_layers is 8"), (wider, "target_hidden_size is 32")):
        started = run_command(
            *("train", f"--target={target}", f"--dialogues={dialogues}", out),
            f"--start={tiny_drafter_dir}",
        )
        assert_refused(started, 2, "trained for another target", field, "pipeline train")
    assert not (tmp_path / "ours").exists()


def test_a_drafter_of_another_rank_is_neither_imported_nor_started_from(
    cache: Path, tiny_llama_dir: Path, tiny_drafter_dir: Path, tmp_path: Path
) -> None:
    """One whose config says another rank than its weights have, and a rank given for `--start`."""
    dialogues = tmp_path / "dialogues.jsonl"
    dialogues.write_text('{"prompt_ids": [1, 5, 6], "response_ids": [8, 9, 2]}\n' * 9)
    both = (f"--target={tiny_llama_dir}", f"--out={tmp_path / 'ours'}")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    config = json.loads((tiny_drafter_dir / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"lm_head_rank": 4}))
    (wrong / "model.safetensors").write_bytes((tiny_drafter_dir / "model.safetensors").read_bytes())
    given = (f"--dialogues={dialogues}", f"--start={wrong}")
    assert_refused(run_command("train", *both, *given), 2, "lm_head", "[8, 32]", "needs [4, 32]")
    assert not list(cache.rglob("captured"))  # refused before the work
    assert_refused(run_command("train", *both, *given, "--rank=16"), 2, "--rank", "--start")
    assert_refused(run_command("import-drafter", wrong, *both), 2, "a drafter of ours", "--drafter")
    assert not (tmp_path / "ours").exists()


def test_a_published_drafter_needs_its_conventions_and_its_folder(
    cache: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    target = f"--target={tiny_llama_dir}"
    wrong = run_command("import-drafter", tmp_path, target, "--tap-ids=middle")
    assert_refused(wrong, 2, "--tap-ids", "input or output")
    wrong = run_command("import-drafter", tmp_path, target, "--norm-output=twice")
    assert_refused(wrong, 2, "--norm-output", "fed-back or head")
    assert_refused(run_command("import-drafter", tmp_path, target), 2, "no config.json")


def test_what_a_format_does_not_have_is_one_sentence_and_leaves_nothing(
    export: Any, tmp_path: Path
) -> None:
    assert_refused(export("onnx"), 2, "'onnx' is unknown", "vllm, sglang, speculators")
    assert_refused(export("vllm", "--verifier=org/name"), 2, "--verifier is for --format")
    assert not (tmp_path / "out").exists()
