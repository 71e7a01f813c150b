"""The corpus stage: prompts answered by the target itself, or dialogues that exist already.

The result is an artifact of kind `corpus`. Shards are written to a working folder beside it first,
so that a stopped run goes on with the next shard.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafter.artifact import (
    MANIFEST,
    atomic_write_json,
    disk_full_as_error,
    fingerprint,
    is_up_to_date,
    link_or_copy,
    read_artifact,
    refuse_foreign,
    sha256_file,
    write_artifact,
)
from drafter.config import read_json
from drafter.errors import UsageError
from drafter.sources import TargetFolder
from pipeline.benchmark_marks import refuse_benchmarks
from pipeline.config import CorpusOptions
from pipeline.progress import Tell, note, progress
from pipeline.prompts import read_prompts
from pipeline.reports import ArtifactReport
from pipeline.stages import artifact_report, fetch_target
from pipeline.workspace import target_workspace

KIND = "corpus"
_PROMPTS = "prompts.json"


def corpus_stage(options: CorpusOptions, offline: bool | None = None) -> ArtifactReport:
    """Make a corpus, going on with a stopped one. Raises UsageError."""
    target = fetch_target(options.target, offline)
    out = (options.out or target_workspace(target) / "corpus").resolve()
    refuse_foreign(out, KIND)
    inputs = {"target": target.fingerprint}
    if options.prompts is not None:
        inputs["prompts"] = sha256_file(_existing(options.prompts))
    arguments = options.model_dump(mode="json", exclude={"target", "prompts", "out"})
    if is_up_to_date(out, KIND, inputs, arguments, verify="size"):
        return _report(out, up_to_date=True)
    work = _work_folder(out, {"inputs": inputs, "arguments": arguments})
    with disk_full_as_error(work), progress("corpus") as tell:
        count = _answer(target, options, work, tell)
    with write_artifact(out, KIND, target.name, inputs, arguments, {"documents": count}) as folder:
        for shard in sorted(work.rglob("shard-*.safetensors")):
            place = folder / shard.relative_to(work)
            place.parent.mkdir(exist_ok=True)
            link_or_copy(shard, place)
    shutil.rmtree(work)
    return _report(out, up_to_date=False)


def dialogues_corpus(file: Path, out: Path, vocab_size: int) -> Path:
    """A corpus artifact from a JSONL file of dialogues (see `drafter.corpus.read_dialogues`)."""
    from drafter.corpus import read_dialogues, write_shards

    inputs = {"dialogues": sha256_file(_existing(file))}
    arguments = {"vocab_size": vocab_size}
    if not is_up_to_date(out, KIND, inputs, arguments, verify="size"):
        note(f"reading the dialogues of {file}")
        with write_artifact(out, KIND, file.name, inputs, arguments, {}) as folder:
            write_shards(folder, read_dialogues(file, vocab_size))
    return out


def corpus_fingerprint(folder: Path) -> str:
    """Hex SHA-256 of a corpus: of its artifact, or of the shards of a plain folder.

    Raises UsageError for a damaged corpus or a folder without shards.
    """
    from drafter.corpus import shards

    if (folder / MANIFEST).exists():
        return fingerprint(read_artifact(folder, KIND, mend="pipeline corpus"))
    hashes = "".join(f"{path.name} {sha256_file(path)}\n" for path in shards(folder))
    return hashlib.sha256(hashes.encode()).hexdigest()


def _answer(target: TargetFolder, options: CorpusOptions, work: Path, tell: Tell) -> int:
    import torch

    from drafter.checkpoint import load_target
    from drafter.generate import GenerateConfig, generate_corpus
    from drafter.tokenizer import ChatTokenizer

    tell("loading the target", None)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    model = load_target(target.path, dtype=dtype)
    config = GenerateConfig(
        max_new_tokens=options.max_tokens,
        temperatures=options.temperatures,
        batch=options.batch,
        seed=options.seed,
        keep_states=options.keep_states,
    )
    tokenizer = ChatTokenizer.load(target.path)
    prompts = _prompts(options, work, model, tokenizer, config, tell)
    generate_corpus(
        model,
        prompts,
        work,
        config,
        lambda done, total: tell(f"answered {done} of {total} prompts", done / total),
        target.fingerprint,
    )
    return len(prompts)


def _prompts(
    options: CorpusOptions, work: Path, model: Any, tokenizer: Any, config: Any, tell: Tell
) -> Sequence[Sequence[int]]:
    """Prompt token ids: of the file, or written by the model and kept for the next start."""
    from drafter.generate import self_prompts

    if options.prompts is not None:
        chosen = read_prompts(options.prompts, options.count).prompts
        refuse_benchmarks((prompt.text for prompt in chosen), str(options.prompts))
        return [
            tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}])
            for prompt in chosen
        ]
    kept = work / _PROMPTS
    if not kept.exists():
        made = self_prompts(
            model,
            tokenizer,
            options.count,
            config,
            progress=lambda done, total: tell(
                f"the target wrote {done} of {total} user turns", done / total
            ),
        )
        atomic_write_json(kept, {"prompts": made})
    prompts: list[list[int]] = read_json(kept)["prompts"]
    return prompts


def _work_folder(out: Path, settings: dict[str, Any]) -> Path:
    """The folder of a stopped run of the same settings, else a new one."""
    work = out.with_name(f".{out.name}.work")
    state = work / "settings.json"
    if not state.exists() or read_json(state) != settings:
        shutil.rmtree(work, ignore_errors=True)
        atomic_write_json(state, settings)
    return work


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UsageError(f"the file {path} does not exist.")
    return path


def _report(out: Path, up_to_date: bool) -> ArtifactReport:
    manifest = read_artifact(out, KIND, verify=False)
    report = artifact_report(manifest, out)
    return report.model_copy(update={"up_to_date": up_to_date, "details": dict(manifest.data)})
