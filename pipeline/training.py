"""The training stage: corpus -> captured states -> trained drafter -> measured artifact.

A run has a folder: `run.json` (what it is made from), `corpus/` (where dialogues were given),
`captured/`, the state of the training and `log.jsonl`. One command at a time works in it; the same
command goes on with a stopped run.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from drafter.artifact import is_up_to_date, read_artifact, refuse_foreign, write_artifact
from drafter.config import DrafterConfig
from drafter.disk import disk_full_as_error
from drafter.errors import UsageError
from drafter.sources import TargetFolder
from drafter.tokenizer import vocabulary_sha256
from pipeline.benchmark_marks import refuse_benchmark_corpus
from pipeline.captures import Teacher, capture_corpus, captured_documents, teacher_of
from pipeline.config import TrainOptions
from pipeline.corpora import corpus_fingerprint, dialogues_corpus, dialogues_fingerprint
from pipeline.corpus_check import check_corpus
from pipeline.draft_vocabulary import (
    AUTO,
    Material,
    draft_vocabulary,
    vocabulary_arguments,
    vocabulary_inputs,
)
from pipeline.drafter_shape import drafter_config, start_fingerprint
from pipeline.given import refuse_given
from pipeline.held_out import check_held_out, measured_acceptance, split
from pipeline.metrics import line, require_tensorboard, tensorboard
from pipeline.progress import note, progress, quiet
from pipeline.reports import ArtifactReport
from pipeline.run_folder import check_run, claim_run, held
from pipeline.stages import DRAFTER_KIND, artifact_report, fetch_target, find_drafter
from pipeline.workspace import target_workspace

if TYPE_CHECKING:
    from torch import Tensor

    from drafter.capture import Captured
    from drafter.eagle3 import Drafter
    from drafter.parallel import Share
    from drafter.train_config import TrainConfig
    from drafter.train_log import StepReport

_STATE_DOCUMENTS = 200  # whose states start the head's factors
_LOG = "log.jsonl"


def train_stage(options: TrainOptions, offline: bool | None = None) -> ArtifactReport | None:
    """Train a drafter, or go on with a stopped run, and write its artifact. Raises UsageError.

    Under `torchrun` every process trains; the first one captures, measures, writes and has the
    report, the others None.
    """
    from drafter.parallel import joined

    with joined() as share, quiet(not share.first):
        return _train_stage(options, share, offline)


def _train_stage(
    options: TrainOptions, share: Share, offline: bool | None
) -> ArtifactReport | None:
    training = train_config(options.training)
    _check_surroundings(options, share)
    with share.in_turn():
        target = fetch_target(options.target, offline)
    teacher = teacher_of(target)
    config = drafter_config(options, target, teacher.shape)
    if teacher.foreign and options.starts_from_target:
        note("the drafter's layer starts at random: it is not of the target's kind")
        options = options.model_copy(update={"from_target": False})
    run = options.run or target_workspace(target) / "train"
    out = options.out or target_workspace(target) / "drafter"
    if share.first:
        refuse_foreign(out, DRAFTER_KIND)
    inputs = _inputs(options, target, out)
    arguments = _arguments(options, config, training)
    # The other processes may be on machines that do not see `out`: the first one's word counts.
    (done,) = share.sums([share.first and is_up_to_date(out, DRAFTER_KIND, inputs, arguments)])
    if done:
        return _report(out, up_to_date=True) if share.first else None
    with disk_full_as_error(run), held(run) if share.first else nullcontext():
        with share.in_turn():
            corpus = _claimed(run, {**inputs, **arguments}, options, target, config, training)
        drafter, data = _trained(teacher, config, options, training, corpus, run, share)
        if share.first:
            if share.count > 1:
                data["processes"] = share.count
            _write(drafter, out, target.name, inputs, arguments, data, run / _LOG)
        share.wait()
    return _report(out, up_to_date=False) if share.first else None


def _claimed(
    run: Path,
    made_from: dict[str, Any],
    options: TrainOptions,
    target: TargetFolder,
    config: DrafterConfig,
    training: TrainConfig,
) -> Path:
    """The corpus of a run that may use its folder. Another run's is refused before anything is
    written there; a corpus that cannot be trained on leaves the folder unclaimed.
    """
    check_run(run, made_from)
    corpus = _corpus(options, target, run, config)
    check_corpus(corpus, config, training.supervise)
    check_held_out(corpus, options.holdout, training)
    refuse_benchmark_corpus(corpus, target.path)
    claim_run(run, made_from)
    return corpus


def _check_surroundings(options: TrainOptions, share: Share) -> None:
    """Refuse what does not go together or cannot be done here. Raises UsageError, MissingError."""
    if options.shard and share.count == 1:
        raise UsageError(
            "--shard needs several processes, there is one; start them with "
            "`torchrun --nproc-per-node N -m pipeline -- train --shard ...`."
        )
    if share.count > 1 and options.device != "cpu":
        raise UsageError(
            f"--device is {options.device} and there are {share.count} processes; several learn on "
            "CPUs only: give --device cpu, or start one process."
        )
    if options.corpus is not None and options.dialogues is not None:
        raise UsageError("--corpus and --dialogues were both given; one of them is needed.")
    if options.capture == "online":
        refuse_given(options, {"shard_megabytes"}, "is for stored states, --capture is online")
    if options.tensorboard is not None:
        require_tensorboard()


def _inputs(options: TrainOptions, target: TargetFolder, out: Path) -> dict[str, str]:
    """What the drafter is made from, by hash; writes nothing. Raises UsageError."""
    inputs = {"target": target.fingerprint}
    if options.dialogues is not None:
        inputs["dialogues"] = dialogues_fingerprint(options.dialogues)
    else:
        inputs["corpus"] = corpus_fingerprint(_given_corpus(options, target))
    inputs |= vocabulary_inputs(options, target, out)
    for name, chosen in (("start", options.start), ("body", options.body)):
        if chosen is not None:
            inputs[name] = start_fingerprint(name, find_drafter(target, chosen), out)
    return inputs


def _arguments(
    options: TrainOptions, config: DrafterConfig, training: TrainConfig
) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "drafter": config.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        **options.model_dump(include={"from_target", "holdout"}),
        **vocabulary_arguments(options),
    }
    if config.head == "low_rank":
        arguments["head_init"] = options.head_init
    if options.capture == "online":
        arguments["capture"] = options.capture
    if options.draft_vocab == AUTO:  # what was asked for; what was found is in the data
        arguments["drafter"]["draft_vocab_size"] = AUTO
    return arguments


def _trained(
    teacher: Teacher,
    config: DrafterConfig,
    options: TrainOptions,
    training: TrainConfig,
    corpus: Path,
    run: Path,
    share: Share,
) -> tuple[Drafter, dict[str, Any]]:
    """The trained drafter and what its manifest says of it; only the first process measures."""
    stored = run / "captured"
    with share.in_turn():
        capture_corpus(teacher, corpus, stored, config, training.precision, options)
    seen = captured_documents(teacher, corpus, stored, config, training.precision, options)
    documents, held_out = split(seen, options.holdout, corpus, training)
    draft_ids: Tensor | None = None
    data: dict[str, Any] = {"documents": len(documents), "held_out": len(held_out)}
    if config.head == "truncated" and options.start is None:
        with share.in_turn():
            material = Material(teacher, config, documents, held_out, training.draft_steps)
            draft_ids, data["draft_vocabulary"] = draft_vocabulary(material, options, run)
        config = config.model_copy(update={"draft_vocab_size": len(draft_ids)})
    drafter = _train(teacher, config, options, training, documents, draft_ids, run, share)
    if share.first:
        data["acceptance"] = measured_acceptance(drafter, held_out, training.draft_steps)
        data["training"] = {**_speed(run), "device": options.device}
    return drafter, data


def train_config(fields: dict[str, Any]) -> TrainConfig:
    """The training's own options. Raises UsageError naming the option."""
    from drafter.train_config import TrainConfig

    try:
        config = TrainConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        if first["type"] == "extra_forbidden":
            raise UsageError(
                f"training.{first['loc'][0]} is not an option; see --help for those there are."
            ) from None
        reason = first["msg"].removeprefix("Input ")
        raise UsageError(f"--{name} is {first['input']!r}: it {reason}.") from None
    for field, kind in (("decay", "geometric"), ("pace_floor", "d-pace")):
        if config.step_weights != kind:
            lost = f"goes with --step-weights {kind}, which is {config.step_weights}"
            refuse_given(config, {field}, lost)
    return config


