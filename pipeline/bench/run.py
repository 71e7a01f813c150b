"""`pipeline bench` from its options to its report: checks first, then models, then the measurement.

In the output folder: `records.jsonl` as answers come, `bench.json`, `bench.html`, and a log of each
engine in `logs`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from drafter.errors import CheckFailed, SlimSpecError, UsageError
from drafter.sources.folder import TargetFolder
from drafter.tokenizer import ChatTokenizer
from pipeline.bench import own
from pipeline.bench.contenders import Contender, Process
from pipeline.bench.lineup import (
    EngineFacts,
    check_distinct,
    needs_costs,
    own_contenders,
    peer_contenders,
    read_engines,
)
from pipeline.bench.measure import measure
from pipeline.bench.plan import Cell, cells_of, plan_digest, turns
from pipeline.bench.records import FORM, Records
from pipeline.config import BenchOptions
from pipeline.machine import machine, versions
from pipeline.output import write_json
from pipeline.peers.models import peer_model
from pipeline.peers.protocol import Settings
from pipeline.peers.registry import PEERS
from pipeline.progress import Tell, progress
from pipeline.prompts import PromptSet
from runtime.cost import CostTable

RECORDS, REPORT, PAGE = "records.jsonl", "bench.json", "bench.html"


@dataclass
class Bench:
    """Everything a report is made of. `states[name]`: version, load time, reason of a contender;
    `costs[model]`: of an engine's folder, or why they are not known; `partial`: stopped by Ctrl-C.
    """

    chosen: BenchOptions
    engines: list[EngineFacts]
    contenders: list[Contender]
    cells: list[Cell]
    records: Records
    states: dict[str, dict[str, Any]]
    environment: dict[str, Any]
    costs: dict[str, CostTable | str] = field(default_factory=dict)
    partial: bool = False


def check_batches(chosen: BenchOptions) -> None:
    """Raises UsageError for a batch that the engine cannot decode together."""
    if (largest := max(chosen.batch)) > own.Peer.max_batch:
        raise UsageError(
            f"--batch {largest} is larger than this engine's maximum, {own.Peer.max_batch} "
            f"requests at a time; give --batch {own.Peer.max_batch} or less."
        )


def run_bench(
    chosen: BenchOptions,
    folders: Sequence[Path],
    sets: Sequence[PromptSet],
    target: TargetFolder | None,
    out: Path,
    trace: Path | None = None,
    *,
    fresh: bool = False,
) -> Bench:
    """Measure into `out`, or go on unless all is to be measured anew (`fresh`).

    Raises UsageError before any work for what does not fit together, CheckFailed where one of our
    own engines fails.
    """
    engines = read_engines(folders)
    contenders = own_contenders(engines, chosen)
    if target is not None:
        contenders += peer_contenders(chosen, contenders[0].name, target)
    check_distinct(contenders)
    tokenizer = ChatTokenizer.load(folders[0])
    encoded = [(prompts, _encoded(tokenizer, prompts, engines, chosen)) for prompts in sets]
    cells = cells_of(encoded, chosen.temperature, chosen.max_tokens, chosen.batch)
    digest = plan_digest(_facts(chosen, engines, contenders, cells))
    if fresh:
        (out / RECORDS).unlink(missing_ok=True)
    records = Records(out / RECORDS, digest)
    environment = {**machine(), "load_average": os.getloadavg(), "versions": versions()}
    environment["threads"] = chosen.threads or environment["cores"]
    bench = Bench(chosen, engines, contenders, cells, records, {}, environment)
    stops = sorted({*tokenizer.eos_ids, *engines[0].manifest.target.eos_token_ids})
    if trace is not None:
        bench.contenders = [_traced(contender) for contender in contenders]
    with progress("bench") as tell:
        bench.costs = _known_costs(bench, tell)
    with progress("bench") as tell, _opened(bench, target, stops, out, tell) as processes:
        _measure(bench, processes, tell)
        if trace is not None and not bench.partial:  # one may still be at an answer
            _write_trace(trace, processes)
    return bench


def _measure(bench: Bench, processes: dict[str, Process], tell: Tell) -> None:
    """All that is not on record yet, or what is answered until Ctrl-C."""
    chosen, contenders, cells = bench.chosen, bench.contenders, bench.cells
    order = list(turns(cells, [c.name for c in contenders], chosen.repeats))
    try:
        failed = measure(contenders, processes, cells, order, bench.records, chosen.seed, tell)
    except KeyboardInterrupt:
        if not bench.records.found:
            raise
        bench.partial = True
        return
    for name, reason in failed.items():
        bench.states[name]["reason"] = reason


def _known_costs(bench: Bench, tell: Tell) -> dict[str, CostTable | str]:
    """The costs of every engine, measured now where a tree needs them and they are not known."""
    from engines import open_engines
    from runtime.cost_store import known_costs, stored_costs

    threads = bench.environment["threads"]
    needed = {one.model for one in bench.contenders if needs_costs(one)}
    for folder in map(Path, sorted(needed)):
        opened = partial(open_engines, folder, threads=threads)
        known_costs(folder, opened, threads, tell, measure=True)
    return {str(one.folder): stored_costs(one.folder, threads) for one in bench.engines}


def _traced(contender: Contender) -> Contender:
    return replace(contender, options={**contender.options, "trace": contender.name})


def _write_trace(path: Path, processes: dict[str, Process]) -> None:
    from runtime.trace import trace_file

    write_json(path, trace_file([e for process in processes.values() for e in process.events()]))


def _encoded(
    tokenizer: ChatTokenizer,
    prompts: PromptSet,
    engines: Sequence[EngineFacts],
    chosen: BenchOptions,
) -> list[list[int]]:
    """Token ids of every prompt. Raises UsageError for one that leaves no room for its answer."""
    context = min(one.manifest.max_context for one in engines)
    found = []
    for prompt in prompts.prompts:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}])
        if len(ids) + max(chosen.max_tokens) > context:
            raise UsageError(
                f"prompt {prompt.name} has {len(ids)} tokens and its answer up to "
                f"{max(chosen.max_tokens)}; the engine's context holds {context}: shorten or "
                "remove it, or give a smaller --max-tokens."
            )
        found.append(ids)
    return found


def _facts(
    chosen: BenchOptions,
    engines: Sequence[EngineFacts],
    contenders: Sequence[Contender],
    cells: Sequence[Cell],
) -> dict[str, Any]:
    """What records depend on."""
    return {
        "options": chosen.model_dump(mode="json"),
        "engines": [one.fingerprint for one in engines],
        "contenders": [vars(contender) for contender in contenders],
        "cells": [[cell.ids, cell.temperature, cell.max_tokens, cell.batch] for cell in cells],
        "versions": versions(),
        "records": FORM,
    }


@contextmanager
def _opened(
    bench: Bench, target: TargetFolder | None, stops: list[int], out: Path, tell: Tell
) -> Iterator[dict[str, Process]]:
    """The processes of all contenders whose model could be opened, by name."""
    processes: dict[str, Process] = {}
    threads = bench.environment["threads"]
    try:
        for contender in bench.contenders:
            state = bench.states[contender.name] = {"reason": None}
            tell(f"loading {contender.name}", None)
            log = out / "logs" / f"{re.sub('[^A-Za-z0-9._-]+', '-', contender.name)}.log"
            process = Process(contender.adapter, threads, log, contender.python)
            processes[contender.name] = process
            try:
                state["reason"], state["version"] = process.check()
                if state["reason"] is None:
                    model = _model(contender, target, tell)
                    context = min(one.manifest.max_context for one in bench.engines)
                    process.load(Settings(model, threads, stops, context, contender.options))
                    state["load_s"] = process.load_s
            except SlimSpecError as error:
                if contender.kind != "peer":
                    raise CheckFailed(f"{contender.name} could not be loaded: {error}") from None
                state["reason"] = f"could not be loaded: {error}"
            if state["reason"] is not None:
                processes.pop(contender.name).close()
        yield processes
    finally:
        for process in processes.values():
            process.close()


def _model(contender: Contender, target: TargetFolder | None, tell: Tell) -> str:
    if contender.kind != "peer" or target is None:
        return contender.model
    import sys

    python = contender.python or sys.executable
    return str(peer_model(PEERS[contender.name].model, target, python, tell))
