"""`pipeline train` and `pipeline corpus` on a tiny target: from nothing to a drafter that runs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from drafter.artifact import read_artifact
from drafter.checkpoint import load_drafter, load_target, save_drafter
from drafter.corpus import read_corpus
from drafter.tokenizer import vocabulary_sha256
from drafter.train_log import read_log
from pipeline.stages import fetch_target, find_drafter
from tests.pipeline.command import Result, assert_refused, command_line, environment, run_command
from tests.pipeline.conftest import run_arguments

COMMON = ("--batch-tokens=64", "--sampled-rows=0", "--precision=fp32", "--rank=8", "--rescore=0")


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    """Twenty short dialogues."""
    path = tmp_path / "dialogues.jsonl"
    rows = [
        {"prompt_ids": [1, 5 + i, 6, 7], "response_ids": [8 + i, 9, 10, 11, 12 + i, 2]}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(target: Path, *more: object) -> Result:
    return run_command("train", f"--target={target}", *COMMON, *more)


def test_a_trained_drafter_loads_and_its_manifest_says_how_good_it_is(
    cache: Path, tiny_llama_dir: Path, dialogues: Path, tmp_path: Path
) -> None:
    out = tmp_path / "drafter"
    result = train(
        tiny_llama_dir, f"--dialogues={dialogues}", f"--out={out}", "--epochs=2", "--json"
    )
    assert result.code == 0, result.err
    manifest = read_artifact(out, "drafter")
    assert result.json["path"] == str(out)
    acceptance = manifest.data["acceptance"]
    assert isinstance(acceptance, dict)
    assert len(acceptance["alpha"]) == 4
    assert 1.0 <= acceptance["expected_tau"] <= 5.0
    assert manifest.data["held_out"] == 1
    drafter = load_drafter(out, load_target(tiny_llama_dir))
    assert drafter.config.lm_head_rank == 8
    assert len(list(read_log(out))) > 2


def test_the_same_command_again_is_up_to_date_and_other_data_needs_another_run(
    cache: Path, tiny_llama_dir: Path, dialogues: Path, tmp_path: Path
) -> None:
    arguments = (f"--dialogues={dialogues}", f"--out={tmp_path / 'd'}", "--epochs=1")
    assert train(tiny_llama_dir, *arguments).code == 0
    assert train(tiny_llama_dir, *arguments, "--json").json["up_to_date"] is True
    assert_refused(
        train(tiny_llama_dir, *arguments, "--rank=16"), 2, "lm_head_rank 8, now 16", "--run"
    )


def test_training_goes_on_from_a_drafter(
    cache: Path, tiny_llama_dir: Path, dialogues: Path, tmp_path: Path
) -> None:
    """With a rate of next to nothing the weights stay where they started: at those of `--start`."""
    first, second = tmp_path / "first", tmp_path / "second"
    data = (f"--target={tiny_llama_dir}", f"--dialogues={dialogues}", "--epochs=1")
    assert train(tiny_llama_dir, *data[1:], f"--out={first}").code == 0
    more = ("--batch-tokens=64", "--precision=fp32", "--learning-rate=1e-12", f"--start={first}")
    result = run_command("train", *data, *more, f"--run={tmp_path / 'r'}", f"--out={second}")
    assert result.code == 0, result.err
    target = load_target(tiny_llama_dir)
    before, after = load_drafter(first, target), load_drafter(second, target)
    assert after.config == before.config
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weight, atol=1e-6, rtol=0)
    both = run_command("train", *data, *more, "--rank=8", f"--run={tmp_path / 'r'}")
    assert_refused(both, 2, "--rank", "--start")
    nowhere = run_command("train", *data, *more[:-1], "--start=nowhere")
    assert_refused(nowhere, 2, "nowhere")
    fresh = train(tiny_llama_dir, *data[1:], f"--run={tmp_path / 'r'}", f"--out={tmp_path / 'x'}")
    assert_refused(fresh, 2, "another", "--run")
    same = run_command("train", *data, *more, f"--out={first}")
    assert_refused(same, 2, "--start and --out")
    cut = first / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-8])
    assert_refused(run_command("train", *data, *more, f"--run={tmp_path / 's'}"), 2, str(cut))


def test_weights_larger_than_half_precision_holds_are_saved_whole_and_said(
    cache: Path, tiny_llama_dir: Path, tiny_drafter_dir: Path, dialogues: Path, tmp_path: Path
) -> None:
    """Hours of training are not refused at their end for a number that is too large."""
    start, out = tmp_path / "start", tmp_path / "out"
    drafter = load_drafter(tiny_drafter_dir, load_target(tiny_llama_dir))
    drafter.midlayer.mlp.down_proj.weight[0, 0] = 70_000.0
    start.mkdir()
    save_drafter(drafter, start, torch.float32)
    data = (f"--target={tiny_llama_dir}", f"--dialogues={dialogues}", "--epochs=1")
    more = ("--batch-tokens=64", "--precision=fp32", f"--start={start}", f"--out={out}")
    result = run_command("train", *data, *more)
    assert result.code == 0, result.err
    assert "larger than float16 can hold; all are saved as float32" in result.err
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert 69_000 < float(weights["midlayer.mlp.down_proj.weight"].max()) < 71_000


def test_a_drafter_of_one_s_own_is_found_for_its_target(
    cache: Path, tiny_llama_dir: Path, dialogues: Path
) -> None:
    result = train(tiny_llama_dir, f"--dialogues={dialogues}", "--epochs=1")
    assert result.code == 0, result.err
    assert str(find_drafter(fetch_target(str(tiny_llama_dir)), None)) == result.out.strip()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt_ids": [1], "response_ids": [999]}', ("line 1", "999", "320")),
        ('{"prompt_ids": [1]}', ("line 1", "response_ids")),
        ("nonsense", ("line 1",)),
    ],
)
def test_a_bad_dialogue_is_named_by_its_line(
    cache: Path, tiny_llama_dir: Path, tmp_path: Path, row: str, words: tuple[str, ...]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(row + "\n")
    assert_refused(train(tiny_llama_dir, f"--dialogues={path}"), 2, str(path), *words)


@pytest.mark.parametrize("writer", ["drafter.corpus.save_file", "drafter.run_state.save_file"])
def test_a_full_disk_in_the_middle_is_one_sentence_and_the_run_goes_on_later(
    cache: Path,
    tiny_llama_dir: Path,
    dialogues: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writer: str,
) -> None:
    def full(*_: object, **more: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    arguments = (f"--dialogues={dialogues}", f"--out={tmp_path / 'd'}", "--epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(writer, full)
        assert_refused(train(tiny_llama_dir, *arguments), 3, "disk is full")
    assert not (tmp_path / "d").exists()
    assert train(tiny_llama_dir, *arguments).code == 0


def test_ctrl_c_says_how_to_go_on_and_the_same_command_goes_on(
    cache: Path, tiny_llama_dir: Path, dialogues: Path, tmp_path: Path
) -> None:
    out, run = tmp_path / "drafter", tmp_path / "run"
    arguments = (
        "train",
        f"--target={tiny_llama_dir}",
        f"--dialogues={dialogues}",
        f"--out={out}",
        f"--run={run}",
        "--epochs=10",
        "--checkpoint-minutes=1e-9",
        *COMMON,
    )
    process = subprocess.Popen(
        command_line(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(OMP_NUM_THREADS="1"),
    )
    while not (run / "state.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; run the same command again to continue"
    assert "Traceback" not in errors
    assert not out.exists()
    done = json.loads((run / "state.json").read_text())["step"]
    result = run_command(*arguments)
    assert result.code == 0, result.err
    assert "going on with the run" in result.err
    steps = [report.step for report in read_log(run)]
    assert steps[-1] == max(steps)
    assert sorted(set(steps)) == list(range(1, steps[-1] + 1))
    assert 0 < done < steps[-1]


def test_a_corpus_is_the_target_s_own_answers_and_is_made_once(
    cache: Path, tiny_llama_dir: Path, prompt_file: Path, tmp_path: Path
) -> None:
    arguments = (
        "corpus",
        f"--target={tiny_llama_dir}",
        f"--prompts={prompt_file}",
        "--max-tokens=6",
        "--temperatures=0,1",
        "--batch=2",
    )
    result = run_command(*arguments, "--json")
    assert result.code == 0, result.err
    folder = Path(result.json["path"])
    tokenizer = vocabulary_sha256(tiny_llama_dir / "tokenizer.json")
    assert result.json["details"] == {"documents": 3, "tokenizer_sha256": tokenizer}
    documents = read_corpus(folder)
    assert [int(document.mask.sum()) <= 6 for document in documents] == [True] * 3
    assert not list(folder.parent.glob(".corpus*"))
    assert run_command(*arguments, "--json").json["up_to_date"] is True


def test_a_stopped_corpus_goes_on_with_the_shards_it_has(
    cache: Path,
    tiny_llama_dir: Path,
    prompt_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "corpus"
    arguments = (
        "corpus",
        f"--target={tiny_llama_dir}",
        f"--prompts={prompt_file}",
        "--max-tokens=4",
        "--shard-documents=1",
        f"--out={out}",
    )
    whole = run_command(*arguments)
    assert whole.code == 0, whole.err
    wanted = [document.ids.tolist() for document in read_corpus(out)]
    stopped = tmp_path / "again"
    arguments = (*arguments[:-1], f"--out={stopped}")
    written: list[Path] = []

    def stop_after_one(path: Path, documents: object, tokenizer: str) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_shard(path, documents, tokenizer)

    from drafter.corpus import write_shard

    with monkeypatch.context() as patch:
        patch.setattr("drafter.generate.write_shard", stop_after_one)
        assert run_command(*arguments).code == 130
    assert not stopped.exists()
    first = written[0].stat().st_mtime_ns
    kept = {path.name: path.stat().st_mtime_ns for path in written[0].parent.glob("shard-*")}
    assert kept == {written[0].name: first}
    assert run_command(*arguments).code == 0
    assert [document.ids.tolist() for document in read_corpus(stopped)] == wanted


def test_states_kept_by_the_corpus_are_trained_on_where_they_are_the_same(
    cache: Path, tiny_llama_dir: Path, prompt_file: Path, tmp_path: Path
) -> None:
    """The same taps of the same target; a fine-tuned one of the same shape is another."""
    corpus = tmp_path / "corpus"
    made = run_command(
        "corpus",
        f"--target={tiny_llama_dir}",
        f"--prompts={prompt_file}",
        "--max-tokens=12",
        "--keep-states",
        f"--out={corpus}",
    )
    assert made.code == 0, made.err
    kept = (corpus / "captured" / "shard-00000.safetensors").read_bytes()

    def captured(run: Path, target: Path, again: bool, *more: str) -> bytes:
        arguments = (f"--corpus={corpus}", f"--run={run}", f"--out={run / 'd'}", "--epochs=1")
        result = train(target, *arguments, "--draft-steps=1", *more)
        assert result.code == 0, result.err
        assert ("capturing again" in result.err) == again
        return (run / "captured" / "shard-00000.safetensors").read_bytes()

    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_llama_dir, tuned)
    weights = load_file(tuned / "model.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in weights.items()}, tuned / "model.safetensors")
    assert captured(tmp_path / "same", tiny_llama_dir, False) == kept
    assert captured(tmp_path / "taps", tiny_llama_dir, True, "--taps=0,1,1") != kept
    assert captured(tmp_path / "target", tuned, True) != kept


def test_a_truncated_drafter_is_trained_exported_checked_and_decodes(
    cache: Path, tiny_llama_dir: Path, dialogues: Path, prompt_file: Path, tmp_path: Path
) -> None:
    """Parity and identical texts are what `run` exits with 0 for."""
    out = tmp_path / "drafter"
    trained = run_command(
        "train",
        f"--target={tiny_llama_dir}",
        f"--dialogues={dialogues}",
        *("--head=truncated", "--draft-vocab=100", "--loss=lk_hybrid"),
        *("--batch-tokens=64", "--sampled-rows=0", "--precision=fp32", "--epochs=2"),
        f"--out={out}",
    )
    assert trained.code == 0, trained.err
    assert "draft vocabulary's 100 tokens are 100.00% of the answers'" in trained.err
    report = tmp_path / "report.json"
    arguments = run_arguments(tiny_llama_dir, out, prompt_file, report)
    result = run_command(*arguments)
    assert result.code == 0, result.err
    found = json.loads(report.read_text())
    assert found["decode"]["identical"] == found["decode"]["prompts"]
    assert all(row["ok"] for row in found["parity"])


def test_a_variant_is_trained_exported_checked_and_decodes(
    cache: Path, tiny_llama_dir: Path, dialogues: Path, prompt_file: Path, tmp_path: Path
) -> None:
    """Parity and identical texts are what `run` exits with 0 for."""
    out = tmp_path / "drafter"
    chosen = "--variant=fc_norm,norm_output,norm_before_residual"
    quick = ("--epochs=2", "--learning-rate=0.01", "--warmup-steps=1")
    trained = train(tiny_llama_dir, f"--dialogues={dialogues}", f"--out={out}", *quick, chosen)
    assert trained.code == 0, trained.err
    found = load_drafter(out, load_target(tiny_llama_dir))
    assert found.config.variants == ("fc_norm", "norm_output", "norm_before_residual")
    assert found.fc_norm is not None
    assert all((weight != 1).any() for weight in found.fc_norm.parameters())  # norms learn too
    report = tmp_path / "report.json"
    result = run_command(*run_arguments(tiny_llama_dir, out, prompt_file, report))
    assert result.code == 0, result.err


@pytest.mark.parametrize("latency", ["flops", "measured"])
def test_the_size_of_a_draft_vocabulary_is_searched_for_and_recorded(
    cache: Path, tiny_llama_dir: Path, dialogues: Path, tmp_path: Path, latency: str
) -> None:
    """The record has every size tried; the chosen one covers enough and is what was trained. The
    same command again asks for the same, although times were measured.
    """
    out = tmp_path / "drafter"
    arguments = (
        *("train", f"--target={tiny_llama_dir}", f"--dialogues={dialogues}", "--head=truncated"),
        *("--draft-vocab=auto", "--min-coverage=0.9", f"--vocab-latency={latency}"),
        *("--batch-tokens=64", "--sampled-rows=0", "--precision=fp32", "--epochs=1"),
        *(f"--out={out}", f"--run={tmp_path / 'run'}"),
    )
    trained = run_command(*arguments)
    assert trained.code == 0, trained.err
    manifest = read_artifact(out, "drafter")
    asked = ("draft_vocab", "draft_vocab_from", "min_coverage", "coverage_weight", "vocab_latency")
    assert [manifest.arguments[name] for name in asked] == ["auto", "answers", 0.9, 0.5, latency]
    assert manifest.arguments["drafter"]["draft_vocab_size"] == "auto"
    found = manifest.data["draft_vocabulary"]
    assert found["coverage"] >= 0.9
    assert found["utility"] == max(
        one["utility"] for one in found["tried"] if one["coverage"] >= 0.9
    )
    drafter = load_drafter(out, load_target(tiny_llama_dir))
    assert drafter.config.draft_vocab_size == found["size"]
    assert run_command(*arguments, "--json").json["up_to_date"] is True


def test_a_draft_vocabulary_of_what_a_drafter_proposes(
    cache: Path, tiny_llama_dir: Path, dialogues: Path, tmp_path: Path
) -> None:
    first, out = tmp_path / "first", tmp_path / "truncated"
    assert (
        train(tiny_llama_dir, f"--dialogues={dialogues}", "--epochs=1", f"--out={first}").code == 0
    )
    arguments = (
        *("train", f"--target={tiny_llama_dir}", f"--dialogues={dialogues}", "--head=truncated"),
        *("--draft-vocab=80", "--draft-vocab-from=drafted", f"--vocab-drafter={first}"),
        *("--batch-tokens=64", "--sampled-rows=0", "--precision=fp32", "--epochs=1"),
        f"--run={tmp_path / 'run'}",
    )
    made = run_command(*arguments, f"--out={out}")
    assert made.code == 0, made.err
    manifest = read_artifact(out, "drafter")
    assert manifest.data["draft_vocabulary"]["from"] == "drafted"
    assert manifest.data["draft_vocabulary"]["size"] == 80
    assert len(manifest.inputs["vocab_drafter"]) == 64
    assert_refused(run_command(*arguments, f"--out={first}"), 2, "--vocab-drafter and --out")
    taps = run_command(*arguments, "--taps=0,1,1", f"--out={out}", f"--run={tmp_path / 'r'}")
    assert_refused(taps, 2, "taps", "--vocab-drafter")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (("--head=truncated", "--draft-vocab=many"), ("--draft-vocab", "'many'", "auto")),
        (("--head=truncated", "--draft-vocab=0"), ("--draft-vocab", "above 0")),
        (("--head=truncated", "--min-coverage=0.9"), ("--min-coverage", "--draft-vocab auto")),
        (("--head=truncated", "--min-coverage=1.5"), ("--min-coverage", "less than or equal to 1")),
        (("--head=truncated", "--vocab-drafter=d"), ("--vocab-drafter", "drafted")),
        (("--head=dense", "--draft-vocab-from=corpus"), ("--draft-vocab-from", "truncated")),
        (("--head=truncated", "--draft-vocab=3"), ("has 3 tokens", "--draft-vocab")),
        (("--head=truncated", "--draft-vocab=999999"), ("draft_vocab_size 999999",)),
        (("--head=dense", "--draft-vocab=100"), ("--draft-vocab", "truncated")),
    ],
)
def test_a_draft_vocabulary_that_does_not_fit_is_one_sentence(
    cache: Path,
    tiny_llama_dir: Path,
    dialogues: Path,
    wrong: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    target = f"--target={tiny_llama_dir}"
    assert_refused(run_command("train", target, f"--dialogues={dialogues}", *wrong), 2, *words)


@pytest.mark.parametrize("command", ["corpus", "train"])
def test_a_folder_that_is_not_ours_is_refused_before_the_work(
    cache: Path, tiny_llama_dir: Path, dialogues: Path, tmp_path: Path, command: str
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    more = (f"--dialogues={dialogues}", f"--run={tmp_path / 'run'}") if command == "train" else ()
    result = run_command(command, f"--target={tiny_llama_dir}", f"--out={mine}", *more)
    assert_refused(result, 2, str(mine), "holds no artifact", "--out")
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / ".mine.work").exists()


@pytest.mark.parametrize(
    "wrong", ["--seed=99999999999999999999", "--temperatures=-1", "--temperatures=nan"]
)
def test_corpus_options_out_of_range_are_one_sentence(
    cache: Path, tiny_llama_dir: Path, wrong: str
) -> None:
    name = wrong.split("=", 1)[0]
    assert_refused(run_command("corpus", f"--target={tiny_llama_dir}", wrong), 2, name)


def test_a_fresh_head_on_the_layer_of_another_drafter(
    cache: Path, tiny_llama_dir: Path, dialogues: Path, tmp_path: Path
) -> None:
    """Nothing is learnt at a rate of almost 0: the layer is still the other's."""
    first, out = tmp_path / "first", tmp_path / "other"
    common = (f"--dialogues={dialogues}", "--epochs=1")
    assert train(tiny_llama_dir, *common, f"--out={first}").code == 0
    arguments = (*common, f"--body={first}", "--rank=4", f"--run={tmp_path / 'run'}")
    made = train(tiny_llama_dir, *arguments, "--learning-rate=1e-12", f"--out={out}")
    assert made.code == 0, made.err
    body, found = (load_file(folder / "model.safetensors") for folder in (first, out))
    assert [len(w["lm_head.down.weight"]) for w in (body, found)] == [8, 4]
    layer = [name for name in body if not name.startswith("lm_head")]
    assert all(torch.equal(body[name], found[name]) for name in layer)
    assert len(read_artifact(out, "drafter").inputs["body"]) == 64
    assert_refused(train(tiny_llama_dir, *arguments, f"--out={first}"), 2, "--body and --out")
    run = f"--run={tmp_path / 'taps'}"
    taps = train(tiny_llama_dir, *arguments, "--taps=0,1,1", f"--out={tmp_path / 'x'}", run)
    assert_refused(taps, 2, "taps")
