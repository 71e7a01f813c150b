"""Knows the published prompts by hash, without their texts, so that no drafter is trained on what
measures it, whatever the cache holds.

`benchmark_marks.json` lists for each prompt its set and name, how many words it has, CRC-32 of its
first eight words and the first 64 bits of the SHA-256 of all. Words are runs of letters and digits,
whatever their case and form (NFKC; invisible characters do not count). A prompt is found wherever
it stands in a text: in a chat template, behind an instruction, in quotes, in a code block.
`scripts/mark_benchmarks.py` writes the file. A prompt in other words is not found.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import zlib
from collections.abc import Iterable
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from drafter.errors import UsageError

if TYPE_CHECKING:
    from drafter.tokenizer import ChatTokenizer

START = 8  # words; no prompt has fewer
_WORD = re.compile(r"[^\W_]+")
PATH = Path(__file__).with_name("benchmark_marks.json")


class Mark(NamedTuple):
    """One prompt: `start` and `whole` are the hashes of its first words and of all `words`."""

    set_name: str
    name: str
    words: int
    start: int
    whole: str


def mark(set_name: str, name: str, text: str) -> Mark:
    """The mark of a prompt. Raises ValueError for one that is too short to be told from others."""
    words = _words(text)
    if len(words) < START:
        raise ValueError(f"{name} of {set_name} has {len(words)} words, {START} are needed")
    return Mark(set_name, name, len(words), _start(words), _whole(words))


def benchmark_in(text: str) -> Mark | None:
    """The first published prompt that stands in a text, or None."""
    marks, words = _marks(), _words(text)
    for place in range(len(words) - START + 1):
        for found in marks.get(_start(words[place : place + START]), ()):
            if _whole(words[place : place + found.words]) == found.whole:
                return found
    return None


def refuse_benchmarks(texts: Iterable[str], where: str, what: str = "prompt") -> None:
    """Raise UsageError where a text holds a published prompt; `what` a text is called."""
    for number, text in enumerate(texts, 1):
        if found := benchmark_in(text):
            raise UsageError(
                f"{where}: {what} {number} holds {found.name} of {found.set_name}, which drafters "
                "are measured with; remove it: what was trained on cannot measure."
            )


def refuse_benchmark_corpus(corpus: Path, target: Path) -> None:
    """The same for a corpus folder of a target: for the prompts of its documents, wherever they
    came from.
    """
    from drafter.corpus import read_shard, shards
    from drafter.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer.load(target)
    documents = (document for path in shards(corpus) for document in read_shard(path))
    texts = (_prompt_text(tokenizer, d.ids[~d.mask].tolist()) for d in documents)
    refuse_benchmarks(texts, str(corpus), "document")


def _prompt_text(tokenizer: ChatTokenizer, ids: list[int]) -> str:
    """A prompt's text, as it is and with blanks for the added tokens: a template's markers may
    touch words and need not be special, a word of the prompt may be an added token.
    """
    parts = groupby(ids, lambda token: token in tokenizer.added_ids)
    cut = " ".join(tokenizer.decode(list(part)) for added, part in parts if not added)
    return f"{tokenizer.decode(ids)}\n{cut}"


@cache
def _marks() -> dict[int, list[Mark]]:
    found: dict[int, list[Mark]] = {}
    for row in json.loads(PATH.read_text(encoding="utf-8")):
        one = Mark(*row)
        found.setdefault(one.start, []).append(one)
    return found


def _words(text: str) -> list[bytes]:
    plain = unicodedata.normalize("NFKC", text).casefold()
    seen = "".join(c for c in plain if unicodedata.category(c) != "Cf")  # zero width, directions
    return [word.encode() for word in _WORD.findall(seen)]


def _start(words: list[bytes]) -> int:
    return zlib.crc32(b" ".join(words[:START]))


def _whole(words: list[bytes]) -> str:
    return hashlib.sha256(b" ".join(words)).hexdigest()[:16]