def _corpus(options: TrainOptions, target: TargetFolder, run: Path, config: DrafterConfig) -> Path:
    """The corpus folder: the given one, or one that is made of dialogues in the run's folder."""
    if options.dialogues is None:
        return _given_corpus(options, target)
    tokenizer = vocabulary_sha256(target.path / "tokenizer.json")
    return dialogues_corpus(options.dialogues, run / "corpus", config.vocab_size, tokenizer)


def _given_corpus(options: TrainOptions, target: TargetFolder) -> Path:
    """The folder of a corpus of the target's own tokenizer. Raises UsageError."""
    from drafter.corpus import check_tokenizer

    folder = options.corpus or target_workspace(target) / "corpus"
    if not folder.is_dir():
        raise UsageError(
            f"there is no corpus in {folder}; make one with `pipeline corpus --target "
            f"{options.target}` or give --corpus DIR or --dialogues FILE.jsonl.gz."
        )
    check_tokenizer(folder, vocabulary_sha256(target.path / "tokenizer.json"))
    return folder


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
    from drafter.training import train

    drafter = _fresh(teacher, config, options, documents, draft_ids, training.seed)
    drafter.place(options.device)
    folder = options.tensorboard if share.first else None
    with progress("train") as tell, tensorboard(folder) as show:

        def report(step: StepReport) -> None:
            tell(line(step), step.step / step.steps)
            show(step)

        found = train(drafter, documents, training, run, report, share=share, sharded=options.shard)
    return found.place("cpu")


