"""`fetch`, `export`, `build-engine`, `calibrate` and `check`: artifacts made, measured, proved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from drafter.errors import UsageError
from pipeline.commands import options as o
from pipeline.config import BuildOptions, RunOptions, options
from pipeline.output import print_artifact, print_json, print_tables, print_text
from pipeline.progress import note


def fetch(target: o.Target = None, offline: o.Offline = False, as_json: o.Json = False) -> None:
    """Get a target ready: downloaded, checked by hash, converted into the cache.

    A damaged copy in the cache is made anew. Prints the target's folder.

    \b
    Examples:
      pipeline fetch
      pipeline fetch --target qwen2.5-coder-0.5b
      pipeline fetch --target ./model.gguf
    """
    from pipeline.stages import fetch_target

    name = options(RunOptions, target=target).target
    found = fetch_target(name, offline=o.offline(offline), mend=True)
    if as_json:
        print_json(
            {
                "kind": "target",
                "name": found.name,
                "path": str(found.path),
                "fingerprint": found.fingerprint,
                "source": found.source,
            }
        )
    else:
        print_text(str(found.path))


def export(
    target: o.Target = None,
    drafter: o.Drafter = None,
    out: o.Out = None,
    offline: o.Offline = False,
    as_json: o.Json = False,
) -> None:
    """Write the target's and the drafter's graphs as ONNX. Prints the export folder.

    \b
    Examples:
      pipeline export
      pipeline export --target ./my-llama --drafter ./my-drafter --out ./export
    """
    from pipeline.stages import export_stage, fetch_target, find_drafter

    found = fetch_target(options(RunOptions, target=target).target, offline=o.offline(offline))
    report = export_stage(found, find_drafter(found, drafter), out)
    print_artifact(report, as_json)


def export_drafter(
    layout: Annotated[
        str, o.option("--format", help="vllm, sglang or speculators: who is to load it.")
    ],
    target: o.Target = None,
    drafter: o.Drafter = None,
    precision: Annotated[
        str, o.option("--precision", help="fp16, bf16 or fp32.", default="bf16")
    ] = "bf16",
    verifier: Annotated[
        str | None,
        o.option(
            "--verifier",
            help="speculators: what the checkpoint calls its target.",
            default="its Hugging Face id or its folder",
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        o.option(
            "--corpus",
            help="Compare on the states kept here too: a corpus with --keep-states, or the "
            "`captured` folder of a training run.",
        ),
    ] = None,
    out: o.Out = None,
    offline: o.Offline = False,
    as_json: o.Json = False,
) -> None:
    """Write a drafter as an EAGLE-3 checkpoint for another engine. Prints its folder.

    Other engines know no low-rank head: it becomes one dense matrix, which drafts the same tokens
    without SlimSpec's speed. How alike the two are is said, and stored in its manifest.json.

    \b
    Examples:
      pipeline export-drafter --format vllm
      pipeline export-drafter --format sglang --target ./my-llama --drafter ./my-drafter --out ./d
    """
    from pipeline.interop import interop_stage, said_of
    from pipeline.stages import fetch_target, find_drafter

    found = fetch_target(options(RunOptions, target=target).target, offline=o.offline(offline))
    folder = find_drafter(found, drafter)
    report = interop_stage(
        found, folder, layout, precision, verifier=verifier, corpus=corpus, out=out
    )
    if not as_json:
        for sentence in said_of(report.details["agreement"]):
            note(sentence)
    print_artifact(report, as_json)


def import_drafter(
    source: Annotated[Path, typer.Argument(help="Folder of a published EAGLE-3 checkpoint.")],
    target: o.Target = None,
    tap_ids: Annotated[
        str | None,
        o.option(
            "--tap-ids",
            help="What layer ids in its config mean: input (vLLM) or output (SGLang, SpecForge).",
            default="input for speculators; must be said where others name layers",
        ),
    ] = None,
    norm_output: Annotated[
        str | None,
        o.option(
            "--norm-output",
            help="What norm_output in its config means: fed-back (EAGLE-3.1, vLLM, SGLang) or head "
            "(SpecForge).",
            default="fed-back for speculators; must be said where others set it",
        ),
    ] = None,
    out: o.Out = None,
    offline: o.Offline = False,
    as_json: o.Json = False,
) -> None:
    """Read a published EAGLE-3 checkpoint as a drafter of ours. Prints the drafter folder.

    Without --out that is drafter-imported in the cache's workspace, beside what `train` made; give
    it to --drafter.

    \b
    Examples:
      pipeline import-drafter ./EAGLE3-llama --target ./my-llama --tap-ids input
      pipeline import-drafter ./speculator --target ./my-llama --out ./my-drafter
    """
    from drafter.published import NORM_OUTPUT, TAP_IDS
    from pipeline.interop import import_stage
    from pipeline.stages import fetch_target

    for name, value, known in (
        ("tap-ids", tap_ids, TAP_IDS),
        ("norm-output", norm_output, NORM_OUTPUT),
    ):
        if value is not None and value not in known:
            raise UsageError(f"--{name} is '{value}'; it must be {' or '.join(known)}.")
    found = fetch_target(options(RunOptions, target=target).target, offline=o.offline(offline))
    print_artifact(import_stage(found, source, tap_ids, norm_output, out), as_json)


def build_engine(
    export: Annotated[
        Path | None, o.option("--export", help="Export folder.", default="the one made last")
    ] = None,
    backend: o.Backend = None,
    precision: o.Precision = None,
    threads: o.Threads = None,
    tree: Annotated[
        str | None,
        o.option(
            "--tree",
            help="fixed, or adaptive: as large as pays on the machine it runs on.",
            default="adaptive where the target's weights are rounded, else fixed",
        ),
    ] = None,
    depth: o.Depth = None,
    width: o.Width = None,
    budget: o.Budget = None,
    min_prob: o.MinProb = None,
    lookup: o.Lookup = None,
    min_level: o.MinLevel = None,
    no_calibrate: Annotated[
        bool, o.option("--no-calibrate", help="Do not measure what its passes cost here.")
    ] = False,
    out: o.Out = None,
    as_json: o.Json = False,
) -> None:
    """Build an engine from an export, self-check included, and measure what its passes cost on this
    machine. Prints the engine folder.

    The draft tree given here becomes the engine's default.

    \b
    Examples:
      pipeline build-engine
      pipeline build-engine --precision int8
      pipeline build-engine --precision int8-preview --out ./engine
      pipeline build-engine --export ./export --backend torch --out ./engine
    """
    from pipeline.stages import build_stage
    from pipeline.workspace import last_export

    chosen = options(
        BuildOptions,
        backend=backend,
        precision=precision,
        threads=threads,
        tree=tree,
        calibrate=not no_calibrate,
        depth=depth,
        width=width,
        budget=budget,
        min_prob=min_prob,
        lookup=lookup,
        min_level=min_level,
    )
    report = build_stage(export or last_export(), chosen, out)
    print_artifact(report, as_json)


def calibrate(
    engine: o.EngineDir = None,
    threads: o.Threads = None,
    force: Annotated[bool, o.option("--force", help="Measure again what was measured.")] = False,
    as_json: o.Json = False,
) -> None:
    """Measure what an engine's passes cost on this machine: what adaptive trees go by.

    \b
    Examples:
      pipeline calibrate
      pipeline calibrate --engine ./engine --force --json
    """
    from pipeline.stages import calibrate_stage
    from pipeline.tables import cost_tables
    from pipeline.workspace import last_engine

    found = calibrate_stage(engine or last_engine(), threads, force)
    if as_json:
        print_json(found.model_dump(mode="json", by_alias=True))
    else:
        print_tables(*cost_tables(found))


def check(
    engine: o.EngineDir = None,
    target: Annotated[
        str | None, o.option("--target", help="The target.", default="what the engine came from")
    ] = None,
    drafter: Annotated[
        str | None, o.option("--drafter", help="The drafter.", default="what the engine came from")
    ] = None,
    export: Annotated[
        Path | None, o.option("--export", help="The export.", default="what the engine came from")
    ] = None,
    threads: o.Threads = None,
    offline: o.Offline = False,
    as_json: o.Json = False,
) -> None:
    """Compare PyTorch, ONNX and engine, graph by graph. Exit code 1 beyond tolerance.

    \b
    Examples:
      pipeline check
      pipeline check --engine ./engine --target ./my-llama --drafter ./my-drafter --json
    """
    from pipeline.reports import CheckRow, ParityReport
    from pipeline.stages import check_stage
    from pipeline.workspace import last_engine

    folder = engine or last_engine()
    found = check_stage(
        folder, target, drafter, export, threads=threads, offline=o.offline(offline)
    )
    if as_json:
        report = ParityReport(
            engine=str(folder),
            ok=found.ok,
            first_divergence=found.first_divergence,
            parity=[CheckRow.model_validate(row) for row in found.rows()],
        )
        print_json(report.to_json())
    else:
        print_tables(found.table())
    found.raise_if_failed()
