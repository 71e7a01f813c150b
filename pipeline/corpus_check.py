"""Whether a drafter can be trained on a corpus, asked before any work is done with it."""

from __future__ import annotations

from pathlib import Path

from drafter.artifact import MANIFEST
from drafter.config import DrafterConfig, read_json
from drafter.errors import UsageError


def check_corpus(corpus: Path, config: DrafterConfig, supervise: str) -> None:
    """Raises UsageError for a corpus of another tokenizer, or naming the first document that does
    not fit: without response tokens, longer than the drafter's positions, with ids that the target
    does not have.
    """
    from drafter.corpus import read_shard, shards
    from drafter.supervision import Needs

    _check_tokenizer(corpus, config)
    needs = Needs(config, supervise)
    number = 0
    for path in shards(corpus):
        for document in read_shard(path):
            needs.check(document, f"document {number} of {corpus} (in {path.name})")
            number += 1


def _check_tokenizer(corpus: Path, config: DrafterConfig) -> None:
    """Where the corpus says of which tokenizer its ids are; a plain folder of shards does not."""
    if not (corpus / MANIFEST).exists():
        return
    data = read_json(corpus / MANIFEST).get("data", {})
    found, needed = data.get("tokenizer_sha256"), config.tokenizer_sha256
    if found is not None and needed is not None and found != needed:
        raise UsageError(
            f"the corpus {corpus} is of the tokenizer {found[:12]}, the target's is {needed[:12]}; "
            "make a corpus for this target with `pipeline corpus`."
        )
