"""The training stage: corpus -> captured states -> trained drafter -> measured artifact.

A run has a folder: `run.json` (what it is made from), `corpus/` (where dialogues were given),
`captured/`, the state of the training and `log.jsonl`. The same command goes on with a stopped run.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from drafter.artifact import (
    atomic_write_json,
    disk_full_as_error,
    is_up_to_date,
    read_artifact,
    refuse_foreign,
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
from drafter.sources import TargetFolder
from drafter.sources.folder import weights_fingerprint
from drafter.tokenizer import vocabulary_sha256
from pipeline.captures import Teacher, capture_corpus, captured_documents, split, teacher_of
from pipeline.config import DrafterOptions, TrainOptions
from pipeline.corpora import corpus_fingerprint, dialogues_corpus
from pipeline.draft_vocabulary import (
    AUTO,
    Material,
    check_vocabulary_options,
    draft_vocabulary,
    vocabulary_arguments,
    vocabulary_inputs,
)
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
    teacher = teacher_of(target)
    config = drafter_config(options, target, teacher.shape)
    if teacher.foreign and options.start is None and options.from_target:
        note("the drafter's layer starts at random: it is not of the target's kind")
        options = options.model_copy(update={"from_target": False})
    run = options.run or target_workspace(target) / "train"
    out = options.out or target_workspace(target) / "drafter"
    refuse_foreign(out, DRAFTER_KIND)
    with share.in_turn():
        corpus = _corpus(options, target, run, config)
    inputs = {"target": target.fingerprint, "corpus": corpus_fingerprint(corpus)}
    inputs |= vocabulary_inputs(options, target, out)
    if options.start is not None:
        inputs["start"] = _start_fingerprint(find_drafter(target, options.start), out)
    arguments: dict[str, Any] = {
        "drafter": config.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        **options.model_dump(include={"head_init", "from_target", "holdout"}),
        **vocabulary_arguments(options),
    }
    if options.capture == "online":
        arguments["capture"] = options.capture
    if options.draft_vocab == AUTO:  # what was asked for; what was found is in the data
        arguments["drafter"]["draft_vocab_size"] = AUTO
    if is_up_to_date(out, DRAFTER_KIND, inputs, arguments):
        return _report(out, up_to_date=True)
    stored = run / "captured"
    with disk_full_as_error(run):
        with share.in_turn():
            _claim(run, {**inputs, **arguments})
            capture_corpus(teacher, corpus, stored, config, training.precision, options)
        seen = captured_documents(teacher, corpus, stored, config, training.precision, options)
        documents, held_out = split(seen, options.holdout, corpus)
        draft_ids: Tensor | None = None
        vocabulary: dict[str, Any] = {}
        if config.head == "truncated" and options.start is None:
            with share.in_turn():
                material = Material(teacher, config, documents, held_out, training.draft_steps)
                draft_ids, vocabulary = draft_vocabulary(material, options, run)
            config = config.model_copy(update={"draft_vocab_size": len(draft_ids)})
        drafter = _train(teacher, config, options, training, documents, draft_ids, run, share)
    if not share.first:
        share.wait()
        return _report(out, up_to_date=False)
    acceptance = _measure(drafter, held_out, training.draft_steps)
    data = {"acceptance": acceptance, "documents": len(documents), "held_out": len(held_out)}
    if vocabulary:
        data["draft_vocabulary"] = vocabulary
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
    check_vocabulary_options(options)
    size = options.draft_vocab
    if size in (None, AUTO):  # what the search finds takes the place of the quarter
        size = max(1, shape.vocab_size // 4)
    changes: dict[str, Any] = {
        "head": options.head,
        "draft_vocab_size": size if options.head == "truncated" else None,
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
    return weights_fingerprint(start)


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


def _corpus(options: TrainOptions, target: TargetFolder, run: Path, config: DrafterConfig) -> Path:
    """The corpus folder, of the target's own tokenizer. Raises UsageError."""
    from drafter.corpus import check_tokenizer

    tokenizer = vocabulary_sha256(target.path / "tokenizer.json")
    if options.corpus is not None and options.dialogues is not None:
        raise UsageError("--corpus and --dialogues were both given; one of them is needed.")
    if options.dialogues is not None:
        return dialogues_corpus(options.dialogues, run / "corpus", config.vocab_size, tokenizer)
    folder = options.corpus or target_workspace(target) / "corpus"
    if not folder.is_dir():
        raise UsageError(
            f"there is no corpus in {folder}; make one with `pipeline corpus --target "
            f"{options.target}` or give --corpus DIR or --dialogues FILE.jsonl.gz."
        )
    check_tokenizer(folder, tokenizer)
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


def _train(
    teacher: Teacher,
    config: DrafterConfig,
    options: TrainOptions,
    training: TrainConfig,
    documents: Sequence[Captured],
    draft_ids: Tensor | None,
    run: Path,
    share: Share,
) -> Drafter:
    import torch

    from drafter.checkpoint import load_drafter
    from drafter.start import start_drafter
    from drafter.training import train

    target, model = teacher.folder, teacher.ends(config.taps)
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
            draft_ids=draft_ids,
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
    note(f"held out: alpha {found.alpha[0]:.3f} at step 1, expected tau {found.expected_tau:.2f}")
    return {
        "alpha": list(found.alpha),
        "top1": list(found.top1),
        "top4": list(found.top4),
        "expected_tau": found.expected_tau,
        "tokens": found.tokens,
    }


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
