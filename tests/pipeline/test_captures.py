"""What `pipeline train` asks of the target: on line or stored, ours or another, within a disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from drafter.checkpoint import load_drafter
from drafter.corpus import read_corpus
from drafter.documents import PRECISION, Stored, precision_of
from drafter.hf_capture import load_hf_ends
from tests.pipeline.command import Result, assert_refused, environment, run_command
from tests.tiny_llama import CHAT_TEMPLATE, tiny_tokenizer

COMMON = (
    "--batch-tokens=64",
    "--sampled-rows=0",
    "--precision=fp32",
    "--rank=8",
    "--rescore=0",
    "--epochs=2",
)


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    """Twenty dialogues of unlike lengths."""
    path = tmp_path / "dialogues.jsonl"
    rows = [
        {"prompt_ids": [1, 5 + i, 6, 7], "response_ids": [*range(8, 13 + i % 9), 12 + i, 2]}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of experts with the tiny tokenizer; read only."""
    folder = tmp_path_factory.mktemp("moe")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=2,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def train(target: Path, *more: object) -> Result:
    return run_command("train", f"--target={target}", *COMMON, *more)


def test_a_mixture_of_experts_gets_a_drafter_and_what_else_it_cannot_have_is_said(
    cache: Path, moe_dir: Path, dialogues: Path, tmp_path: Path
) -> None:
    out = tmp_path / "drafter"
    result = train(moe_dir, f"--dialogues={dialogues}", f"--out={out}", f"--run={tmp_path / 'r'}")
    assert result.code == 0, result.err
    assert "qwen3_moe) is captured with transformers, for training only" in result.err
    drafter = load_drafter(out, load_hf_ends(moe_dir))
    assert drafter.config.target_layers == 8
    assert "layer starts at random" in result.err
    more = (f"--dialogues={dialogues}", f"--run={tmp_path / 's'}", f"--out={tmp_path / 'on'}")
    plain = ("--epochs=1", "--precision=fp32", "--batch-tokens=64")
    on = run_command("train", f"--target={moe_dir}", f"--start={out}", *more, *plain)
    assert on.code == 0, on.err
    assert "at random" not in on.err
    for command in (
        ("export", f"--drafter={out}"),
        ("export-drafter", f"--drafter={out}", "--format=vllm"),
        ("corpus",),
    ):
        refused = run_command(*command, f"--target={moe_dir}")
        assert_refused(refused, 2, "'qwen3_moe' is not supported", "cannot be exported", "--server")


@pytest.mark.parametrize("which", ["ours", "transformers"])
def test_capture_on_line_stores_nothing_and_gives_the_same_drafter(
    cache: Path, tiny_llama_dir: Path, moe_dir: Path, dialogues: Path, tmp_path: Path, which: str
) -> None:
    """To the bit where the target looks at one document at a time."""
    target = tiny_llama_dir if which == "ours" else moe_dir
    for how in ("stored", "online"):
        run, out = tmp_path / f"run-{how}", tmp_path / how
        options = (f"--capture={how}", "--capture-batch=1", f"--run={run}", f"--out={out}")
        result = train(target, f"--dialogues={dialogues}", *options)
        assert result.code == 0, result.err
        assert (run / "captured").exists() == (how == "stored")
    found = [load_file(tmp_path / how / "model.safetensors") for how in ("stored", "online")]
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name]), name
    other = train(
        target,
        f"--dialogues={dialogues}",
        f"--run={tmp_path / 'run-online'}",
        f"--out={tmp_path / 'x'}",
    )
    assert_refused(other, 2, "capture online, now stored", "--run")


