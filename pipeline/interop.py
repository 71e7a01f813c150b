"""The stages that write a drafter for other engines, saying how alike the two are, and read one."""

from __future__ import annotations

import hashlib
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafter.artifact import (
    Manifest,
    is_up_to_date,
    read_artifact,
    refuse_foreign,
    sha256_file,
    write_artifact,
)
from drafter.config import DrafterConfig, read_drafter_config, read_json
from drafter.errors import UsageError
from drafter.sources import TargetFolder
from drafter.sources.folder import weight_files
from drafter.tokenizer import vocabulary_sha256
from pipeline.corpora import corpus_fingerprint
from pipeline.progress import note, progress
from pipeline.prompts import own_prompts
from pipeline.reports import ArtifactReport
from pipeline.stages import DRAFTER_KIND, artifact_report
from pipeline.workspace import target_workspace

if TYPE_CHECKING:
    from torch import Tensor

    from drafter.decoder import TargetDecoder
    from drafter.eagle3 import Drafter
    from drafter.tokenizer import ChatTokenizer

KIND = "eagle3"
IMPORTED = "drafter-imported"  # folder in the target's workspace
_PROMPTS = 8  # all there are


def interop_stage(
    target: TargetFolder,
    folder: Path,
    layout: str,
    precision: str,
    *,
    verifier: str | None = None,
    corpus: Path | None = None,
    out: Path | None = None,
) -> ArtifactReport:
    """Write the drafter in `folder` as an EAGLE-3 checkpoint, or find it written.

    `verifier`: what a checkpoint of speculators calls its target. `corpus`: a folder with captured
    states, on which the two heads are compared as well. Raises UsageError.
    """
    from drafter.interop import check_format

    config = read_drafter_config(folder)
    check_format(layout, precision, config)
    out = (out or target_workspace(target) / f"drafter-{layout}").resolve()
    refuse_foreign(out, KIND)
    inputs = {"target": target.fingerprint, "drafter": _checkpoint_hash(folder)}
    arguments = {"format": layout, "precision": precision}
    if layout == "speculators":
        arguments["verifier"] = verifier or _public_name(target)
    elif verifier is not None:
        raise UsageError(f"--verifier is for --format speculators, not for {layout}; drop it.")
    if corpus is not None:
        corpus = _captured_folder(corpus, config, target)
        inputs["corpus"] = corpus_fingerprint(corpus)
    done = is_up_to_date(out, KIND, inputs, arguments)
    if not done:
        _write(target, folder, out, inputs, arguments, corpus)
    manifest = read_artifact(out, KIND, verify=False)
    return _report(manifest, out, done, {**arguments, **manifest.data})


def _write(
    target: TargetFolder,
    folder: Path,
    out: Path,
    inputs: dict[str, str],
    arguments: dict[str, str],
    corpus: Path | None,
) -> None:
    from drafter.agreement import agreements
    from drafter.checkpoint import load_drafter, load_target
    from drafter.interop import DTYPES, write_eagle3

    layout, precision = arguments["format"], arguments["precision"]
    with progress("export-drafter") as tell:
        tell("loading target and drafter", None)
        model = load_target(target.path, read_drafter_config(folder).taps)
        drafter = load_drafter(folder, model)
        tell("comparing", None)
        states = _states(drafter, model, target, corpus)
        alike = [found.to_json() for found in agreements(drafter, DTYPES[precision], states)]
        data = {"variants": drafter.config.variants, "agreement": alike}
        about = {
            "name": arguments.get("verifier"),
            "architectures": read_json(target.path / "config.json").get("architectures", []),
        }
        tell("writing", None)
        with write_artifact(out, KIND, target.name, inputs, arguments, data) as temporary:
            write_eagle3(drafter, temporary, layout, precision, about)


def import_stage(
    target: TargetFolder,
    source: Path,
    tap_ids: str | None,
    norm_output: str | None = None,
    out: Path | None = None,
) -> ArtifactReport:
    """Read a published EAGLE-3 checkpoint into a drafter artifact, or find it read. Raises
    UsageError.

    Not to where `pipeline train` writes by default: hours of work would be replaced.
    """
    if not (source / "config.json").is_file():
        raise UsageError(f"{source} has no config.json; give the folder of a checkpoint.")
    out = (out or target_workspace(target) / IMPORTED).resolve()
    refuse_foreign(out, DRAFTER_KIND)
    inputs = {"target": target.fingerprint, "checkpoint": _checkpoint_hash(source)}
    arguments = {"tap_ids": tap_ids, "norm_output": norm_output}
    done = is_up_to_date(out, DRAFTER_KIND, inputs, arguments)
    if not done:
        _read(target, source, out, inputs, arguments)
    found = read_drafter_config(out)
    details = {
        "head": found.head,
        "taps": found.taps,
        "variants": found.variants,
        "draft_vocab_size": found.draft_vocab_size,
        "own_embedding_bytes": _own_embedding_bytes(found),
    }
    return _report(read_artifact(out, DRAFTER_KIND, verify=False), out, done, details)


