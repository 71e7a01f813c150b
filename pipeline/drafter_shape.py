"""The drafter that `pipeline train` makes: its shape from the options, what it may start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drafter.config import (
    VARIANTS,
    DrafterConfig,
    TargetConfig,
    checked_drafter_config,
    default_top_k,
    drafter_config_for,
    read_drafter_config,
)
from drafter.errors import UsageError
from drafter.sources import TargetFolder
from drafter.sources.folder import weights_fingerprint
from drafter.tokenizer import vocabulary_sha256
from pipeline.config import DrafterOptions, TrainOptions
from pipeline.draft_vocabulary import AUTO, check_vocabulary_options
from pipeline.given import option_name, refuse_given
from pipeline.stages import find_drafter


def drafter_config(
    options: TrainOptions, target: TargetFolder, shape: TargetConfig
) -> DrafterConfig:
    """The drafter to train. Raises UsageError for a rank, tap or rescoring that does not fit."""
    from drafter.heads import HEADS

    if options.start is not None:
        return _started_config(options, target, shape)
    if options.head not in HEADS:
        raise UsageError(f"--head is '{options.head}'; known heads: {', '.join(sorted(HEADS))}.")
    low_rank = options.head == "low_rank"
    if not low_rank:
        lost = f"is for the low_rank head, --head is {options.head}"
        refuse_given(options, {"rank", "rescore", "head_init"}, lost)
    changes: dict[str, Any] = {}
    if options.body is not None:
        refuse_given(options, {"from_target"}, "is for a fresh layer, --body was given")
        body = read_drafter_config(find_drafter(target, options.body))
        changes["own_embedding"] = body.own_embedding
    check_vocabulary_options(options)
    size = options.draft_vocab
    if size in (None, AUTO):  # what the search finds takes the place of the quarter
        size = max(1, shape.vocab_size // 4)
    changes |= {
        "head": options.head,
        "draft_vocab_size": size if options.head == "truncated" else None,
        "lm_head_rank": options.rank,
        "rescore": min(options.rescore, shape.vocab_size) if low_rank else 0,
        "tokenizer_sha256": vocabulary_sha256(target.path / "tokenizer.json"),
    }
    if options.taps is not None:
        changes["taps"] = options.taps
    for name in options.variant:
        if name not in VARIANTS:
            raise UsageError(f"--variant is '{name}'; known variants: {', '.join(VARIANTS)}.")
        changes[name] = True
    return drafter_config_for(shape, **changes)


def start_fingerprint(option: str, start: Path, out: Path) -> str:
    """Hex SHA-256 of the weights that training starts from (`option`: start or body). Raises
    UsageError for a damaged drafter, or when the result would replace it.
    """
    from drafter.checkpoint import check_weights

    if start.resolve() == out.resolve():
        raise UsageError(f"--{option} and --out are both {out}; give another --out folder.")
    check_weights(start)  # found now, not after the capture
    return weights_fingerprint(start)


def _started_config(
    options: TrainOptions, target: TargetFolder, shape: TargetConfig
) -> DrafterConfig:
    """The shape of the drafter that training goes on from; options of the shape would be lost."""
    from drafter.checkpoint import check_fits

    assert options.start is not None
    if lost := sorted(options.model_fields_set & {*DrafterOptions.model_fields} - {"start"}):
        raise UsageError(
            f"--{option_name(options, lost[0])} and --start were both given; with --start shape "
            f"and weights are those of the drafter in {options.start}: drop one of them."
        )
    folder = find_drafter(target, options.start)
    found = read_drafter_config(folder)
    check_fits(found, shape, folder)
    tokenizer = vocabulary_sha256(target.path / "tokenizer.json")
    if found.tokenizer_sha256 not in (None, tokenizer):
        raise UsageError(
            f"the drafter in {folder} was trained for another tokenizer than that of "
            f"{options.target}; drop --start, or train on for its own target."
        )
    # No weight depends on how many candidates come back.
    top_k = default_top_k(found.rescore, found.draft_vocab_size or found.vocab_size)
    return checked_drafter_config({**found.model_dump(), "top_k": top_k}, str(folder))
