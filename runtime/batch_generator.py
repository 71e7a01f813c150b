"""A Generator whose streams run at the same time: `BatchGenerator.load(engine_dir, max_batch=4)`.

Its streams decode together (`runtime.batch`): taking a piece from one of them runs a step of all,
and what the others get waits for them. So any way of taking turns serves all alike, and one thread
is enough; a second one that takes a piece meanwhile is refused with UsageError, which ends its
stream. A stream joins with its first piece and leaves when it is closed, by any thread. Beyond
`max_batch` streams wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from drafter.errors import UsageError
from drafter.tokenizer import ChatTokenizer
from engines.base import EngineSet
from runtime.batch import MAX_BATCH, Batch
from runtime.batch_limits import default_batch, default_rows
from runtime.batch_round import Outcome
from runtime.calibration import Tell
from runtime.cost import CostModel
from runtime.decode import Request
from runtime.drafter import Drafter, EngineDrafter
from runtime.generator import Answer, Completion, Generator, Piece, Prompt, Tokenizer, opened
from runtime.member import Member, Models
from runtime.policy import Policy
from runtime.prefixes import PrefixCache
from runtime.sampling import SeededDice
from runtime.target import EngineTarget
from runtime.text import TextStream
from runtime.tree import DEFAULT_TREE, TreeConfig


class BatchGenerator(Generator):
    """Generates several texts at a time on one engine set (see the module's first lines)."""

    def __init__(
        self,
        batch: Batch,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int] = (),
        tree: TreeConfig = DEFAULT_TREE,
        drawn_tree: TreeConfig | None = None,
    ) -> None:
        models = batch.models
        context, caches = models.max_context, models.caches(1)
        self.batch = batch
        super().__init__(  # a target and a drafter to check requests against; they stay empty
            EngineTarget(models.target, models.target_config, context, caches[0]),
            EngineDrafter(
                models.extend, models.step, models.drafter_config, context, cache=caches[1]
            ),
            tokenizer,
            eos_ids=eos_ids,
            tree=tree,
            drawn_tree=drawn_tree,
            prefixes=batch.prefixes,
        )
        self._steps = 0
        self._inbox: dict[Member, deque[Outcome]] = {}
        self._gone: deque[Member] = deque()  # closed while another thread was in a step

    @classmethod
    def load(
        cls,
        engine_dir: str | Path,
        threads: int | None = None,
        tell: Tell | None = None,
        *,
        adaptive: bool = False,
        prefixes: PrefixCache | None = None,
        max_batch: int | None = None,
        max_rows: int | None = None,
    ) -> BatchGenerator:
        """Open an engine folder. `max_batch` and `max_rows` (see `Batch`) are by default what suits
        the machine. What passes cost is read from the cache, or measured (some seconds; `tell`
        hears so) if the engine's trees are adaptive or `adaptive` says that a request's will be;
        without it, it is learnt from the first rounds. Raises UsageError or MissingError, as
        `open_engines` does.
        """
        engines, known = opened(engine_dir, threads, tell, adaptive)
        rows = default_rows(Models.of(engines)) if max_rows is None else max_rows
        size = default_batch(rows, threads) if max_batch is None else max_batch
        return cls.of(engines, known, prefixes, max_batch=size, max_rows=rows)

    @classmethod
    def of(
        cls,
        engines: EngineSet,
        costs: CostModel | None = None,
        prefixes: PrefixCache | None = None,
        *,
        max_batch: int = MAX_BATCH,
        max_rows: int | None = None,
    ) -> BatchGenerator:
        """On an engine folder that is open; `max_batch` and `max_rows`: see `Batch`."""
        manifest, models = engines.manifest, Models.of(engines)
        return cls(
            Batch(models, max_batch, max_rows=max_rows, prefixes=prefixes, costs=costs),
            ChatTokenizer.load(manifest.folder),
            eos_ids=manifest.target.eos_token_ids,
            tree=TreeConfig.from_dict(manifest.tree),
            drawn_tree=TreeConfig.from_dict(manifest.drawn_tree),
        )

    @property
    def max_streams(self) -> int:
        """See `Generator`; more of them wait for a place."""
        return self.batch.max_batch

    def generate_all(self, prompts: Sequence[Prompt], **options: Any) -> list[Completion]:
        """Answer many prompts, in their order; `options` are those of `stream`."""
        streams = [self.stream(prompt, **options) for prompt in prompts]
        found: dict[int, Completion] = {}
        while len(found) < len(streams):
            for index, stream in enumerate(streams):
                if index not in found and (done := next(stream).completion) is not None:
                    found[index] = done
        return [found[index] for index in range(len(streams))]

    def _policy(self, request: Request) -> None:
        """The batch sizes the trees of all its requests (`runtime.batch_budget`)."""

    def _pieces(
        self, request: Request, drafter: Drafter | None, _policy: Policy | None, text: TextStream
    ) -> Iterator[Piece]:
        self.batch.check_memory(request)  # before the first piece, as all bad arguments
        return self._joined(request, Answer(request, drafter is not None, text), drafter)

    def _joined(self, request: Request, answer: Answer, drafter: Drafter | None) -> Iterator[Piece]:
        dice = SeededDice(request.sampling.seed)
        with self._turn():
            member = self.batch.add(request, dice, speculate=drafter is not None)
            inbox = self._inbox[member] = deque()
        seen = self._steps if len(self._inbox) == 1 else -1  # another one's turn may be next
        try:
            while True:
                if not inbox and seen == self._steps:
                    self._step()
                seen = self._steps
                if not inbox:
                    yield Piece("", [])  # it waits for its turn: only a place to stop at
                    continue
                outcome = inbox.popleft()
                if isinstance(outcome, Exception):
                    raise outcome
                answer.reused = member.reused
                piece = answer.piece(outcome)
                if piece.completion is not None:
                    break
                yield piece
        finally:
            self._gone.append(member)
            # A stream may be closed at any time, by the garbage collector too: who is in a step
            # now, or takes the next turn, lets the member go.
            with suppress(UsageError), self._turn():
                pass
        yield piece

    def _step(self) -> None:
        with self._turn():
            self._steps += 1
            for member, outcome in self.batch.step().items():
                self._inbox[member].append(outcome)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The batch for one thread alone, without the streams that were closed."""
        if not self._busy.acquire(blocking=False):
            raise UsageError(
                "another thread is taking a piece of this BatchGenerator; take the pieces of all "
                "its streams in one thread, or guard them with a lock."
            )
        try:
            self._let_go()
            yield
        finally:
            self._let_go()
            self._busy.release()

    def _let_go(self) -> None:
        while self._gone:
            member = self._gone.popleft()
            self.batch.remove(member)
            del self._inbox[member]
