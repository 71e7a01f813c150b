"""`corpus`: what a drafter learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pipeline.commands import options as o
from pipeline.config import CorpusOptions, default, options
from pipeline.output import print_artifact


def corpus(
    target: o.Target = None,
    prompts: Annotated[
        Path | None,
        o.option(
            "--prompts",
            help='JSONL file, one {"prompt": "..."} a line; without it the target writes them.',
        ),
    ] = None,
    count: Annotated[
        int | None,
        o.option("--count", help="Dialogues.", default=default(CorpusOptions, "count")),
    ] = None,
    max_tokens: Annotated[
        int | None,
        o.option(
            "--max-tokens",
            help="Most tokens of an answer.",
            default=default(CorpusOptions, "max_tokens"),
        ),
    ] = None,
    temperatures: Annotated[
        str | None,
        o.option(
            "--temperatures",
            help="Taken in turn, comma-separated.",
            default=default(CorpusOptions, "temperatures"),
        ),
    ] = None,
    thinking: Annotated[
        str | None,
        o.option(
            "--thinking",
            help="on or off: enable_thinking of the chat template; template leaves it alone.",
            default=default(CorpusOptions, "thinking"),
        ),
    ] = None,
    server: Annotated[
        str | None,
        o.option(
            "--server",
            help="OpenAI-compatible servers of the target that answer instead, like "
            "http://host:8000/v1, comma-separated.",
        ),
    ] = None,
    model: Annotated[
        str | None, o.option("--model", help="The target's name on those servers.")
    ] = None,
    api_key_env: Annotated[
        str | None,
        o.option("--api-key-env", help="Environment variable that holds the servers' key."),
    ] = None,
    concurrency: Annotated[
        int | None,
        o.option(
            "--concurrency",
            help="Requests at a time.",
            default=default(CorpusOptions, "concurrency"),
        ),
    ] = None,
    attempts: Annotated[
        int | None,
        o.option(
            "--attempts",
            help="How often a prompt is asked while the servers fail.",
            default=default(CorpusOptions, "attempts"),
        ),
    ] = None,
    request_timeout: Annotated[
        float | None,
        o.option(
            "--request-timeout",
            help="Seconds without a reply that count as a failure.",
            default=default(CorpusOptions, "request_timeout"),
        ),
    ] = None,
    max_failures: Annotated[
        float | None,
        o.option(
            "--max-failures",
            help="Share of prompts that may stay without an answer.",
            default=default(CorpusOptions, "max_failures"),
        ),
    ] = None,
    batch: Annotated[
        int | None,
        o.option("--batch", help="Answers at a time.", default=default(CorpusOptions, "batch")),
    ] = None,
    seed: Annotated[
        int | None, o.option("--seed", help="Seed.", default=default(CorpusOptions, "seed"))
    ] = None,
    precision: Annotated[
        str | None,
        o.option("--precision", help="fp32 or bf16.", default=default(CorpusOptions, "precision")),
    ] = None,
    keep_states: Annotated[
        bool | None,
        o.option(
            "--keep-states/--no-keep-states",
            help="Keep what training needs of the target, about 8 bytes a token and hidden unit: "
            "`pipeline train` then needs no pass over the corpus.",
            default="no-keep-states",
        ),
    ] = None,
    shard_documents: Annotated[
        int | None,
        o.option(
            "--shard-documents",
            help="Dialogues of a file.",
            default=default(CorpusOptions, "shard_documents"),
        ),
    ] = None,
    shard_megabytes: o.ShardMegabytes = None,
    out: o.Out = None,
    config: o.Config = None,
    offline: o.Offline = False,
    as_json: o.Json = False,
) -> None:
    """Let the target answer prompts: the on-policy corpus a drafter learns from.

    It answers here, or on servers (--server) that are asked again where they fail. A stopped run
    goes on where it was. Prints the corpus folder.

    \b
    Examples:
      pipeline corpus --count 2000
      pipeline corpus --prompts questions.jsonl --max-tokens 400 --out ./corpus
      pipeline corpus --server http://host:8000/v1 --model my-llama --prompts questions.jsonl
    """
    from pipeline.corpora import corpus_stage

    chosen = options(
        CorpusOptions,
        config,
        target=target,
        prompts=prompts,
        count=count,
        max_tokens=max_tokens,
        temperatures=o.numbers(temperatures, float, "--temperatures"),
        thinking=thinking,
        server=server,
        model=model,
        api_key_env=api_key_env,
        concurrency=concurrency,
        attempts=attempts,
        request_timeout=request_timeout,
        max_failures=max_failures,
        batch=batch,
        precision=precision,
        keep_states=keep_states,
        shard_documents=shard_documents,
        shard_megabytes=shard_megabytes,
        seed=seed,
        out=out,
    )
    print_artifact(corpus_stage(chosen, o.offline(offline)), as_json)
