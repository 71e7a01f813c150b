"""Who takes part: plain decoding of every target given, every engine in every tree, the peers.

Engines may differ in drafter, precision and backend, not in their tokenizer: prompts are the same
token ids for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drafter.artifact import fingerprint, read_artifact, sha256_file
from drafter.errors import UsageError
from drafter.sources.folder import TOKENIZER, TargetFolder
from engines.backends import read_engine
from engines.base import KIND, EngineManifest
from engines.identity import target_digest
from pipeline.bench.contenders import Contender
from pipeline.compare import names, shaped
from pipeline.config import BenchOptions
from pipeline.peers.registry import PEERS
from pipeline.run import must_be_identical
from runtime.tree import TreeConfig

_OWN = "pipeline.bench.own"


@dataclass(frozen=True)
class EngineFacts:
    """An engine folder, as reports name it; `fingerprint` covers every file of it."""

    name: str
    folder: Path
    manifest: EngineManifest
    fingerprint: str
    target: str  # digest of the target's weights


def read_engines(folders: Sequence[Path]) -> list[EngineFacts]:
    """The engines of a bench. Raises UsageError where one is none or has another tokenizer."""
    found = []
    for name, folder in zip(names(folders), folders, strict=True):
        _, manifest = read_engine(folder, verify=False)
        whole = fingerprint(read_artifact(folder, KIND, verify=False))
        found.append(EngineFacts(name, folder, manifest, whole, target_digest(folder)))
    first = sha256_file(folders[0] / TOKENIZER)
    for folder in folders[1:]:
        if (other := sha256_file(folder / TOKENIZER)) != first:
            raise UsageError(
                f"{folder} has another tokenizer ({other:.12}) than {folders[0]} ({first:.12}); a "
                "bench asks all engines with the same token ids: give engines of one target."
            )
    return found


def own_contenders(engines: Sequence[EngineFacts], chosen: BenchOptions) -> list[Contender]:
    """Plain decoding once for each target and backend, then the engines in their trees."""
    bases: dict[tuple[str, str], str] = {}
    plain, fast = [], []
    several = len({(one.target, one.manifest.backend) for one in engines}) > 1
    for one in engines:
        key = (one.target, one.manifest.backend)
        if key not in bases:
            bases[key] = f"plain decoding, {one.name}" if several else "plain decoding"
            plain.append(_own(one, bases[key], bases[key], "default", chosen, speculate=False))
        for kind in chosen.tree:
            name = one.name if len(chosen.tree) == 1 else f"{one.name}, {kind}"
            fast.append(_own(one, name, bases[key], kind, chosen, speculate=True))
    return plain + fast


def _own(
    one: EngineFacts, name: str, base: str, kind: str, chosen: BenchOptions, *, speculate: bool
) -> Contender:
    manifest = one.manifest
    trees = {"greedy": manifest.tree, "drawn": manifest.drawn_tree}
    options: dict[str, Any] = {
        key: asdict(shaped(TreeConfig.from_dict(tree), kind, chosen)) for key, tree in trees.items()
    }
    return Contender(
        name=name,
        kind="speculative" if speculate else "plain",
        adapter=_OWN,
        model=str(one.folder),
        precision=manifest.precision,
        base=base,
        must_match=must_be_identical(manifest.precision, 0.0),
        options={**options, "speculate": speculate, "max_batch": max(chosen.batch)},
    )


def needs_costs(contender: Contender) -> bool:
    """Whether one of its trees follows the measured costs."""
    trees = (contender.options.get(name) for name in ("greedy", "drawn"))
    return contender.drafts and any(tree and tree["mode"] == "adaptive" for tree in trees)


def peer_contenders(chosen: BenchOptions, base: str, target: TargetFolder) -> list[Contender]:
    """The peers that were asked for, compared with `base`. `model` is the target's own folder."""
    return [
        Contender(
            name=name,
            kind="peer",
            adapter=PEERS[name].adapter,
            model=str(target.path),
            precision=PEERS[name].precision,
            base=base,
            options=PEERS[name].options,
            python=chosen.peer_python,
        )
        for name in chosen.peers
    ]


def check_distinct(contenders: Sequence[Contender]) -> None:
    """Raises UsageError where two ways would have one name."""
    seen: set[str] = set()
    for contender in contenders:
        if contender.name in seen:
            raise UsageError(
                f"two ways to answer are called '{contender.name}'; give every engine, tree and "
                "peer once, and engine folders names of their own."
            )
        seen.add(contender.name)
