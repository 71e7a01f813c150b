"""`train`: a drafter of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pipeline.commands import options as o
from pipeline.config import DrafterOptions, TrainOptions, default, options
from pipeline.output import print_artifact


def train(
    target: o.Target = None,
    corpus: Annotated[
        Path | None,
        o.option("--corpus", help="Corpus folder.", default="the one `pipeline corpus` made"),
    ] = None,
    dialogues: Annotated[
        Path | None,
        o.option("--dialogues", help="JSONL file (or .gz) of prompt_ids and response_ids instead."),
    ] = None,
    start: Annotated[
        str | None,
        o.option(
            "--start",
            help="Train on from this drafter: a folder, or one that comes with this package.",
            default="a fresh one",
        ),
    ] = None,
    body: Annotated[
        str | None,
        o.option(
            "--body",
            help="Take the layer of this drafter, with a fresh head on it.",
            default="a fresh one",
        ),
    ] = None,
    head: Annotated[
        str | None,
        o.option(
            "--head",
            help="low_rank, dense, target or truncated.",
            default=default(DrafterOptions, "head"),
        ),
    ] = None,
    rank: Annotated[int | None, o.option("--rank", help="Rank r.", default="d/8")] = None,
    rescore: Annotated[
        int | None,
        o.option(
            "--rescore",
            help="Candidates scored exactly with the target's rows; 0 is off.",
            default=default(DrafterOptions, "rescore"),
        ),
    ] = None,
    draft_vocab: Annotated[
        str | None,
        o.option(
            "--draft-vocab",
            help="truncated: tokens it can draft, or auto: coverage against latency.",
            default="a quarter",
        ),
    ] = None,
    draft_vocab_from: Annotated[
        str | None,
        o.option(
            "--draft-vocab-from",
            help="truncated: the most frequent tokens of the corpus, of its answers, or of what a "
            "drafter proposes (drafted).",
            default=default(DrafterOptions, "draft_vocab_from"),
        ),
    ] = None,
    vocab_drafter: Annotated[
        str | None,
        o.option("--vocab-drafter", help="drafted: that drafter.", default="the target's own"),
    ] = None,
    min_coverage: Annotated[
        float | None,
        o.option(
            "--min-coverage",
            help="auto: least share of the answers' tokens that can be drafted.",
            default=default(DrafterOptions, "min_coverage"),
        ),
    ] = None,
    coverage_weight: Annotated[
        float | None,
        o.option(
            "--coverage-weight",
            help="auto: weight of coverage; the rest is that of the time saved.",
            default=default(DrafterOptions, "coverage_weight"),
        ),
    ] = None,
    vocab_latency: Annotated[
        str | None,
        o.option(
            "--vocab-latency",
            help="auto: time by flops, or measured on this machine.",
            default=default(DrafterOptions, "vocab_latency"),
        ),
    ] = None,
    head_init: Annotated[
        str | None,
        o.option(
            "--head-init",
            help="activation-pca, svd or random.",
            default=default(DrafterOptions, "head_init"),
        ),
    ] = None,
    from_target: Annotated[
        bool | None,
        o.option(
            "--from-target/--from-random",
            help="Start the layer from the target's last one.",
            default="from-target",
        ),
    ] = None,
    taps: Annotated[
        str | None,
        o.option(
            "--taps", help="Layers whose inputs are read, comma-separated.", default="2,n//2,n-3"
        ),
    ] = None,
    variant: Annotated[
        str | None,
        o.option(
            "--variant",
            help="Variants of EAGLE-3, comma-separated: fc_norm or norm_before_fc, norm_output, "
            "norm_before_residual.",
            default="none, the original",
        ),
    ] = None,
    holdout: Annotated[
        float | None,
        o.option(
            "--holdout",
            help="Share of documents held out.",
            default=default(TrainOptions, "holdout"),
        ),
    ] = None,
    epochs: Annotated[int | None, o.option("--epochs", help="Passes.", default="10")] = None,
    steps: Annotated[
        int | None,
        o.option("--steps", help="So many steps, however many passes.", default="of the passes"),
    ] = None,
    batch_tokens: Annotated[
        int | None, o.option("--batch-tokens", help="Tokens per micro-batch.", default="4096")
    ] = None,
    accumulate: Annotated[
        int | None, o.option("--accumulate", help="Micro-batches per step.", default="1")
    ] = None,
    packing: Annotated[
        bool | None,
        o.option(
            "--packing/--no-packing",
            help="Several documents in a row instead of padding.",
            default="no-packing",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, o.option("--learning-rate", help="AdamW's peak rate.", default="0.001")
    ] = None,
    final_rate: Annotated[
        float | None,
        o.option("--final-rate", help="Share of it at the end of the cosine.", default="0.02"),
    ] = None,
    warmup_steps: Annotated[
        int | None, o.option("--warmup-steps", help="Linear warm-up.", default="50")
    ] = None,
    clip: Annotated[
        float | None, o.option("--clip", help="Largest gradient norm.", default="0.5")
    ] = None,
    ema: Annotated[
        float | None,
        o.option(
            "--ema",
            help="Decay of the weights' running mean, which becomes the drafter; 0 is off.",
            default="0",
        ),
    ] = None,
    draft_steps: Annotated[
        int | None, o.option("--draft-steps", help="Steps of the unroll.", default="4")
    ] = None,
    step_weights: Annotated[
        str | None,
        o.option("--step-weights", help="geometric, uniform or d-pace.", default="geometric"),
    ] = None,
    decay: Annotated[
        float | None,
        o.option("--decay", help="geometric: weight of each step by the last.", default="0.8"),
    ] = None,
    pace_floor: Annotated[
        float | None,
        o.option("--pace-floor", help="d-pace: its a, from 0 to below 1.", default="0.5"),
    ] = None,
    loss: Annotated[
        str | None,
        o.option("--loss", help="kl, lk_hybrid, lk_alpha, tv, ce or reverse_kl.", default="kl"),
    ] = None,
    sampled_rows: Annotated[
        int | None,
        o.option("--sampled-rows", help="Vocabulary rows per step; 0 is all.", default="1024"),
    ] = None,
    supervise: Annotated[
        str | None,
        o.option(
            "--supervise",
            help="answers, or all: prompts too, where the target wrote them.",
            default="answers",
        ),
    ] = None,
    precision: Annotated[
        str | None, o.option("--precision", help="fp32 or bf16.", default="bf16")
    ] = None,
    seed: Annotated[int | None, o.option("--seed", help="Seed.", default="0")] = None,
    checkpoint_minutes: Annotated[
        float | None,
        o.option("--checkpoint-minutes", help="Minutes between saved states.", default="5.0"),
    ] = None,
    capture: Annotated[
        str | None,
        o.option(
            "--capture",
            help="stored: the target's view is written to the run's folder first; online: it is "
            "computed for every batch and not stored.",
            default=default(TrainOptions, "capture"),
        ),
    ] = None,
    capture_batch: Annotated[
        int | None,
        o.option(
            "--capture-batch",
            help="Documents that the target looks at together.",
            default=default(TrainOptions, "capture_batch"),
        ),
    ] = None,
    device: Annotated[
        str | None,
        o.option(
            "--device",
            help="Where the target looks at the corpus and the drafter learns: cpu, cuda or "
            "cuda:N.",
            default=default(TrainOptions, "device"),
        ),
    ] = None,
    shard_megabytes: o.ShardMegabytes = None,
    shard: Annotated[
        bool | None,
        o.option(
            "--shard/--no-shard",
            help="torchrun: each process keeps a part of the weights (FSDP2).",
            default="no-shard",
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None, o.option("--tensorboard", help="Folder for TensorBoard's events.")
    ] = None,
    run: Annotated[
        Path | None,
        o.option("--run", help="Folder of the run's states.", default="in the cache's workspace"),
    ] = None,
    out: o.Out = None,
    config: o.Config = None,
    offline: o.Offline = False,
    as_json: o.Json = False,
) -> None:
    """Train a drafter for a target: capture, training, acceptance on held-out dialogues.

    A stopped run goes on from its last saved state. Prints the drafter folder.

    \b
    Examples:
      pipeline train --dialogues corpus.jsonl.gz
      pipeline train --target ./my-llama --corpus ./corpus --epochs 4 --out ./my-drafter
      pipeline train --head dense --run ./dense-run --out ./dense-drafter
      pipeline train --head truncated --draft-vocab auto --min-coverage 0.98
      pipeline train --start smollm2-135m --loss lk_hybrid --epochs 2 --out ./better
      torchrun --nproc-per-node 2 -m pipeline -- train --corpus ./corpus
    """
    from pipeline.training import train_stage

    training = {
        "epochs": epochs,
        "steps": steps,
        "batch_tokens": batch_tokens,
        "accumulate": accumulate,
        "packing": packing,
        "learning_rate": learning_rate,
        "final_rate": final_rate,
        "warmup_steps": warmup_steps,
        "clip": clip,
        "ema": ema,
        "draft_steps": draft_steps,
        "step_weights": step_weights,
        "decay": decay,
        "pace_floor": pace_floor,
        "loss": loss,
        "sampled_rows": sampled_rows,
        "supervise": supervise,
        "precision": precision,
        "seed": seed,
        "checkpoint_minutes": checkpoint_minutes,
    }
    chosen = options(
        TrainOptions,
        config,
        target=target,
        corpus=corpus,
        dialogues=dialogues,
        start=start,
        body=body,
        head=head,
        rank=rank,
        rescore=rescore,
        draft_vocab=draft_vocab,
        draft_vocab_from=draft_vocab_from,
        vocab_drafter=vocab_drafter,
        min_coverage=min_coverage,
        coverage_weight=coverage_weight,
        vocab_latency=vocab_latency,
        head_init=head_init,
        from_target=from_target,
        taps=o.numbers(taps, int, "--taps"),
        variant=None if variant is None else tuple(variant.split(",")),
        holdout=holdout,
        capture=capture,
        capture_batch=capture_batch,
        device=device,
        shard_megabytes=shard_megabytes,
        shard=shard,
        tensorboard=tensorboard,
        run=run,
        out=out,
    )
    given: dict[str, Any] = {name: value for name, value in training.items() if value is not None}
    chosen = chosen.model_copy(update={"training": {**chosen.training, **given}})
    report = train_stage(chosen, o.offline(offline))
    if report is not None:
        print_artifact(report, as_json)