def _fresh(
    teacher: Teacher,
    config: DrafterConfig,
    options: TrainOptions,
    documents: Sequence[Captured],
    draft_ids: Tensor | None,
    seed: int,
) -> Drafter:
    """The drafter before its first step."""
    import torch

    from drafter.checkpoint import load_drafter
    from drafter.start import start_drafter

    model = teacher.ends(config.taps)
    chosen = options.start or options.body
    other = load_drafter(find_drafter(teacher.folder, chosen), model) if chosen else None
    if options.start is not None and other is not None:
        other.config = config
        return other.train()
    return start_drafter(
        config,
        model,
        head_init=options.head_init,
        from_target=options.from_target,
        states=torch.cat([d.states[d.mask] for d in documents[:_STATE_DOCUMENTS]]).float(),
        draft_ids=draft_ids,
        body=other,
        seed=seed,
    )


def _speed(run: Path) -> dict[str, Any]:
    """How fast the training was, by its last step: of the time since it was last started."""
    from drafter.train_log import read_log

    *_, last = read_log(run)
    shares = {name: round(share, 4) for name, share in last.time_shares.items()}
    note(
        f"trained at {last.tokens_per_second:.0f} tokens/s, "
        f"{shares.get('forward_backward', 0):.0%} of the time in forward and backward passes"
    )
    return {"tokens_per_second": round(last.tokens_per_second, 1), "time_shares": shares}


def _write(
    drafter: Drafter,
    out: Path,
    name: str,
    inputs: dict[str, str],
    arguments: dict[str, Any],
    data: dict[str, Any],
    log: Path,
) -> None:
    import torch

    from drafter.checkpoint import save_drafter
    from drafter.rounding import narrowest

    dtype = narrowest(drafter)
    if dtype != torch.float16:
        note("some weights are larger than float16 can hold; all are saved as float32")
    with write_artifact(out, DRAFTER_KIND, name, inputs, arguments, data) as folder:
        save_drafter(drafter, folder, dtype)
        shutil.copyfile(log, folder / _LOG)


def _report(out: Path, up_to_date: bool) -> ArtifactReport:
    manifest = read_artifact(out, DRAFTER_KIND, verify=False)
    report = artifact_report(manifest, out)
    return report.model_copy(update={"up_to_date": up_to_date, "details": dict(manifest.data)})
