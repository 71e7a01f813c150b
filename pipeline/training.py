"""The training stage: corpus -> captured states -> trained drafter -> measured artifact.

A run has a folder: `run.json` (what it is made from), `corpus/` (where dialogues were given),
`captured/`, the state of the training and `log.jsonl`. The same command goes on with a stopped run.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from drafter.artifact import (
    atomic_write_json,
    check_free_space,
    disk_full_as_error,
    is_up_to_date,
    link_or_copy,
    read_artifact,
    refuse_foreign,
    sha256_file,
    write_artifact,
)
from drafter.config import (
    VARIANTS,
    DrafterConfig,
    TargetConfig,
    checked_drafter_config,
    default_top_k,
    drafter_config_for,
    read_drafter_config,
    read_json,
)
from drafter.errors import UsageError
from drafter.families import read_target_config
from drafter.sources import TargetFolder
from drafter.sources.folder import weight_files
from drafter.tokenizer import vocabulary_sha256
from pipeline.benchmark_marks import refuse_benchmark_corpus
from pipeline.config import DrafterOptions, TrainOptions
from pipeline.corpora import corpus_fingerprint, dialogues_corpus
from pipeline.progress import note, progress, quiet
from pipeline.reports import ArtifactReport
from pipeline.stages import DRAFTER_KIND, artifact_report, fetch_target, find_drafter
from pipeline.workspace import target_workspace

if TYPE_CHECKING:
    from torch import Tensor

    from drafter.acceptance import Acceptance
    from drafter.capture import Captured
    from drafter.eagle3 import Drafter
    from drafter.parallel import Share
    from drafter.training import StepReport, TrainConfig

_STATE_DOCUMENTS = 200  # whose states start the head's factors
_HELD_OUT_DOCUMENTS = 64  # at most so many measure the acceptance
_LOG = "log.jsonl"


def train_stage(options: TrainOptions, offline: bool | None = None) -> ArtifactReport | None:
    """Train a drafter, or go on with a stopped run, and write its artifact. Raises UsageError.

    Under `torchrun` every process trains; the first one captures, measures, writes and has the
    report, the others None.
    """
    from drafter.parallel import joined

    with joined() as share, quiet(not share.first):
        report = _train_stage(options, share, offline)
    return report if share.first else None


def _train_stage(options: TrainOptions, share: Share, offline: bool | None) -> ArtifactReport:
    training = train_config(options.training)
    with share.in_turn():
        target = fetch_target(options.target, offline)
    config = drafter_config(options, target, read_target_config(target.path))
    run = options.run or target_workspace(target) / "train"
    out = options.out or target_workspace(target) / "drafter"
    refuse_foreign(out, DRAFTER_KIND)
    with share.in_turn():
        corpus = _corpus(options, target, run, config.vocab_size)
    inputs = {"target": target.fingerprint, "corpus": corpus_fingerprint(corpus)}
    if options.start is not None:
        inputs["start"] = _start_fingerprint(find_drafter(target, options.start), out)
    arguments = {
        "drafter": config.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        **options.model_dump(include={"head_init", "from_target", "holdout"}),
    }
    if config.head == "truncated":
        arguments["draft_vocab_from"] = options.draft_vocab_from
    if is_up_to_date(out, DRAFTER_KIND, inputs, arguments):
        return _report(out, up_to_date=True)
    with disk_full_as_error(run):
        with share.in_turn():
            refuse_benchmark_corpus(corpus, target.path)
            _claim(run, {**inputs, **arguments})
            _capture(target, corpus, run / "captured", config, training)
        documents, held_out = _documents(corpus, run, options.holdout)
        drafter = _train(target, config, options, training, documents, run, share)
    if not share.first:
        share.wait()
        return _report(out, up_to_date=False)
    acceptance = _measure(drafter, held_out, training.draft_steps)
    data = {"acceptance": acceptance, "documents": len(documents), "held_out": len(held_out)}
    if share.count > 1:
        data["processes"] = share.count
    _write(drafter, out, target.name, inputs, arguments, data, run / _LOG)
    share.wait()
    return _report(out, up_to_date=False)


def train_config(fields: dict[str, Any]) -> TrainConfig:
    """The training's own options. Raises UsageError naming the option."""
    from drafter.training import TrainConfig

    try:
        return TrainConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        reason = first["msg"].removeprefix("Input ")
        raise UsageError(f"--{name} is {first['input']!r}: it {reason}.") from None


