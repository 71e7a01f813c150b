"""The stages that write a drafter for other engines, saying how alike the two are, and read one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafter.artifact import read_artifact, refuse_foreign, sha256_file, write_artifact
from drafter.config import read_json
from drafter.errors import UsageError
from drafter.sources import TargetFolder
from drafter.sources.folder import weight_files
from drafter.tokenizer import vocabulary_sha256
from pipeline.progress import progress
from pipeline.prompts import own_prompts
from pipeline.reports import ArtifactReport
from pipeline.stages import DRAFTER_KIND, artifact_report
from pipeline.workspace import target_workspace

if TYPE_CHECKING:
    from drafter.decoder import TargetDecoder
    from drafter.eagle3 import Drafter

KIND = "eagle3"
_CANDIDATES = 8
_PROMPTS = 4


def interop_stage(
    target: TargetFolder, folder: Path, layout: str, precision: str, out: Path | None = None
) -> ArtifactReport:
    """Write the drafter in `folder` as an EAGLE-3 checkpoint. Raises UsageError."""
    from drafter.checkpoint import load_drafter, load_target
    from drafter.config import read_drafter_config
    from drafter.interop import check_format, write_eagle3

    check_format(layout, precision)
    out = (out or target_workspace(target) / f"drafter-{layout}").resolve()
    refuse_foreign(out, KIND)
    with progress("export-drafter") as tell:
        tell("loading target and drafter", None)
        model = load_target(target.path, read_drafter_config(folder).taps)
        drafter = load_drafter(folder, model)
        tell("comparing", None)
        alike = agreement(drafter, model, _texts(target))
        about = {
            "name": target.source or target.name,
            "architectures": read_json(target.path / "config.json").get("architectures", []),
        }
        inputs = {
            "target": target.fingerprint,
            "drafter": sha256_file(weight_files(folder)[0]),
        }
        arguments = {"format": layout, "precision": precision}
        tell("writing", None)
        with write_artifact(out, KIND, target.name, inputs, arguments, alike) as temporary:
            write_eagle3(drafter, temporary, layout, precision, about)
    report = artifact_report(read_artifact(out, KIND, verify=False), out)
    return report.model_copy(update={"details": {**arguments, **alike}})


def import_stage(
    target: TargetFolder, source: Path, tap_ids: str | None, out: Path | None = None
) -> ArtifactReport:
    """Read a published EAGLE-3 checkpoint into a drafter artifact. Raises UsageError."""
    from drafter.checkpoint import load_target, save_drafter
    from drafter.published import read_eagle3

    if not (source / "config.json").is_file():
        raise UsageError(f"{source} has no config.json; give the folder of a checkpoint.")
    out = (out or target_workspace(target) / "drafter").resolve()
    refuse_foreign(out, DRAFTER_KIND)
    with progress("import-drafter") as tell:
        tell("loading target and drafter", None)
        model = load_target(target.path)
        drafter = read_eagle3(source, model, tap_ids)
        drafter.config = drafter.config.model_copy(
            update={"tokenizer_sha256": vocabulary_sha256(target.path / "tokenizer.json")}
        )
        hashes = "".join(map(sha256_file, weight_files(source)))
        inputs = {
            "target": target.fingerprint,
            "checkpoint": hashlib.sha256(hashes.encode()).hexdigest(),
        }
        arguments = {"tap_ids": tap_ids}
        with write_artifact(out, DRAFTER_KIND, target.name, inputs, arguments, {}) as temporary:
            widest = max((p.dtype for p in drafter.parameters()), key=lambda kind: kind.itemsize)
            save_drafter(drafter, temporary, widest)
    found = drafter.config
    report = artifact_report(read_artifact(out, DRAFTER_KIND, verify=False), out)
    details = {"head": found.head, "taps": found.taps, "draft_vocab_size": found.draft_vocab_size}
    return report.model_copy(update={"details": details})


def _texts(target: TargetFolder) -> list[list[int]]:
    from drafter.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer.load(target.path)
    return [tokenizer.encode(prompt.text) for prompt in own_prompts(_PROMPTS).prompts]


def agreement(drafter: Drafter, target: TargetDecoder, texts: list[list[int]]) -> dict[str, Any]:
    """How often our head and the dense matrix written for others name the same best candidates, on
    the drafter's states after every token of some texts: the best one, and all of the best 8.
    """
    import torch

    from drafter.decoder import causal_mask
    from drafter.heads.top_k import largest
    from drafter.heads.truncated import TruncatedHead
    from drafter.interop import dense_head

    matrix = dense_head(drafter)
    same, first, positions = 0, 0, 0
    for text in texts:
        ids, n = torch.tensor([text]), len(text)
        with torch.no_grad():
            past = target.empty_past(1)
            where = torch.arange(n)[None]
            taps = target(ids, where, causal_mask(1, n), past, past).taps
            none = torch.zeros(1, 0, drafter.config.kv_size)
            out = drafter.extend(
                ids[:, 1:], taps[:, :-1], where[:, :-1], causal_mask(1, n - 1), none, none
            )
            h = drafter.head_input(out.state)[0]  # [n - 1, H]
            ours = drafter.lm_head.top_k(h, _CANDIDATES).ids  # type: ignore[operator]
            theirs = largest(h @ matrix.T, _CANDIDATES)[1]
            if isinstance(drafter.lm_head, TruncatedHead):
                theirs = drafter.lm_head.draft_ids[theirs]
        first += int((ours[:, 0] == theirs[:, 0]).sum())
        same += int((ours[:, :, None] == theirs[:, None]).sum())
        positions += n - 1
    return {
        "top_1_agreement": first / positions,
        "top_8_agreement": same / (_CANDIDATES * positions),
        "positions": positions,
    }
