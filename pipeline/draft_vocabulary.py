"""Which tokens a truncated head drafts, and how many: chosen once for a run, from what it trains
on.

The choice is kept in the run's folder, so that a run that goes on has the same one, and so has
every process: a size that was searched for may rest on times measured on a busy machine. The
drafter's manifest records how it was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafter.config import DrafterConfig, read_json
from drafter.disk import atomic_write_json
from drafter.errors import UsageError
from drafter.sources import TargetFolder
from drafter.sources.folder import weights_fingerprint
from pipeline.captures import Teacher
from pipeline.config import DrafterOptions
from pipeline.given import refuse_given
from pipeline.progress import note
from pipeline.stages import find_drafter

if TYPE_CHECKING:
    from torch import Tensor

    from drafter.capture import Captured
    from drafter.vocabulary_size import SizeTrial

AUTO, DRAFTED = "auto", "drafted"
SEARCH_OPTIONS = frozenset({"min_coverage", "coverage_weight", "vocab_latency"})
_FILE = "draft_vocabulary.json"
_DRAFTED_DOCUMENTS = 100  # at most so many are drafted on for the counts
_TIMED_SIZES = 6  # heads that are timed between the least size and the whole vocabulary
_TIMED_STATES = 4  # states of a tree level


def check_vocabulary_options(options: DrafterOptions) -> None:
    """Refuse options of a draft vocabulary that would be lost. Raises UsageError."""
    if options.head != "truncated":
        names = {"draft_vocab", "draft_vocab_from", "vocab_drafter", *SEARCH_OPTIONS}
        refuse_given(options, names, f"is for the truncated head, --head is {options.head}")
    if options.draft_vocab != AUTO:
        refuse_given(options, SEARCH_OPTIONS, f"goes with --draft-vocab {AUTO}")
    if options.draft_vocab_from != DRAFTED:
        refuse_given(options, {"vocab_drafter"}, f"goes with --draft-vocab-from {DRAFTED}")


def vocabulary_arguments(options: DrafterOptions) -> dict[str, Any]:
    """What a truncated drafter's manifest says was asked for."""
    if options.head != "truncated":
        return {}
    found: dict[str, Any] = {"draft_vocab_from": options.draft_vocab_from}
    if options.draft_vocab == AUTO:
        found |= {"draft_vocab": AUTO, **options.model_dump(include=set(SEARCH_OPTIONS))}
    return found


def vocabulary_inputs(options: DrafterOptions, target: TargetFolder, out: Path) -> dict[str, str]:
    """The drafter whose proposals are counted, by hash. Raises UsageError where the result would
    replace it.
    """
    if options.head != "truncated" or options.draft_vocab_from != DRAFTED:
        return {}
    folder = find_drafter(target, options.vocab_drafter)
    if folder.resolve() == out.resolve():
        raise UsageError(f"--vocab-drafter and --out are both {out}; give another --out folder.")
    return {"vocab_drafter": weights_fingerprint(folder)}


@dataclass(frozen=True)
class Material:
    """What a draft vocabulary is chosen from: the training documents, whose answers say what is
    covered, and those held out, on which that is measured. `steps`: draft steps that are counted
    where a drafter's proposals are.
    """

    teacher: Teacher
    config: DrafterConfig
    documents: Sequence[Captured]
    held_out: Sequence[Captured]
    steps: int


def draft_vocabulary(
    material: Material, options: DrafterOptions, run: Path
) -> tuple[Tensor, dict[str, Any]]:
    """The ids of a truncated head, int64 [Vd], rising, and the record of how they were found.

    Raises UsageError.
    """
    import torch

    path = run / _FILE
    if not path.exists():
        ids, record = _choose(material, options)
        atomic_write_json(path, {"ids": ids.tolist(), "record": record})
    found = read_json(path)
    return torch.tensor(found["ids"]), found["record"]


def _choose(material: Material, options: DrafterOptions) -> tuple[Tensor, dict[str, Any]]:
    from drafter.tokenizer import ChatTokenizer
    from drafter.vocabulary import coverage, frequent_ids, ranked_ids

    config = material.config
    tokenizer = ChatTokenizer.load(material.teacher.folder.path)
    needed = tokenizer.eos_ids | {i for i in tokenizer.special_ids if i < config.vocab_size}
    answers = _said(material, material.documents, "answers")
    counts = _counts(material, options)
    record: dict[str, Any] = {"from": options.draft_vocab_from}
    size = config.draft_vocab_size or 0
    if options.draft_vocab == AUTO:
        best, tried = _searched(config, options, ranked_ids(counts, needed), answers, len(needed))
        size = best.size
        record |= {"utility": best.utility, "saved": best.saved, "tried": list(map(asdict, tried))}
    ids = frequent_ids(counts, size, needed)
    held_out = coverage(_said(material, material.held_out, "answers"), ids)
    record |= {"size": size, "coverage": coverage(answers, ids), "held_out_coverage": held_out}
    note(
        f"the draft vocabulary's {size} tokens are {record['coverage']:.2%} of the answers', "
        f"{held_out:.2%} of those held out"
    )
    return ids, record


def _said(material: Material, documents: Sequence[Captured], source: str) -> Tensor:
    from drafter.documents import texts_of
    from drafter.vocabulary import token_counts

    return token_counts(texts_of(documents), material.config.vocab_size, source)


def _counts(material: Material, options: DrafterOptions) -> Tensor:
    """What ranks the tokens: int64 [V]."""
    from drafter.checkpoint import load_drafter
    from drafter.vocabulary import drafted_counts

    if options.draft_vocab_from != DRAFTED:
        return _said(material, material.documents, options.draft_vocab_from)
    taps = material.config.taps
    folder = find_drafter(material.teacher.folder, options.vocab_drafter)
    drafter = load_drafter(folder, material.teacher.ends(taps))
    if drafter.config.taps != taps:
        raise UsageError(
            f"the drafter in {folder} reads taps {list(drafter.config.taps)}, the one to train "
            f"{list(taps)}; give the same --taps or another --vocab-drafter."
        )
    return drafted_counts(drafter, material.documents[:_DRAFTED_DOCUMENTS], material.steps)


def _searched(
    config: DrafterConfig, options: DrafterOptions, ranked: Tensor, answers: Tensor, needed: int
) -> tuple[SizeTrial, list[SizeTrial]]:
    from drafter.vocabulary_size import Tradeoff, coverage_curve, search_size

    least = max(needed + 1, config.top_k)
    tradeoff = Tradeoff(
        coverage_curve(answers, ranked),
        _step_time(config, options.vocab_latency, least),
        options.coverage_weight,
        options.min_coverage,
    )
    return search_size(tradeoff, least, seed=0)


def _step_time(config: DrafterConfig, latency: str, least: int) -> Callable[[int], float]:
    """The time of a drafter step by the size of its vocabulary, in FLOPs or measured here."""
    import numpy as np
    import torch

    from drafter.eagle3 import DraftLayer
    from drafter.vocabulary_size import linear_time, measured_time

    with torch.device("meta"):
        layer = sum(p.numel() for p in DraftLayer(config).parameters())
    if latency == "flops":
        return linear_time(layer, config.hidden_size)
    from pipeline.head_bench import measure_sizes

    found = np.geomspace(least, config.vocab_size, _TIMED_SIZES).round().astype(int)
    sizes = sorted({*found.tolist()})
    times = measure_sizes(_TIMED_STATES, config.hidden_size, sizes)
    return measured_time(sizes, times, layer, config.hidden_size)