def drafter_config(
    options: TrainOptions, target: TargetFolder, shape: TargetConfig
) -> DrafterConfig:
    """The drafter to train. Raises UsageError for a rank, tap or rescoring that does not fit."""
    from drafter.heads import HEADS

    if options.start is not None:
        return _started_config(options, target, shape)
    if options.head not in HEADS:
        raise UsageError(f"--head is '{options.head}'; known heads: {', '.join(sorted(HEADS))}.")
    low_rank = options.head == "low_rank"
    if not low_rank and options.rank is not None:
        raise UsageError(f"--rank is for the low_rank head, --head is {options.head}; drop one.")
    truncated = options.head == "truncated"
    if not truncated and options.draft_vocab is not None:
        raise UsageError(
            f"--draft-vocab is for the truncated head, --head is {options.head}; drop one."
        )
    quarter = max(1, shape.vocab_size // 4)
    changes: dict[str, Any] = {
        "head": options.head,
        "draft_vocab_size": (options.draft_vocab or quarter) if truncated else None,
        "lm_head_rank": options.rank,
        "rescore": min(options.rescore, shape.vocab_size) if low_rank else 0,
        "tokenizer_sha256": vocabulary_sha256(target.path / "tokenizer.json"),
    }
    if options.taps is not None:
        changes["taps"] = options.taps
    for name in options.variant:
        if name not in VARIANTS:
            raise UsageError(f"--variant is '{name}'; known variants: {', '.join(VARIANTS)}.")
        changes[name] = True
    return drafter_config_for(shape, **changes)


def _start_fingerprint(start: Path, out: Path) -> str:
    """Hex SHA-256 of the weights that training goes on from. Raises UsageError for a damaged
    drafter, or when the result would replace it.
    """
    from drafter.checkpoint import check_weights

    if start.resolve() == out.resolve():
        raise UsageError(f"--start and --out are both {out}; give another --out folder.")
    check_weights(start)  # found now, not after the capture
    hashes = "".join(map(sha256_file, weight_files(start)))
    return hashlib.sha256(hashes.encode()).hexdigest()


def _started_config(
    options: TrainOptions, target: TargetFolder, shape: TargetConfig
) -> DrafterConfig:
    """The shape of the drafter that training goes on from; options of the shape would be lost."""
    from drafter.checkpoint import check_fits

    assert options.start is not None
    if lost := sorted(options.model_fields_set & {*DrafterOptions.model_fields} - {"start"}):
        name = lost[0].replace("_", "-")
        if lost[0] == "from_target" and not options.from_target:
            name = "from-random"
        raise UsageError(
            f"--{name} and --start were both given; with --start shape and weights are those of "
            f"the drafter in {options.start}: drop one of them."
        )
    folder = find_drafter(target, options.start)
    found = read_drafter_config(folder)
    check_fits(found, shape, folder)
    tokenizer = vocabulary_sha256(target.path / "tokenizer.json")
    if found.tokenizer_sha256 not in (None, tokenizer):
        raise UsageError(
            f"the drafter in {folder} was trained for another tokenizer than that of "
            f"{options.target}; drop --start, or train on for its own target."
        )
    # No weight depends on how many candidates come back.
    top_k = default_top_k(found.rescore, found.draft_vocab_size or found.vocab_size)
    return checked_drafter_config({**found.model_dump(), "top_k": top_k}, str(folder))


def _corpus(options: TrainOptions, target: TargetFolder, run: Path, vocab_size: int) -> Path:
    if options.corpus is not None and options.dialogues is not None:
        raise UsageError("--corpus and --dialogues were both given; one of them is needed.")
    if options.dialogues is not None:
        return dialogues_corpus(options.dialogues, run / "corpus", vocab_size)
    folder = options.corpus or target_workspace(target) / "corpus"
    if not folder.is_dir():
        raise UsageError(
            f"there is no corpus in {folder}; make one with `pipeline corpus --target "
            f"{options.target}` or give --corpus DIR or --dialogues FILE.jsonl.gz."
        )
    return folder


def _claim(run: Path, made_from: dict[str, Any]) -> None:
    """Note what a run is made from; refuse the folder of another one."""
    state = run / "run.json"
    if state.exists():
        found = read_json(state)
        for field in sorted({*found, *made_from}):
            if found.get(field) != made_from.get(field):
                raise UsageError(
                    f"{run} holds a run with another {field}; give another --run folder, or remove "
                    "this one to start anew."
                )
        note(f"going on with the run in {run}")
    atomic_write_json(state, made_from)


def _documents(corpus: Path, run: Path, holdout: float) -> tuple[list[Captured], list[Captured]]:
    """Captured documents to train on, and those held out: the last ones."""
    from drafter.capture import read_captured

    documents = read_captured(run / "captured")
    count = max(1, round(holdout * len(documents)))
    if count >= len(documents):
        raise UsageError(
            f"the corpus {corpus} has {len(documents)} documents, at least 2 are needed: one to "
            "train on and one held out."
        )
    return documents[:-count], documents[-count:]


def _capture(
    target: TargetFolder, corpus: Path, out: Path, config: DrafterConfig, training: TrainConfig
) -> None:
    import torch

    from drafter.capture import capture_shards
    from drafter.checkpoint import load_target
    from drafter.corpus import read_shard, shards

    out.mkdir(parents=True, exist_ok=True)
    paths = shards(corpus)
    for path in paths:
        _take_captured(path, out / path.name, config.taps, target.fingerprint)
    todo = [path for path in paths if not (out / path.name).exists()]
    if not todo:
        return
    tokens = sum(len(document.ids) for path in todo for document in read_shard(path))
    check_free_space(out, tokens * 2 * (len(config.taps) + 1) * config.target_hidden_size)
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    with progress("capture") as tell:
        tell("loading the target", None)
        model = load_target(target.path, config.taps, dtype)
        start = time.monotonic()

        def report(done: int, total: int) -> None:
            rate = done / (time.monotonic() - start)
            tell(f"{done} of {total} tokens, {rate:.0f} tokens/s", done / total)

        capture_shards(model, corpus, out, report, target.fingerprint)


def _take_captured(shard: Path, place: Path, taps: tuple[int, ...], target: str) -> None:
    """Use what the corpus kept of the target, where it kept these taps of this target."""
    from drafter.capture import CAPTURED, is_captured_from

    kept = shard.parent / CAPTURED / shard.name
    if place.exists() or not kept.exists():
        return
    if not is_captured_from(kept, taps, target):
        note(f"{kept} does not hold taps {taps} of this target: capturing again")
        return
    link_or_copy(kept, place)


def _train(
    target: TargetFolder,
    config: DrafterConfig,
    options: TrainOptions,
    training: TrainConfig,
    documents: Sequence[Captured],
    run: Path,
    share: Share,
) -> Drafter:
    import torch

    from drafter.checkpoint import load_drafter, load_target
    from drafter.start import start_drafter
    from drafter.training import train

    model = load_target(target.path, config.taps)
    if options.start is not None:
        drafter = load_drafter(find_drafter(target, options.start), model).train()
        drafter.config = config
    else:
        states = torch.cat([d.states[d.mask] for d in documents[:_STATE_DOCUMENTS]]).float()
        drafter = start_drafter(
            config,
            model,
            head_init=options.head_init,
            from_target=options.from_target,
            states=states,
            draft_ids=_draft_ids(target, config, documents, options.draft_vocab_from),
            seed=training.seed,
        )
        del states
    del model
    with progress("train") as tell:
        return train(
            drafter,
            documents,
            training,
            run,
            lambda r: tell(_state(r), r.step / r.steps),
            share=share,
        )


def _draft_ids(
    target: TargetFolder, config: DrafterConfig, documents: Sequence[Captured], source: str
) -> Tensor | None:
    """What a truncated head may draft, from the documents it is trained on; None for others."""
    from drafter.corpus import Document
    from drafter.tokenizer import ChatTokenizer
    from drafter.vocabulary import coverage, frequent_ids, token_counts

    if config.draft_vocab_size is None:
        return None
    tokenizer = ChatTokenizer.load(target.path)
    texts = (Document(document.ids, document.mask) for document in documents)
    counts = token_counts(texts, config.vocab_size, source)
    needed = tokenizer.eos_ids | {i for i in tokenizer.special_ids if i < config.vocab_size}
    ids = frequent_ids(counts, config.draft_vocab_size, needed)
    note(f"the draft vocabulary holds {coverage(counts, ids):.2%} of what was counted")
    return ids


def _state(report: StepReport) -> str:
    alphas = " ".join(f"{alpha:.2f}" for alpha in report.alpha)
    minutes, seconds = divmod(round(report.eta), 60)
    return (
        f"step {report.step}/{report.steps}, loss {report.loss:.3f}, alpha {alphas}, "
        f"tau {report.expected_tau:.2f}, {report.tokens_per_second:.0f} tokens/s, "
        f"{minutes}:{seconds:02d} left"
    )


def _measure(drafter: Drafter, held_out: Sequence[Captured], steps: int) -> dict[str, Any]:
    from drafter.acceptance import measure_acceptance

    with progress("evaluate") as tell:
        tell("acceptance on held-out documents", None)
        found: Acceptance = measure_acceptance(
            drafter.eval(), held_out[-_HELD_OUT_DOCUMENTS:], steps
        )
    known = found.to_json()
    note(
        f"held out, a chain of {steps}: tau {known['greedy_tau']:.2f} at temperature 0, "
        f"{known['drawn_tau']:.2f} at 1"
    )
    return known


def _write(
    drafter: Drafter,
    out: Path,
    name: str,
    inputs: dict[str, str],
    arguments: dict[str, Any],
    data: dict[str, Any],
    log: Path,
) -> None:
    from drafter.checkpoint import save_drafter

    with write_artifact(out, DRAFTER_KIND, name, inputs, arguments, data) as folder:
        save_drafter(drafter, folder)
        shutil.copyfile(log, folder / _LOG)


def _report(out: Path, up_to_date: bool) -> ArtifactReport:
    manifest = read_artifact(out, DRAFTER_KIND, verify=False)
    report = artifact_report(manifest, out)
    return report.model_copy(update={"up_to_date": up_to_date, "details": dict(manifest.data)})
