"""The corpus stage: prompts answered by the target itself, here or on servers, or dialogues that
exist already.

The result is an artifact of kind `corpus`. Shards (or a server's answers) are written to a working
folder beside it first, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafter.artifact import (
    MANIFEST,
    fingerprint,
    is_up_to_date,
    read_artifact,
    refuse_foreign,
    sha256_file,
    write_artifact,
)
from drafter.config import read_json
from drafter.disk import atomic_write_json, disk_full_as_error, link_or_copy
from drafter.errors import UsageError
from drafter.sources import TargetFolder
from drafter.tokenizer import ChatTokenizer, vocabulary_sha256
from pipeline.benchmark_marks import refuse_benchmarks
from pipeline.config import CorpusOptions, ServerOptions
from pipeline.corpus_work import Settings, work_folder
from pipeline.output import write_lines
from pipeline.progress import Tell, note, progress
from pipeline.prompts import read_prompts
from pipeline.reports import ArtifactReport
from pipeline.stages import artifact_report, fetch_target
from pipeline.workspace import target_workspace

if TYPE_CHECKING:
    from drafter.decoder import TargetDecoder
    from drafter.generate import GenerateConfig
    from pipeline.regenerate import Regeneration

KIND = "corpus"
FAILURES = "failures.jsonl"
_PROMPTS = "prompts.json"
# How servers are asked, not what for: another address or more patience goes on with a stopped run.
_MANNER = {"server", "api_key_env", "concurrency", "attempts", "request_timeout", "max_failures"}
# What a corpus of servers' answers has nothing of, and how it is divided into files: a stopped run
# of theirs goes on with other values, and a finished one asks nobody again for them.
_NOT_OF_SERVERS = frozenset({"batch", "precision", "keep_states"})
_DIVISION = frozenset({"shard_documents", "shard_megabytes"})


def corpus_stage(options: CorpusOptions, offline: bool | None = None) -> ArtifactReport:
    """Make a corpus, going on with a stopped one. Raises UsageError, or MissingError where a server
    fails.
    """
    _check_server_options(options)
    target = fetch_target(options.target, offline)
    template = _template_options(options, target)
    out = (options.out or target_workspace(target) / "corpus").resolve()
    refuse_foreign(out, KIND)
    inputs = {"target": target.fingerprint}
    if options.prompts is not None:
        inputs["prompts"] = sha256_file(_existing(options.prompts))
    arguments = _arguments(options)
    tokenizer = vocabulary_sha256(target.path / "tokenizer.json")
    if (finished := _finished(out, options, inputs, arguments, tokenizer)) is not None:
        return finished
    data: dict[str, Any] = {"tokenizer_sha256": tokenizer}
    free = frozenset() if options.server is None else _NOT_OF_SERVERS | _DIVISION
    settings = Settings(inputs, arguments, free)
    with disk_full_as_error(out), work_folder(out, settings) as work:
        with progress("corpus") as tell:
            if options.server is not None:
                answers = _ask(target, options, template, work, tell)
            else:
                data["documents"] = _answer(target, options, template, work, tell, tokenizer)
        with write_artifact(out, KIND, target.name, inputs, arguments, data) as folder:
            if options.server is not None:
                data |= _write_answers(answers, options, folder, tokenizer)
            else:
                _link_shards(work, folder)
    return _report(out, up_to_date=False)


def dialogues_corpus(file: Path, out: Path, vocab_size: int, tokenizer: str | None = None) -> Path:
    """A corpus artifact from a JSONL file of dialogues (see `drafter.corpus.read_dialogues`)."""
    from drafter.corpus import read_dialogues, write_shards

    inputs = {"dialogues": dialogues_fingerprint(file)}
    arguments = {"vocab_size": vocab_size}
    if not is_up_to_date(out, KIND, inputs, arguments):
        note(f"reading the dialogues of {file}")
        data = {} if tokenizer is None else {"tokenizer_sha256": tokenizer}
        with write_artifact(out, KIND, file.name, inputs, arguments, data) as folder:
            write_shards(folder, read_dialogues(file, vocab_size), tokenizer=tokenizer)
    return out


def dialogues_fingerprint(file: Path) -> str:
    """Hex SHA-256 of a file of dialogues. Raises UsageError where there is none."""
    return sha256_file(_existing(file))


def corpus_fingerprint(folder: Path) -> str:
    """Hex SHA-256 of a corpus: of its artifact, or of the shards of a plain folder.

    Raises UsageError for a damaged corpus or a folder without shards.
    """
    from drafter.corpus import shards

    if (folder / MANIFEST).exists():
        return fingerprint(read_artifact(folder, KIND, mend="pipeline corpus"))
    hashes = "".join(f"{path.name} {sha256_file(path)}\n" for path in shards(folder))
    return hashlib.sha256(hashes.encode()).hexdigest()


def _arguments(options: CorpusOptions) -> dict[str, Any]:
    """What decides the corpus; options of servers only where one is asked."""
    excluded = {"target", "prompts", "out", *_MANNER}
    excluded |= {*ServerOptions.model_fields} if options.server is None else _NOT_OF_SERVERS
    return options.model_dump(mode="json", exclude=excluded)


def _finished(
    out: Path,
    options: CorpusOptions,
    inputs: dict[str, str],
    arguments: dict[str, Any],
    tokenizer: str,
) -> ArtifactReport | None:
    """The corpus that is there already; of servers' answers, in files of other sizes where those
    are asked for now.
    """
    asked = options.server is not None
    free = _NOT_OF_SERVERS if asked else frozenset[str]()  # earlier versions put them on record
    if is_up_to_date(out, KIND, inputs, arguments, verify="size", free=free):
        return _report(out, up_to_date=True)
    if asked and is_up_to_date(out, KIND, inputs, arguments, free=free | _DIVISION):
        _divide_again(out, options, inputs, arguments, tokenizer)
        return _report(out, up_to_date=False)
    return None


def _divide_again(
    out: Path,
    options: CorpusOptions,
    inputs: dict[str, str],
    arguments: dict[str, Any],
    tokenizer: str,
) -> None:
    """The same answers and failures in files of other sizes."""
    from drafter.corpus import ShardLimits, StoredCorpus, write_shards

    note(f"the answers of {out} are divided into files anew; no server is asked")
    old, texts = read_artifact(out, KIND), StoredCorpus(out)
    limits = ShardLimits(options.shard_documents, options.shard_megabytes)
    with write_artifact(out, KIND, old.name, inputs, arguments, old.data) as folder:
        write_shards(folder, (texts[i] for i in range(len(texts))), limits, tokenizer)
        if FAILURES in old.files:
            link_or_copy(out / FAILURES, folder / FAILURES)


def _check_server_options(options: CorpusOptions) -> None:
    """Raises UsageError for options that need each other, or do not go together."""
    if options.server is None:
        for name in ("model", "api_key_env"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} needs --server URL.")
        return
    for name in ("model", "prompts"):
        if getattr(options, name) is None:
            raise UsageError(f"--server needs --{name}.")
    if options.keep_states:
        raise UsageError(
            "--keep-states and --server were both given, but a server tells nothing of its states; "
            "drop one: `pipeline train` captures them."
        )


def _template_options(options: CorpusOptions, target: TargetFolder) -> dict[str, Any]:
    """Variables of the chat template. Raises UsageError where it does not know thinking."""
    if options.thinking == "template":
        return {}
    if not ChatTokenizer.load(target.path).knows("enable_thinking"):
        raise UsageError(
            f"--thinking is {options.thinking}, but the chat template of {options.target} has no "
            "enable_thinking; drop the option."
        )
    return {"enable_thinking": options.thinking == "on"}


def _ask(
    target: TargetFolder, options: CorpusOptions, template: dict[str, Any], work: Path, tell: Tell
) -> Regeneration:
    """All prompts answered by servers, into the log in `work`."""
    from pipeline.answer_log import AnswerLog
    from pipeline.chat_server import ChatServer, Retries
    from pipeline.regenerate import Asking, Regeneration

    assert options.server is not None
    assert options.model is not None
    prompts = _prompt_texts(options)
    asking = Asking(
        prompts,
        options.temperatures,
        options.max_tokens,
        options.seed,
        options.max_failures,
        template,
    )
    server = ChatServer(
        options.server.split(","),
        options.model,
        _api_key(options.api_key_env),
        options.request_timeout,
        options.concurrency,
        Retries(options.attempts),
    )
    answers = Regeneration(asking, ChatTokenizer.load(target.path), AnswerLog(work, len(prompts)))
    answers.run(server, tell)
    return answers


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UsageError(f"--api-key-env names {variable}, which is not set; set it to the key.")
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{variable} holds characters that no key has; set it to the key alone.")
    return key


def _write_answers(
    answers: Regeneration, options: CorpusOptions, folder: Path, tokenizer: str
) -> dict[str, Any]:
    """Answers as shards, and the prompts that have none; returns what the manifest says of them."""
    from drafter.corpus import ShardLimits, write_shards

    limits = ShardLimits(options.shard_documents, options.shard_megabytes)
    write_shards(folder, answers.documents(), limits, tokenizer)
    if failures := answers.failures():
        write_lines(folder / FAILURES, failures)
        note(
            f"{len(failures)} prompts have no answer: {FAILURES} in the corpus says why; they are "
            "not asked again, for the corpus is finished"
        )
    return {
        "documents": len(answers.log.answered),
        "failures": len(failures),
        **answers.counts(),
    }


def _link_shards(work: Path, folder: Path) -> None:
    for shard in sorted(work.rglob("shard-*.safetensors")):
        place = folder / shard.relative_to(work)
        place.parent.mkdir(exist_ok=True)
        link_or_copy(shard, place)


def _answer(
    target: TargetFolder,
    options: CorpusOptions,
    template: dict[str, Any],
    work: Path,
    tell: Tell,
    tokenizer: str,
) -> int:
    """All prompts answered by the target here, into shards in `work`; returns their number."""
    import torch

    from drafter.checkpoint import load_target
    from drafter.generate import GenerateConfig, generate_corpus

    tell("loading the target", None)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    model = load_target(target.path, dtype=dtype)
    config = GenerateConfig(
        max_new_tokens=options.max_tokens,
        **options.model_dump(
            include={
                "temperatures",
                "batch",
                "seed",
                "keep_states",
                "shard_documents",
                "shard_megabytes",
            }
        ),
    )
    chat = ChatTokenizer.load(target.path)
    prompts: Sequence[Sequence[int]]
    if options.prompts is not None:
        prompts = [
            chat.apply_chat_template([{"role": "user", "content": text}], **template)
            for text in _prompt_texts(options)
        ]
    else:
        prompts = _own_prompts(options.count, template, work, model, chat, config, tell)
    generate_corpus(
        model,
        prompts,
        work,
        config,
        lambda done, total: tell(f"answered {done} of {total} prompts", done / total),
        target.fingerprint,
        tokenizer,
    )
    return len(prompts)


def _prompt_texts(options: CorpusOptions) -> list[str]:
    """The prompts of the file; none of them is one to measure with."""
    assert options.prompts is not None
    every = read_prompts(options.prompts).prompts
    chosen = every[: options.count]
    if len(chosen) < len(every):
        note(f"of {len(every)} prompts the first {len(chosen)} are answered: --count says so")
    refuse_benchmarks((prompt.text for prompt in chosen), str(options.prompts))
    return [prompt.text for prompt in chosen]


def _own_prompts(
    count: int,
    template: dict[str, Any],
    work: Path,
    model: TargetDecoder,
    tokenizer: ChatTokenizer,
    config: GenerateConfig,
    tell: Tell,
) -> Sequence[Sequence[int]]:
    """Prompts that the target writes itself, kept for the next start."""
    from drafter.generate import self_prompts

    kept = work / _PROMPTS
    if not kept.exists():
        made = self_prompts(
            model,
            tokenizer,
            count,
            config,
            progress=lambda done, total: tell(
                f"the target wrote {done} of {total} user turns", done / total
            ),
            options=template,
        )
        atomic_write_json(kept, {"prompts": made})
    prompts: list[list[int]] = read_json(kept)["prompts"]
    return prompts


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UsageError(f"the file {path} does not exist.")
    return path


def _report(out: Path, up_to_date: bool) -> ArtifactReport:
    manifest = read_artifact(out, KIND, verify=False)
    report = artifact_report(manifest, out)
    return report.model_copy(update={"up_to_date": up_to_date, "details": dict(manifest.data)})
