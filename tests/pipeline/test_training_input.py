"""`pipeline train` on what cannot be trained on: one sentence naming the document, before any
work.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from drafter.artifact import read_artifact
from drafter.capture import CAPTURED, capture, write_captured
from drafter.checkpoint import load_target
from drafter.corpus import Document, document, read_corpus, write_shards
from pipeline.stages import fetch_target
from tests.pipeline.command import Result, assert_refused, run_command

OPTIONS = ("--batch-tokens=64", "--sampled-rows=0", "--precision=fp32", "--head-init=random")
GOOD = document([1, 5, 6, 7], [8, 9, 10, 11, 12, 2])


def train(target: Path, corpus: Path, tmp_path: Path, *more: str) -> Result:
    where = (f"--corpus={corpus}", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'drafter'}")
    return run_command("train", f"--target={target}", *OPTIONS, *where, *more)


def shards_of(folder: Path, *documents: Document) -> Path:
    folder.mkdir()
    write_shards(folder, documents)
    return folder


def keep_states(target: Path, corpus: Path) -> None:
    """What `pipeline corpus --keep-states` would keep: the last token of each answer is not taught,
    for nothing was seen of it.
    """
    model = load_target(target)
    seen = []
    for found in capture(model, read_corpus(corpus)):
        found.mask[-1] = False
        seen.append(found)
    folder = corpus / CAPTURED
    folder.mkdir()
    print_of = fetch_target(str(target)).fingerprint
    write_captured(folder / "shard-00000.safetensors", seen, model.taps, print_of, "fp32")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (document([1, 5, 6, 7], []), ("no response token", "--supervise all")),
        (document([1, 5], [999_999]), ("token id 999999", "another tokenizer", "pipeline corpus")),
        (document([1, 5], [-3]), ("token id -3", "another tokenizer")),
        (document([1] * 9, [5] * 10_000), ("10009 tokens", "positions")),
    ],
    ids=["empty mask", "id beyond the vocabulary", "negative id", "too long"],
)
def test_a_document_that_does_not_fit_is_named_before_any_work(
    cache: Path, tiny_llama_dir: Path, tmp_path: Path, bad: Document, words: tuple[str, ...]
) -> None:
    corpus = shards_of(tmp_path / "corpus", GOOD, GOOD, bad, GOOD)
    assert_refused(train(tiny_llama_dir, corpus, tmp_path), 2, "document 2 of", str(corpus), *words)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert not (tmp_path / "drafter").exists()


def test_prompts_alone_are_enough_where_prompts_are_taught(
    cache: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    text = Document(torch.arange(3, 12), torch.zeros(9, dtype=torch.bool))
    corpus = shards_of(tmp_path / "corpus", *[text] * 4)
    result = train(tiny_llama_dir, corpus, tmp_path, "--supervise=all", "--epochs=1")
    assert result.code == 0, result.err
    assert "no answer token: the acceptance is not measured" in result.err
    assert read_artifact(tmp_path / "drafter", "drafter").data["acceptance"] is None


def test_a_batch_without_anything_to_learn_names_its_documents(
    cache: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """The answers are there, but four draft steps reach no token before the fifth."""
    corpus = shards_of(tmp_path / "corpus", *[document([1], [5, 6])] * 3, GOOD)
    result = train(tiny_llama_dir, corpus, tmp_path)
    assert_refused(result, 2, "batch of step 0", "documents 0, 1, 2", "--draft-steps")
    assert not list((tmp_path / "run").glob("state*"))


@pytest.mark.parametrize("states", ["captured later", "kept while answering"])
def test_held_out_documents_without_an_answer_to_measure_are_refused_not_reported_as_tau_1(
    cache: Path, tiny_llama_dir: Path, tmp_path: Path, states: str
) -> None:
    """Of the last 3 of 6 documents, which are held out, no answer reaches beyond draft step 4. That
    of the kept states does, by a token that was never fed and so is not taught.
    """
    short = document([1, 5, 6], [7, 8] if states == "kept while answering" else [7])
    corpus = shards_of(tmp_path / "corpus", GOOD, GOOD, GOOD, short, short, short)
    if states == "kept while answering":
        keep_states(tiny_llama_dir, corpus)
    result = train(tiny_llama_dir, corpus, tmp_path, "--holdout=0.5")
    words = ("None of the 3 held-out documents", str(corpus), "--holdout", "--draft-steps")
    assert_refused(result, 2, *words)
    assert not list((tmp_path / "run").glob("state*"))
    assert not (tmp_path / "drafter").exists()
    if states == "captured later":
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_sharding_one_process_is_refused(cache: Path, tiny_llama_dir: Path) -> None:
    result = run_command("train", f"--target={tiny_llama_dir}", "--shard")
    assert_refused(result, 2, "--shard needs several processes", "torchrun")


def test_states_that_are_not_finite_name_step_and_document_and_keep_the_last_state(
    cache: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """A captured shard is damaged after some steps: the state of those steps stays."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    corpus = shards_of(tmp_path / "corpus", *[GOOD] * 20)
    saving = ("--epochs=1", "--checkpoint-minutes=1e-9", "--batch-tokens=40")
    assert train(tiny_llama_dir, corpus, tmp_path, *saving).code == 0
    run = tmp_path / "run"
    shard = run / "captured" / "shard-00000.safetensors"
    with safe_open(shard, framework="pt") as reader:
        metadata = reader.metadata()
    tensors = load_file(shard)
    a, b = tensors["offsets"][7:9].tolist()
    tensors["states"] = tensors["states"].clone()
    tensors["states"][a:b] = float("nan")
    save_file(tensors, shard, metadata=metadata)
    for path in run.glob("state*"):
        path.unlink()
    shutil.rmtree(tmp_path / "drafter")
    result = train(tiny_llama_dir, corpus, tmp_path, *saving)
    assert_refused(result, 2, " is nan at step", "document 7 are not finite", "captured/")
    state = json.loads((run / "state.json").read_text())
    kept = load_file(run / state["tensors"])
    assert state["step"] > 0, "the steps before it are saved"
    assert f"at step {state['step']}," in result.last_line, "counted from 0"
    assert all(tensor.isfinite().all() for tensor in kept.values())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--head=dense", "--rescore=64"), ("--rescore", "low_rank", "dense")),
        (("--head=truncated", "--head-init=svd"), ("--head-init", "low_rank", "truncated")),
        (("--body=smollm2-135m", "--from-target"), ("--from-target", "--body")),
        (("--body=smollm2-135m", "--from-random"), ("--from-random", "--body")),
        (("--step-weights=uniform", "--decay=0.3"), ("--decay", "geometric", "uniform")),
        (("--step-weights=d-pace", "--decay=0.3"), ("--decay", "geometric", "d-pace")),
        (("--pace-floor=0.3",), ("--pace-floor", "d-pace", "geometric")),
        (("--step-weights=d-pace", "--pace-floor=1"), ("--pace-floor", "less than 1")),
        (("--capture=online", "--shard-megabytes=9"), ("--shard-megabytes", "online")),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    cache: Path, tiny_llama_dir: Path, given: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(run_command("train", f"--target={tiny_llama_dir}", *given), 2, *words)


def test_an_unknown_field_of_the_training_is_named(
    cache: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"training": {"epoch": 3}}')
    result = run_command("train", f"--target={tiny_llama_dir}", f"--config={file}")
    assert_refused(result, 2, "training.epoch is not an option")
