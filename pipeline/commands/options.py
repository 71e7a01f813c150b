"""Options that several commands share, with one wording each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from drafter.errors import UsageError
from pipeline.config import (
    BuildOptions,
    CompareOptions,
    CorpusOptions,
    DecodeOptions,
    RunOptions,
    ShapeOptions,
    default,
    options,
)


def option(*names: str, help: str, default: str | None = None, **more: Any) -> Any:
    """A typer option. Its value None means "as the config or the default says": `default`."""
    shown = help if default is None else f"{help} [default: {default}]"
    return typer.Option(*names, help=shown, show_default=False, **more)


Target = Annotated[
    str | None,
    option(
        "--target",
        help="Built-in name, Hugging Face id or folder, or a .gguf file.",
        default=default(RunOptions, "target"),
    ),
]
Drafter = Annotated[
    str | None,
    option("--drafter", help="Drafter folder, or the name of one that comes with this package."),
]
Out = Annotated[
    Path | None, option("--out", help="Folder to write.", default="in the cache's workspace")
]
EngineDir = Annotated[
    Path | None, option("--engine", help="Engine folder.", default="the one built last")
]
Json = Annotated[bool, option("--json", help="Print one JSON value on standard output.")]
TraceFile = Annotated[
    Path | None,
    option("--trace", help="File for the spans of every round, for Perfetto or Chrome's viewer."),
]
Config = Annotated[
    Path | None, option("--config", help="JSON or TOML file with options; the command line wins.")
]
Prompts = Annotated[
    str | None,
    option(
        "--prompts",
        help="How many MT-Bench prompts; mt-bench, humaneval or gsm8k, with :N for the first N; or "
        'a JSONL file, one {"prompt": "..."} a line.',
        default=default(RunOptions, "prompts"),
    ),
]
Offline = Annotated[
    bool, option("--offline", help="Download nothing (as SLIMSPEC_OFFLINE=1 does).")
]
Backend = Annotated[
    str | None,
    option("--backend", help="onnxruntime or torch.", default=default(BuildOptions, "backend")),
]
Precision = Annotated[
    str | None,
    option(
        "--precision",
        help="Weights: fp32; int8-preview, int8-factors or int8-drafter (the text stays that of "
        "fp32); int8 or int4 (the target too).",
        default=default(BuildOptions, "precision"),
    ),
]
Threads = Annotated[
    int | None, option("--threads", help="Threads of the engine.", default="physical cores")
]
Depth = Annotated[
    int | None, option("--depth", help="Levels of the draft tree.", default="the engine's")
]
Width = Annotated[
    int | None, option("--width", help="Nodes expanded per level.", default="the engine's")
]
Budget = Annotated[
    int | None,
    option("--budget", help="Nodes verified per round, without the root.", default="the engine's"),
]
MinProb = Annotated[
    float | None,
    option("--min-prob", help="Drop nodes less likely than this.", default="the engine's"),
]
MinLevel = Annotated[
    float | None,
    option(
        "--min-level",
        help="Draft no further below a level whose nodes are less likely than this together.",
        default="the engine's",
    ),
]
Lookup = Annotated[
    int | None,
    option(
        "--lookup",
        help="Longest guess from the text so far; 0 leaves the drafter alone.",
        default="the engine's",
    ),
]
MaxTokens = Annotated[
    int | None,
    option(
        "--max-tokens",
        help="Most tokens of an answer.",
        default=default(DecodeOptions, "max_tokens"),
    ),
]
Temperature = Annotated[
    float | None,
    option("--temperature", help="0 is greedy.", default=default(DecodeOptions, "temperature")),
]
Seed = Annotated[
    int | None,
    option("--seed", help="Seed of the sampling.", default=default(DecodeOptions, "seed")),
]


Engines = Annotated[
    list[Path] | None,
    option(
        "--engine",
        help="Engine folder; may be given several times, for drafters of one target.",
        default="the one built last",
    ),
]
PromptSets = Annotated[
    list[str] | None,
    option(
        "--prompts",
        help="As for `run`; may be given several times.",
        default=default(RunOptions, "prompts"),
    ),
]
Temperatures = Annotated[
    list[float] | None,
    option(
        "--temperature",
        help="0 is greedy; may be given several times.",
        default=default(DecodeOptions, "temperature"),
    ),
]
Tree = Annotated[
    str | None,
    option(
        "--tree",
        help="`default`, the engine's, `chain`, or `adaptive`: as large as pays on this machine.",
        default=default(ShapeOptions, "tree"),
    ),
]
Trees = Annotated[
    list[str] | None,
    option(
        "--tree",
        help="`default`, the engine's, `chain`, or `adaptive`; may be given several times.",
        default=default(CompareOptions, "tree"),
    ),
]

ShardMegabytes = Annotated[
    float | None,
    option(
        "--shard-megabytes",
        help="Largest file of a corpus or of captured states.",
        default=default(CorpusOptions, "shard_megabytes"),
    ),
]


def offline(flag: bool) -> bool | None:
    """What `resolve_target` wants: None leaves it to SLIMSPEC_OFFLINE."""
    return True if flag else None


def prompt_options(given: str | None) -> RunOptions:
    """`--prompts` as options; None is the default set. Raises UsageError."""
    return options(RunOptions, **prompts(given))


def prompts(given: str | None) -> dict[str, Any]:
    """`--prompts`, a number, a set (with a number) or a file, as fields of RunOptions. Raises
    UsageError for a set with a number of prompts that it does not have.
    """
    from pipeline.prompt_sets import BENCHMARKS

    if given is None:
        return {}
    if re.fullmatch(r"[+-]?\d{1,18}", given):
        return {"prompts": int(given)}
    name, colon, count = given.partition(":")
    if name not in BENCHMARKS:
        return {"prompt_file": Path(given)}
    most = BENCHMARKS[name].count
    wanted = count if colon else str(most)
    if not re.fullmatch(r"[0-9]{1,18}", wanted) or not 1 <= int(wanted) <= most:
        raise UsageError(
            f"--prompts is '{given}'; {name} takes a whole number from 1 to {most} after the colon."
        )
    return {"prompt_set": name, "prompts": int(wanted)}


def numbers(text: str | None, kind: type[int] | type[float], name: str) -> tuple[float, ...] | None:
    """An option that is numbers with commas between them. Raises UsageError naming it."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        wanted = "2,15,27" if kind is int else "0,0.6,1"
        raise UsageError(
            f"{name} is {text!r}; numbers with commas between them are needed, like {wanted}."
        ) from None