def test_captured_files_are_no_larger_than_asked(
    cache: Path, tiny_llama_dir: Path, dialogues: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = (f"--dialogues={dialogues}", f"--run={run}", f"--out={tmp_path / 'd'}")
    assert train(tiny_llama_dir, *arguments, "--shard-megabytes=0.02").code == 0
    files = [*(run / "captured").iterdir()]
    assert len(files) > 3
    assert max(path.stat().st_size for path in files) <= 20_000
    assert len(Stored(run / "captured")) == 20


def test_a_corpus_of_another_tokenizer_is_refused(
    cache: Path, tiny_llama_dir: Path, prompt_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "corpus"
    made = run_command(
        "corpus",
        f"--target={tiny_llama_dir}",
        f"--prompts={prompt_file}",
        "--max-tokens=6",
        f"--out={out}",
    )
    assert made.code == 0, made.err
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, other)
    text = (other / "tokenizer.json").read_text()
    assert "<|endoftext|>" in text
    (other / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|end-of-text|>"))
    result = train(other, f"--corpus={out}", f"--run={tmp_path / 'r'}")
    assert_refused(result, 2, str(out), "another tokenizer", "pipeline corpus")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("device", "code", "words"),
    [
        ("gpu", 2, "cuda:N is needed"),
        ("mps", 2, "cuda:N is needed"),
        ("cuda:99", 3, "CUDA devices"),
    ],
)
def test_a_device_that_is_not_there_is_one_sentence(
    cache: Path,
    tiny_llama_dir: Path,
    dialogues: Path,
    tmp_path: Path,
    device: str,
    code: int,
    words: str,
) -> None:
    result = train(
        tiny_llama_dir, f"--dialogues={dialogues}", f"--device={device}", f"--run={tmp_path / 'r'}"
    )
    assert_refused(result, code, f"--device is '{device}'", words)


def test_a_damaged_captured_shard_is_named_and_captured_again(
    cache: Path, tiny_llama_dir: Path, dialogues: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = (f"--dialogues={dialogues}", f"--run={run}", f"--out={tmp_path / 'd'}")
    assert train(tiny_llama_dir, *arguments).code == 0
    shutil.rmtree(tmp_path / "d")
    (shard,) = (run / "captured").iterdir()
    shard.write_bytes(shard.read_bytes()[:-5])
    assert_refused(train(tiny_llama_dir, *arguments), 2, str(shard), "remove it and run the same")
    shard.unlink()
    assert train(tiny_llama_dir, *arguments).code == 0


def forget_precision(folder: Path) -> None:
    """Captured shards as they were written before they said in which precision."""
    for path in folder.glob("shard-*"):
        with safe_open(path, "pt") as reader:
            metadata = {k: v for k, v in reader.metadata().items() if k != PRECISION}
        save_file(load_file(path), path, metadata)


@pytest.mark.parametrize(
    ("kept", "old", "options", "said"),
    [
        ("bf16", False, ["--precision=fp32"], True),
        ("bf16", True, ["--precision=fp32"], True),
        ("bf16", False, ["--precision=bf16"], False),
        ("fp32", False, ["--precision=fp32"], False),
        ("bf16", False, ["--precision=fp32", "--capture=online"], False),
    ],
)
def test_training_in_fp32_says_that_the_states_it_was_left_are_less_exact(
    cache: Path,
    tiny_llama_dir: Path,
    many: Path,
    tmp_path: Path,
    kept: str,
    old: bool,
    options: list[str],
    said: bool,
) -> None:
    """Once, and uses them: they were kept so that no pass over the corpus is needed."""
    made, run = tmp_path / "corpus", tmp_path / "run"
    command = [*corpus_command(tiny_llama_dir, many, made), f"--precision={kept}"]
    assert run_command(*command).code == 0
    if old:
        forget_precision(made / "captured")
    else:
        assert {precision_of(path) for path in (made / "captured").iterdir()} == {kept}
    corpus = tmp_path / "plain"  # a folder of shards, without the manifest that knows their hashes
    shutil.copytree(made, corpus, ignore=lambda *_: ["manifest.json"])
    where = (f"--corpus={corpus}", f"--run={run}", f"--out={tmp_path / 'out'}", "--steps=1")
    result = run_command("train", f"--target={tiny_llama_dir}", *where, *options)
    assert result.code == 0, result.err
    lines = [line for line in result.err.splitlines() if "are of precision bf16" in line]
    assert len(lines) == said
    if said:
        assert f"--precision is fp32, but the target's states in {run / 'captured'}" in lines[0]
        assert "--capture online" in lines[0]


def test_captured_states_say_in_which_precision_the_target_computed(
    cache: Path, tiny_llama_dir: Path, moe_dir: Path, dialogues: Path, tmp_path: Path
) -> None:
    for target in (tiny_llama_dir, moe_dir):
        for precision in ("fp32", "bf16"):
            run = tmp_path / f"{target.name}-{precision}"
            options = (f"--run={run}", f"--out={run}-out", f"--precision={precision}", "--steps=1")
            data = (f"--target={target}", f"--dialogues={dialogues}")
            result = run_command("train", *data, *options)
            assert result.code == 0, result.err
            assert {precision_of(path) for path in (run / "captured").iterdir()} == {precision}


def corpus_command(target: Path, prompts: Path, out: Path) -> list[str]:
    return [
        "corpus",
        f"--target={target}",
        f"--prompts={prompts}",
        "--max-tokens=40",
        "--keep-states",
        "--shard-documents=1",
        "--temperatures=1",
        f"--out={out}",
    ]


def run_script(script: str, *before: str) -> subprocess.CompletedProcess[str]:
    """A Python script in a process of its own."""
    return subprocess.run(
        [*before, sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=environment(OMP_NUM_THREADS="1"),
    )


@pytest.fixture
def many(tmp_path: Path) -> Path:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(8)))
    return path


def test_a_disk_that_fills_up_while_sharding_loses_nothing(
    cache: Path, tiny_llama_dir: Path, many: Path, tmp_path: Path
) -> None:
    """A real file system of 128 kB, in a name space of its own; made larger, the command goes on
    with the shards that were finished, and makes the corpus of a disk that was never full.
    """
    whole = tmp_path / "whole"
    assert run_command(*corpus_command(tiny_llama_dir, many, whole)).code == 0
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    command = corpus_command(tiny_llama_dir, many, disk / "corpus")
    script = f"""
import pathlib, shutil, subprocess, sys
from pipeline.cli import main
disk = pathlib.Path({str(disk)!r})
mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", disk]
if subprocess.run(mount).returncode:
    sys.exit(42)
first = main({command!r})
print("first", first, "left", len([*disk.rglob("*.partial")]))
print("done", len([*disk.glob(".corpus.work/shard-*")]))
subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
print("second", main({command!r}))
shutil.copytree(disk / "corpus", {str(kept)!r})
"""
    done = run_script(script, "unshare", "--user", "--map-root-user", "--mount")
    if done.returncode == 42 or "unshare" in done.stderr:
        pytest.skip(f"this machine allows no mounts: {done.stderr.strip()}")
    assert "first 3 left 0" in done.stdout, done.stderr
    assert "error: the disk is full" in done.stderr
    assert "done 0" not in done.stdout
    assert "second 0" in done.stdout, done.stderr
    again, wanted = read_corpus(kept), read_corpus(whole)
    assert [d.ids.tolist() for d in again] == [d.ids.tolist() for d in wanted]


def test_a_file_that_may_not_grow_is_one_sentence(
    cache: Path, tiny_llama_dir: Path, many: Path, tmp_path: Path
) -> None:
    """`ulimit -f` (and file systems with a largest file) in a process of its own."""
    out = tmp_path / "corpus"
    command = corpus_command(tiny_llama_dir, many, out)
    script = f"""
import pathlib, resource
from pipeline.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
print("first", main({command!r}), "made", pathlib.Path({str(out)!r}).exists())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("second", main({command!r}))
"""
    done = run_script(script)
    assert "first 3 made False" in done.stdout, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "ulimit -f" in error
    assert "--shard-megabytes" in error
    assert "second 0" in done.stdout, done.stderr
    assert not [*tmp_path.rglob("*.partial")]
    assert len(read_corpus(out)) == 8
