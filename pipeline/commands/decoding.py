"""`generate`, `evaluate` and `serve`: an engine at work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from drafter.errors import UsageError
from pipeline.commands import options as o
from pipeline.config import (
    CompareOptions,
    DecodeOptions,
    GenerateOptions,
    RunOptions,
    ShapeOptions,
    default,
    options,
)
from pipeline.output import check_writable, print_json, print_tables, print_text, write_lines
from pipeline.tracing import tracing

if TYPE_CHECKING:
    from pipeline.prompts import PromptSet
    from runtime.trace import Trace

Prompt = Annotated[
    str | None, o.option("--prompt", help="The user's message; '-' reads it from standard input.")
]
Stop = Annotated[
    list[str] | None, o.option("--stop", help="End before this text; may be given several times.")
]
TopK = Annotated[
    int | None,
    o.option(
        "--top-k",
        help="Keep the k likeliest tokens; 0 is off.",
        default=default(GenerateOptions, "top_k"),
    ),
]
TopP = Annotated[
    float | None,
    o.option(
        "--top-p",
        help="Keep the likeliest tokens of mass p; 1 is off.",
        default=default(GenerateOptions, "top_p"),
    ),
]
MinP = Annotated[
    float | None,
    o.option(
        "--min-p",
        help="Drop tokens below p times the best; 0 is off.",
        default=default(GenerateOptions, "min_p"),
    ),
]


def generate(
    prompt: Prompt = None,
    engine: o.EngineDir = None,
    max_tokens: o.MaxTokens = None,
    temperature: o.Temperature = None,
    seed: o.Seed = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    stop: Stop = None,
    system: Annotated[str | None, o.option("--system", help="A system message before it.")] = None,
    raw: Annotated[bool, o.option("--raw", help="No chat template: continue the text.")] = False,
    no_speculation: Annotated[
        bool, o.option("--no-speculation", help="Plain decoding on the same engine.")
    ] = False,
    tree: o.Tree = None,
    depth: o.Depth = None,
    width: o.Width = None,
    budget: o.Budget = None,
    min_prob: o.MinProb = None,
    lookup: o.Lookup = None,
    min_level: o.MinLevel = None,
    threads: o.Threads = None,
    trace: o.TraceFile = None,
    as_json: o.Json = False,
) -> None:
    """Answer one prompt. The text streams to standard output.

    \b
    Examples:
      pipeline generate --prompt "Why is the sky blue?"
      pipeline generate --prompt "A short poem" --temperature 0.8 --seed 7 --max-tokens 60
      pipeline generate --prompt "Hello" --no-speculation --json
    """
    from pipeline.workspace import last_engine

    decode = options(
        GenerateOptions,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        threads=threads,
    )
    shape = options(
        ShapeOptions,
        tree=tree,
        depth=depth,
        width=width,
        budget=budget,
        min_prob=min_prob,
        lookup=lookup,
        min_level=min_level,
    )
    asked = _prompt(prompt, system, raw)
    if trace is not None:
        check_writable(trace)
    folder = engine or last_engine()
    with tracing(trace) as spans:
        from pipeline.compare import shaped
        from pipeline.progress import said_once
        from runtime.generator import Generator  # imports PyTorch: after the cheap mistakes

        adaptive = shape.tree == "adaptive" and not no_speculation
        generator = Generator.load(folder, decode.threads, said_once(), adaptive=adaptive)
        if spans is not None:
            generator.track = spans.track(folder.name)
        pieces = generator.stream(
            asked,
            max_tokens=decode.max_tokens,
            temperature=decode.temperature,
            seed=decode.seed,
            top_k=decode.top_k,
            top_p=decode.top_p,
            min_p=decode.min_p,
            stop=stop or (),
            speculate=not no_speculation,
            tree=shaped(generator.tree(decode.temperature), shape.tree, shape),
            raw=raw,
        )
        for piece in pieces:
            if not as_json:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
    assert piece.completion is not None  # the last piece has it
    if as_json:
        print_json(piece.completion.to_json())
    else:
        print_text("")


def evaluate(
    prompts: o.PromptSets = None,
    engine: o.Engines = None,
    max_tokens: o.MaxTokens = None,
    temperature: o.Temperatures = None,
    seed: o.Seed = None,
    seeds: Annotated[
        int | None,
        o.option("--seeds", help="Answers to each prompt above temperature 0.", default="1"),
    ] = None,
    tree: o.Trees = None,
    no_plain: Annotated[
        bool, o.option("--no-plain", help="Leave plain decoding out: no speed-ups.")
    ] = False,
    depth: o.Depth = None,
    width: o.Width = None,
    budget: o.Budget = None,
    min_prob: o.MinProb = None,
    lookup: o.Lookup = None,
    min_level: o.MinLevel = None,
    threads: o.Threads = None,
    details: Annotated[
        Path | None, o.option("--details", help="JSONL file for the figures of every answer.")
    ] = None,
    trace: o.TraceFile = None,
    offline: o.Offline = False,
    as_json: o.Json = False,
) -> None:
    """Measure speculative decoding, of one drafter or of several side by side, interleaved, prompt
    by prompt. Without --no-plain against plain decoding.

    Exit code 1 where greedy texts differ although the target runs in fp32.

    \b
    Examples:
      pipeline evaluate --prompts mt-bench --prompts humaneval:40 --temperature 0 --temperature 1
      pipeline evaluate --engine dense/engine --engine low-rank/engine --no-plain
      pipeline evaluate --tree default --tree chain --details out.jsonl --json
    """
    given: list[float | None] = [*temperature] if temperature else [None]
    decodes = [
        options(DecodeOptions, max_tokens=max_tokens, temperature=t, seed=seed) for t in given
    ]
    chosen = options(
        CompareOptions,
        tree=tuple(tree) if tree else None,
        plain=not no_plain,
        seeds=seeds,
        threads=threads,
        depth=depth,
        width=width,
        budget=budget,
        min_prob=min_prob,
        lookup=lookup,
        min_level=min_level,
    )
    asked = [o.prompt_options(text) for text in prompts] if prompts else [o.prompt_options(None)]
    if details is not None:
        check_writable(details)
    if trace is not None:
        check_writable(trace)
    from pipeline.run import choose_prompts
    from pipeline.workspace import last_engine

    folders = engine or [last_engine()]
    sets = [choose_prompts(one, o.offline(offline)) for one in asked]
    with tracing(trace) as spans:
        _evaluate(folders, sets, decodes, chosen, details, as_json, spans)


def _evaluate(
    folders: list[Path],
    sets: list[PromptSet],
    decodes: list[DecodeOptions],
    chosen: CompareOptions,
    details: Path | None,
    as_json: bool,
    trace: Trace | None,
) -> None:
    from pipeline import evaluate as reporting
    from pipeline.compare import compare_all
    from pipeline.run import check_identical, must_be_identical
    from pipeline.tables import evaluation_tables

    found = compare_all(folders, sets, decodes, chosen, reporting.state, trace)
    known = reporting.environment(folders[0], chosen.threads)
    report = reporting.evaluate_report(found, known)
    if details is not None:
        write_lines(details, reporting.details(found))
    if as_json:
        print_json(report.to_json())
    else:
        print_tables(*evaluation_tables(report, found))
    for one, measured in zip(report.comparisons, found, strict=True):
        if not must_be_identical(known["precision"], one.temperature):
            continue
        judge = "plain decoding" if chosen.plain else f"those of {one.ways[0].name}"
        for way in one.ways:
            check_identical(way.identical, len(measured.answers), way.name, judge, one.prompts)


def serve(
    engine: o.EngineDir = None,
    host: Annotated[str | None, o.option("--host", help="Address.", default="127.0.0.1")] = None,
    port: Annotated[
        int | None, o.option("--port", help="Port; 0 takes a free one.", default="8000")
    ] = None,
    model_name: Annotated[
        str | None, o.option("--model-name", help="Name in /v1/models.", default="the engine's")
    ] = None,
    api_key: Annotated[
        str | None,
        o.option(
            "--api-key",
            help="Key that clients must send; better in SLIMSPEC_API_KEY, where ps cannot see it.",
        ),
    ] = None,
    max_queue: Annotated[
        int | None, o.option("--max-queue", help="Waiting requests before 429.", default="16")
    ] = None,
    max_batch: Annotated[
        int | None,
        o.option(
            "--max-batch",
            help="Requests decoded together.",
            default="twice the threads, at most 8, less where memory is short",
        ),
    ] = None,
    prefix_cache_mib: Annotated[
        int | None,
        o.option(
            "--prefix-cache-mib",
            help="Memory for earlier prompts, which are not computed again; 0: none.",
            default="256",
        ),
    ] = None,
    max_tokens_limit: Annotated[
        int | None,
        o.option("--max-tokens-limit", help="Most a request may ask for.", default="4096"),
    ] = None,
    request_timeout: Annotated[
        float | None,
        o.option("--request-timeout", help="Seconds, waiting included.", default="600"),
    ] = None,
    grace: Annotated[
        float | None,
        o.option("--grace", help="Seconds for accepted requests at shutdown.", default="30"),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        o.option("--cors-origin", help="Origin whose pages may ask; may be given several times."),
    ] = None,
    no_speculation: Annotated[
        bool, o.option("--no-speculation", help="Plain decoding only.")
    ] = False,
    threads: o.Threads = None,
) -> None:
    """Serve an engine over HTTP, OpenAI-compatible: /v1/chat/completions, /v1/completions,
    /v1/models, /health, /metrics. Ctrl-C ends it after the accepted requests.

    \b
    Examples:
      pipeline serve
      SLIMSPEC_API_KEY=secret pipeline serve --host 0.0.0.0 --port 8080
    """
    from pipeline.progress import said_once
    from pipeline.workspace import last_engine
    from runtime.server import ServerSettings
    from runtime.server import serve as run_server

    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "model_name": model_name,
        "api_key": api_key,
        "max_queue": max_queue,
        "max_batch": max_batch,
        "prefix_cache_mib": prefix_cache_mib,
        "max_tokens_limit": max_tokens_limit,
        "request_timeout_s": request_timeout,
        "grace_s": grace,
        "cors_origins": tuple(cors_origin) if cors_origin else None,
        "threads": threads,
        "speculate": not no_speculation,
    }
    called = {name: f"--{name.removesuffix('_s').replace('_', '-')}" for name in given}
    settings = ServerSettings.from_options(
        called, **{name: value for name, value in given.items() if value is not None}
    )
    run_server(engine or last_engine(), settings, said_once())


def _prompt(prompt: str | None, system: str | None, raw: bool) -> str | list[dict[str, str]]:
    if prompt is None:
        raise UsageError(
            "no prompt was given; use --prompt TEXT, or --prompt - for standard input."
        )
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not UTF-8 text (byte {error.start}).") from None
    if not prompt.strip():
        raise UsageError("the prompt is empty; it must hold at least one visible character.")
    if system is None:
        return prompt
    if raw:
        raise UsageError("--system needs the chat template, which --raw leaves out; drop one.")
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def _prompt_options(prompts: str | None) -> RunOptions:
    return options(RunOptions, **o.prompts(prompts))
