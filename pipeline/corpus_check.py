"""Whether a drafter can be trained on a corpus, asked before any work is done with it."""

from __future__ import annotations

from pathlib import Path

from drafter.config import DrafterConfig


def check_corpus(corpus: Path, config: DrafterConfig, supervise: str) -> None:
    """Raises UsageError naming the first document that does not fit: without response tokens,
    longer than the drafter's positions, with ids that the target does not have.
    """
    from drafter.corpus import read_shard, shards
    from drafter.supervision import Needs

    needs = Needs(config, supervise)
    number = 0
    for path in shards(corpus):
        for document in read_shard(path):
            needs.check(document, f"document {number} of {corpus} (in {path.name})")
            number += 1
