"""`run`: all stages for the defaults, and the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pipeline.commands import options as o
from pipeline.config import RunOptions, options
from pipeline.output import check_writable, print_tables, write_json


def run(
    target: o.Target = None,
    drafter: o.Drafter = None,
    smoke: Annotated[
        bool, o.option("--smoke", help="Quick: 3 prompts of our own, 32 tokens.")
    ] = False,
    prompts: o.Prompts = None,
    max_tokens: o.MaxTokens = None,
    temperature: o.Temperature = None,
    seed: o.Seed = None,
    backend: o.Backend = None,
    precision: o.Precision = None,
    threads: o.Threads = None,
    depth: o.Depth = None,
    width: o.Width = None,
    budget: o.Budget = None,
    min_prob: o.MinProb = None,
    lookup: o.Lookup = None,
    min_level: o.MinLevel = None,
    out: o.Out = None,
    json_file: Annotated[
        Path | None, o.option("--json", help="File for the report, see docs/json.md.")
    ] = None,
    config: o.Config = None,
    offline: o.Offline = False,
) -> None:
    """Fetch, export, build, check, decode: everything for one target, ending in a report.

    What is done already is not done again, and an interrupted run goes on where it was. Exit code 1
    where parity or the identity of the texts fails.

    \b
    Examples:
      pipeline run
      pipeline run --smoke --json report.json
      pipeline run --target ./my-llama --drafter ./my-drafter --prompts my.jsonl
    """
    if json_file is not None:
        check_writable(json_file)
    chosen = options(
        RunOptions,
        config,
        target=target,
        drafter=drafter,
        smoke=smoke or None,
        **o.prompts(prompts),
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        backend=backend,
        precision=precision,
        threads=threads,
        depth=depth,
        width=width,
        budget=budget,
        min_prob=min_prob,
        lookup=lookup,
        min_level=min_level,
        out=out,
    )
    from pipeline.run import run as run_all
    from pipeline.run import verdict
    from pipeline.tables import decode_table, head_table, parity_table, time_table

    outcome = run_all(chosen, o.offline(offline))
    report = outcome.report
    if json_file is not None:
        write_json(json_file, report.to_json())
    print_tables(
        parity_table(report.parity),
        decode_table(report.decode, outcome.answers, outcome.prompts.title, chosen.temperature),
        time_table(outcome.answers),
        head_table(report.head),
    )
    verdict(outcome)
