"""`bench`: plain and speculative decoding, and what else a machine offers, side by side."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from drafter.errors import CheckFailed, MissingError, UsageError
from pipeline.commands import options as o
from pipeline.config import BenchOptions, default, options
from pipeline.output import check_writable, print_json, print_tables, print_text, write_json

if TYPE_CHECKING:
    from drafter.sources.folder import TargetFolder
    from pipeline.bench.report import BenchReport
    from pipeline.prompts import PromptSet


def bench(
    prompts: o.PromptSets = None,
    engine: o.Engines = None,
    tree: o.Trees = None,
    temperature: o.Temperatures = None,
    max_tokens: Annotated[
        list[int] | None,
        o.option(
            "--max-tokens",
            help="Most tokens of an answer; may be given several times.",
            default=default(BenchOptions, "max_tokens"),
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        o.option(
            "--batch",
            help="Requests decoded together; may be given several times.",
            default=default(BenchOptions, "batch"),
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        o.option(
            "--repeats", help="Times each answer is made.", default=default(BenchOptions, "repeats")
        ),
    ] = None,
    peers: Annotated[
        bool, o.option("--peers", help="Measure every peer that is installed, too.")
    ] = False,
    peer: Annotated[
        list[str] | None, o.option("--peer", help="Measure this peer; may be given several times.")
    ] = None,
    peer_python: Annotated[
        str | None,
        o.option("--peer-python", help="Interpreter that has the peers.", default="this one"),
    ] = None,
    target: Annotated[
        str | None,
        o.option("--target", help="Target that peers run.", default="what the engine came from"),
    ] = None,
    out: Annotated[
        Path | None, o.option("--out", help="Folder for records and reports.", default="./bench")
    ] = None,
    fresh: Annotated[
        bool, o.option("--fresh", help="Measure anew what is in the folder already.")
    ] = False,
    skip_bad_lines: Annotated[
        bool, o.option("--skip-bad-lines", help="Leave bad lines of a prompt file out.")
    ] = False,
    depth: o.Depth = None,
    width: o.Width = None,
    budget: o.Budget = None,
    min_prob: o.MinProb = None,
    lookup: o.Lookup = None,
    min_level: o.MinLevel = None,
    seed: o.Seed = None,
    threads: o.Threads = None,
    trace: o.TraceFile = None,
    offline: o.Offline = False,
    as_json: o.Json = False,
) -> None:
    """Benchmark plain against speculative decoding, and with --peers other engines. Each runs in a
    process of its own, interleaved and repeated. Writes JSON and an HTML page.

    Exit code 1 where greedy texts differ although the target runs in fp32.

    \b
    Examples:
      pipeline bench --prompts mt-bench --prompts humaneval:40 --out mine
      pipeline bench --engine fp32/engine --engine int8/engine --tree default --tree adaptive
      pipeline bench --prompts mt-bench:16 --batch 1 --batch 4 --batch 8
      pipeline bench --prompts mt-bench:8 --max-tokens 64 --peers --peer-python other/bin/python
    """
    from pipeline.peers.registry import PEERS, check_names

    check_names(peer or [])
    chosen = options(
        BenchOptions,
        tree=tuple(tree) if tree else None,
        temperature=tuple(temperature) if temperature else None,
        max_tokens=tuple(max_tokens) if max_tokens else None,
        batch=tuple(batch) if batch else None,
        repeats=repeats,
        peers=tuple(dict.fromkeys([*(PEERS if peers else ()), *(peer or [])])) or None,
        peer_python=_interpreter(peer_python, bool(peers or peer)),
        depth=depth,
        width=width,
        budget=budget,
        min_prob=min_prob,
        lookup=lookup,
        min_level=min_level,
        seed=seed,
        threads=threads,
    )
    asked = [o.prompt_options(text) for text in (prompts or (None,))]
    folder = out or Path("bench")
    for file in (folder / "bench.json", *([trace] if trace else [])):
        check_writable(file)
    from pipeline.run import choose_prompts
    from pipeline.workspace import last_engine

    if skip_bad_lines and all(one.prompt_file is None for one in asked):
        raise UsageError("--skip-bad-lines needs --prompts FILE; drop it.")
    folders = engine or [last_engine()]
    sets = [choose_prompts(one, o.offline(offline), skip_bad_lines) for one in asked]
    of_peers = _target(target, folders[0], o.offline(offline)) if chosen.peers else None
    _bench(chosen, folders, sets, of_peers, folder, fresh, trace, as_json)


def _bench(
    chosen: BenchOptions,
    folders: list[Path],
    sets: list[PromptSet],
    target: TargetFolder | None,
    out: Path,
    fresh: bool,
    trace: Path | None,
    as_json: bool,
) -> None:
    from pipeline.bench.page import write_page
    from pipeline.bench.run import PAGE, REPORT, check_batches, run_bench
    from pipeline.bench.summary import bench_report
    from pipeline.bench.tables import bench_tables
    from pipeline.progress import note

    check_batches(chosen)
    for one in sets:
        for line in one.skipped:
            note(f"left out: {line}")
    report = bench_report(run_bench(chosen, folders, sets, target, out, trace, fresh=fresh))
    write_json(out / REPORT, report.to_json())
    write_page(out / PAGE, report)
    if report.partial:
        note(f"a report of what was answered until now: {out / PAGE}")
        raise KeyboardInterrupt
    if as_json:
        print_json(report.to_json())
    else:
        print_tables(*bench_tables(report))
        print_text(f"{out / PAGE}")
    _judge(report)


def _judge(report: BenchReport) -> None:
    """Raises CheckFailed for the first row whose texts are not what they must be."""
    from pipeline.bench.summary import different

    for cell in report.cells:
        for row in filter(different, cell.rows):
            lost = (row.compared or 0) - (row.identical or 0)
            raise CheckFailed(
                f"{lost} of {row.compared} texts of {row.contender} on {cell.prompts} at batch "
                f"{cell.batch} differ from plain decoding, none may; run `pipeline check` on its "
                "engine."
            )


def _interpreter(python: str | None, wanted: bool) -> str | None:
    if python is None:
        return None
    if not wanted:
        raise UsageError("--peer-python needs --peers or --peer; drop it or give one.")
    found = shutil.which(python)
    if found is None:
        raise UsageError(f"--peer-python {python} is no program; give the path of an interpreter.")
    return found


def _target(name: str | None, engine: Path, offline: bool | None) -> TargetFolder:
    """The target's folder for the peers. Raises MissingError where nothing says where it is."""
    from drafter.sources import resolve_target
    from pipeline.workspace import sources_of

    sources = sources_of(engine)
    if name is None and (sources is None or not sources.target.is_dir()):
        raise MissingError(
            f"where the target of {engine} lies is not known here, and peers need it; give "
            "--target, the name or folder that the engine was made from."
        )
    return resolve_target(name or str(sources and sources.target), offline=offline, verify="size")