def _own_embedding_bytes(config: DrafterConfig) -> int:
    """What a table of the drafter's own adds to an engine, where it is fp32; 0 without one."""
    return 4 * config.vocab_size * config.target_hidden_size if config.own_embedding else 0


def _read(
    target: TargetFolder,
    source: Path,
    out: Path,
    inputs: dict[str, str],
    arguments: dict[str, str | None],
) -> None:
    import torch

    from drafter.checkpoint import load_target, save_drafter
    from drafter.published import read_eagle3

    with progress("import-drafter") as tell:
        tell("loading target and drafter", None)
        model = load_target(target.path)
        drafter = read_eagle3(source, model, arguments["tap_ids"], arguments["norm_output"])
        drafter.config = drafter.config.model_copy(
            update={"tokenizer_sha256": vocabulary_sha256(target.path / "tokenizer.json")}
        )
        with write_artifact(out, DRAFTER_KIND, target.name, inputs, arguments, {}) as temporary:
            # holds them all to the bit: of float16 and bfloat16 that is float32
            dtypes = (t.dtype for t in drafter.state_dict().values() if t.is_floating_point())
            save_drafter(drafter, temporary, reduce(torch.promote_types, dtypes))
    if drafter.config.own_embedding:
        note(
            "the checkpoint embeds tokens by a table of its own, not the target's: "
            f"{_own_embedding_bytes(drafter.config) / 1e6:.1f} MB more in an engine"
        )


def _public_name(target: TargetFolder) -> str:
    """A name that other projects can load the target by: its Hugging Face id, else its folder."""
    from drafter.sources.hub import HUB_ID

    is_id = HUB_ID.fullmatch(target.source) and not Path(target.source).exists()
    return target.source.partition("@")[0] if is_id else str(target.path.resolve())


def _report(manifest: Manifest, out: Path, done: bool, details: dict[str, Any]) -> ArtifactReport:
    report = artifact_report(manifest, out)
    return report.model_copy(update={"up_to_date": done, "details": details})


def _checkpoint_hash(folder: Path) -> str:
    """Hex SHA-256 over a checkpoint's config and weights. Raises UsageError."""
    hashes = "".join(map(sha256_file, (folder / "config.json", *weight_files(folder))))
    return hashlib.sha256(hashes.encode()).hexdigest()


def _captured_folder(corpus: Path, config: DrafterConfig, target: TargetFolder) -> Path:
    """Where a corpus, or a training run, has its captured states. Raises UsageError."""
    from drafter.capture import CAPTURED
    from drafter.corpus import shards
    from drafter.documents import is_captured_from

    folder = corpus / CAPTURED if (corpus / CAPTURED).is_dir() else corpus
    for path in shards(folder):
        if not is_captured_from(path, config.taps, target.fingerprint):
            raise UsageError(
                f"{path} does not hold taps {list(config.taps)} of this target; give --corpus the "
                "folder of `pipeline corpus --keep-states` or of a training run of this drafter."
            )
    return folder


def _states(
    drafter: Drafter, model: TargetDecoder, target: TargetFolder, corpus: Path | None
) -> dict[str, Tensor]:
    """What the head reads: of normal states, on a few prompts of our own, on a corpus."""
    import torch

    from drafter.agreement import captured_states, normal_states
    from drafter.capture import capture, read_captured
    from drafter.corpus import document
    from drafter.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer.load(target.path)
    texts = [_prompt_ids(tokenizer, prompt.text) for prompt in own_prompts(_PROMPTS).prompts]
    found = {
        "normal": normal_states(drafter),
        "prompts": captured_states(
            drafter, list(capture(model, [document(text, []) for text in texts]))
        ),
    }
    if corpus is not None:
        found["corpus"] = captured_states(drafter, read_captured(corpus))
    return {name: states.to(torch.float32) for name, states in found.items()}


def _prompt_ids(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """A user's turn in the target's template; plain text for a base model, which has none."""
    if not tokenizer.has_template:
        return tokenizer.encode(text)
    return tokenizer.apply_chat_template([{"role": "user", "content": text}])


def said_of(agreements: list[dict[str, Any]]) -> list[str]:
    """The comparisons in words, what is lost at the end."""
    whose = {"written": "the dense matrix", "product": "the product of the factors"}
    said = []
    for row in agreements:
        error = row["max_logit_error"]
        said.append(
            f"{whose[row['matrix']]} against our {row['against']}, {row['positions']} positions "
            f"({row['states']}): same best token {row['top_1']:.2%}, same best 5 {row['top_5']:.2%}"
            + ("" if error is None else f", largest score error {error:.2g}")
        )
    lost = [row for row in agreements if (row["matrix"], row["against"]) == ("product", "head")]
    if lost:
        said.append(
            "our head rescores its candidates with the target's own rows, so those were written; "
            "where the best differs, it lies outside of our preview. The product of the factors "
            f"alone would name our best token at {lost[-1]['top_1']:.2%} of {lost[-1]['states']}"
        )
    return [*said, "the dense matrix has none of the low-rank head's speed"]
