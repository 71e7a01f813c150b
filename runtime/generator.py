"""Text in, text out: `Generator.load(engine_dir).generate(messages, max_tokens=64).text`.

It joins an engine set, its tokenizer and the decode loop. A Generator serves one request at a time,
because target and drafter hold one cache each: a second request before the first one's end is
refused with UsageError, so a caller with several threads needs a queue. Closing a stream ends its
request. `runtime.batch_generator` has one that decodes several streams together.

`token_ids` hold every token that counts: the end-of-sequence or stop token that ended the output is
their last (it has no text), and so is the token that completed a stop string (the text ends before
that string).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from drafter.errors import UsageError
from drafter.tokenizer import ChatTokenizer
from engines.base import EngineSet
from runtime.calibration import Tell
from runtime.cost import CostModel
from runtime.decode import FinishReason, Request, Round, check_request, decode
from runtime.drafter import Drafter, EngineDrafter
from runtime.policy import Market, Policy, require_market
from runtime.prefixes import PrefixCache
from runtime.sampling import SamplingConfig, SeededDice
from runtime.stats import NO_WORK, Tally, Timings, Work
from runtime.target import EngineTarget, Target
from runtime.text import TextStream, TokenBytes, check_stops
from runtime.trace import Track
from runtime.tree import DEFAULT_TREE, TreeConfig

Messages = Sequence[Mapping[str, str]]
Prompt = str | Messages | Sequence[int]


class Tokenizer(TokenBytes, Protocol):
    """What a Generator needs of a tokenizer."""

    @property
    def eos_ids(self) -> Sequence[int] | frozenset[int]:
        """Ids that end an answer."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""
        ...


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished request. `tau` and `acceptance_by_depth`: see `runtime.stats`.

    `tok_s` is all tokens over the whole time, the prompt's pass included. `target_passes` counts
    the prompt as one. `reused_tokens`: how many of the prompt's were not computed again.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
    rounds: int
    tau: float
    acceptance_by_depth: list[float]
    target_passes: int
    tok_s: float
    timings: Timings
    work: Work = NO_WORK  # of the rounds
    reused_tokens: int = 0

    @property
    def accepted_at(self) -> list[int]:
        """[d]: how many rounds accepted a node of depth d+1."""
        return [round(share * self.rounds) for share in self.acceptance_by_depth]

    def to_json(self) -> dict[str, Any]:
        """The object that `pipeline generate --json` prints."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_tokens": self.prompt_tokens,
            "rounds": self.rounds,
            "tau": self.tau,
            "finish_reason": self.finish_reason,
            "tok_s": self.tok_s,
        }


@dataclass(frozen=True, slots=True)
class Piece:
    """What one pass added; `text` may be empty, and for a part of a long prompt so are the tokens.
    The last piece carries the whole completion.
    """

    text: str
    token_ids: list[int]
    completion: Completion | None = None


class Generator:
    """Generates text on one engine set (see the module's first lines)."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int] = (),
        tree: TreeConfig = DEFAULT_TREE,
        drawn_tree: TreeConfig | None = None,
        costs: CostModel | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.prefixes = prefixes
        self._market = None if costs is None else Market(costs)
        self._tree, self._drawn_tree = tree, drawn_tree or tree
        self.eos_ids = frozenset(tokenizer.eos_ids) | frozenset(eos_ids)
        self._target = target
        self._drafter = drafter
        self._busy = threading.Lock()
        self.track: Track | None = None  # where spans of its requests go, if anywhere

    @classmethod
    def load(
        cls,
        engine_dir: str | Path,
        threads: int | None = None,
        tell: Tell | None = None,
        *,
        adaptive: bool = False,
        prefixes: PrefixCache | None = None,
    ) -> Generator:
        """Open an engine folder. With `prefixes` a prompt that begins like an earlier text is not
        computed again. Raises UsageError or MissingError, as `open_engines` does.

        What its passes cost on this machine is read from the cache. Where that is not known, it is
        measured (some seconds; `tell` hears so) if the engine's trees are adaptive, or if
        `adaptive` says that a request's will be.
        """
        engines, costs = opened(engine_dir, threads, tell, adaptive)
        return cls.of(engines, costs, prefixes)

    @classmethod
    def of(
        cls,
        engines: EngineSet,
        costs: CostModel | None = None,
        prefixes: PrefixCache | None = None,
    ) -> Generator:
        """On an engine folder that is open."""
        manifest = engines.manifest
        context = manifest.max_context
        return cls(
            EngineTarget(engines.target, manifest.target, context),
            EngineDrafter(engines.extend, engines.step, manifest.drafter, context),
            ChatTokenizer.load(manifest.folder),
            eos_ids=manifest.target.eos_token_ids,
            tree=TreeConfig.from_dict(manifest.tree),
            drawn_tree=TreeConfig.from_dict(manifest.drawn_tree),
            costs=costs,
            prefixes=prefixes,
        )

    def with_drafter(
        self,
        drafter: Drafter,
        tree: TreeConfig,
        drawn_tree: TreeConfig | None = None,
        costs: CostModel | None = None,
    ) -> Generator:
        """This target and tokenizer with another drafter, of the same taps and context.

        The two answer one request at a time between them: the target has one cache.
        """
        other = Generator(
            self._target,
            drafter,
            self.tokenizer,
            eos_ids=tuple(self.eos_ids),
            tree=tree,
            drawn_tree=drawn_tree,
            costs=costs,
        )
        other._busy = self._busy
        return other

    @property
    def max_streams(self) -> int:
        """How many streams it can have open at a time."""
        return 1

    @property
    def max_context(self) -> int:
        """Most tokens that prompt and answer may have together."""
        return self._target.max_context

    def tree(self, temperature: float) -> TreeConfig:
        """The draft tree of requests that bring none: drawn trees have other scores."""
        return self._drawn_tree if temperature > 0 else self._tree

    def prompt_ids(self, prompt: Prompt, raw: bool = False) -> list[int]:
        """Token ids of a prompt: messages, a text (one user message, or as is if `raw`), or ids.

        Raises UsageError for an empty prompt.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise UsageError("the prompt is empty; it must hold at least one character.")
            if raw:
                return self.tokenizer.encode(prompt)
            return self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        if not prompt:
            raise UsageError("the prompt is empty; it must hold at least one message or token.")
        if all(isinstance(item, int) for item in prompt):
            return [item for item in prompt if isinstance(item, int)]
        messages = [dict(item) for item in prompt if isinstance(item, Mapping)]
        if len(messages) != len(prompt):
            raise UsageError("a prompt is a text, a list of messages or a list of token ids.")
        if all(message.get("content") == "" for message in messages):
            raise UsageError("the prompt is empty; at least one message must have content.")
        return self.tokenizer.apply_chat_template(messages)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        speculate: bool = True,
        tree: TreeConfig | None = None,
        raw: bool = False,
    ) -> Completion:
        """Answer one prompt; the arguments are those of `stream`. Raises UsageError."""
        pieces = self.stream(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            stop=stop,
            stop_token_ids=stop_token_ids,
            speculate=speculate,
            tree=tree,
            raw=raw,
        )
        *_, last = pieces
        assert last.completion is not None
        return last.completion

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        speculate: bool = True,
        tree: TreeConfig | None = None,
        raw: bool = False,
    ) -> Iterator[Piece]:
        """Answer one prompt piece by piece, one per target pass.

        Bad arguments are refused here, before the first piece. `speculate=False` is plain decoding
        on the same engine. Close the iterator to cancel. Raises UsageError.
        """
        for token in stop_token_ids:
            if not isinstance(token, int) or not 0 <= token < self._target.vocab_size:
                raise UsageError(
                    f"a stop token id is {token!r}; this engine's ids run from 0 to "
                    f"{self._target.vocab_size - 1}."
                )
        request = Request(
            prompt=self.prompt_ids(prompt, raw),
            max_tokens=max_tokens,
            sampling=SamplingConfig(temperature, top_k, top_p, min_p, seed),
            stop_ids=self.eos_ids | frozenset(stop_token_ids),
            tree=tree or self.tree(temperature),
        )
        drafter = self._drafter if speculate else None
        check_request(request, self._target, drafter)
        policy = self._policy(request) if speculate else None
        return self._pieces(request, drafter, policy, TextStream(self.tokenizer, check_stops(stop)))

    def _policy(self, request: Request) -> Policy | None:
        if request.tree.mode == "fixed":
            return None
        return require_market(self._market).policy(request.sampling)

    def _pieces(
        self, request: Request, drafter: Drafter | None, policy: Policy | None, text: TextStream
    ) -> Iterator[Piece]:
        answer = Answer(request, drafter is not None, text)
        dice, kept = SeededDice(request.sampling.seed), self.prefixes
        target, track = self._target, self.track
        answer.track = track
        with self._claimed():
            if kept is not None:
                exact = request.sampling.reproducible
                answer.reused = kept.resume(request.prompt, target, drafter, exact=exact)
            watched = track.watch(target, drafter) if track is not None else (target, drafter)
            for passed in decode(*watched, request, dice, policy, answer.reused):
                piece = answer.piece(passed)
                if piece.completion is not None:
                    break
                yield piece
            if kept is not None:
                kept.keep([*request.prompt, *answer.token_ids], self._target, drafter)
        yield piece

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise UsageError(
                "this Generator is still answering another request and serves one at a time; "
                "finish or close that stream first."
            )
        try:
            yield
        finally:
            self._busy.release()


def opened(
    engine_dir: str | Path, threads: int | None, tell: Tell | None, adaptive: bool
) -> tuple[EngineSet, CostModel | None]:
    """An engine folder and what its passes cost here, if that is known or needed: see
    `Generator.load`.
    """
    from engines import open_engines  # with the backends, which only this needs
    from runtime.cost_store import known_costs

    folder = Path(engine_dir)
    engines = open_engines(folder, threads=threads, verify=True)
    trees = engines.manifest.tree, engines.manifest.drawn_tree
    needed = adaptive or any(TreeConfig.from_dict(tree).mode == "adaptive" for tree in trees)
    return engines, known_costs(folder, lambda: engines, threads, tell, measure=needed)


class Answer:
    """The text of one request, piece by piece, as its rounds come in; `drafts`: with a drafter."""

    def __init__(self, request: Request, drafts: bool, text: TextStream) -> None:
        self.reused = 0  # prompt tokens whose rows were there already
        self.track: Track | None = None  # where spans of its passes go, if anywhere
        self._request = request
        self._text = text
        self._tally = Tally(depth=request.tree.depth if drafts else 0)
        self._shown: list[str] = []
        self.token_ids: list[int] = []

    def piece(self, passed: Round) -> Piece:
        """What a pass adds; with the completion where the output ends."""
        start = time.perf_counter()
        tokens, new, finish = _read(passed, self._text, self._request.stop_ids)
        self.token_ids += tokens
        self._shown.append(new)
        stats = passed.stats.trimmed(len(tokens), time.perf_counter() - start)
        self._tally.add(stats)
        if self.track is not None:
            self.track.end_pass(stats, start)
        if finish is None:
            return Piece(new, tokens)
        done = _completion(
            "".join(self._shown), self.token_ids, len(self._request.prompt), finish, self._tally
        )
        return Piece(new, tokens, replace(done, reused_tokens=self.reused))


def _read(
    passed: Round, text: TextStream, stop_ids: frozenset[int]
) -> tuple[list[int], str, FinishReason | None]:
    """A pass's tokens up to a stop string, their final text, and why the output ends here."""
    tokens, finish = passed.tokens, passed.finish
    ended = bool(tokens) and tokens[-1] in stop_ids  # the last one; a stop token has no text
    shown, count = text.push_all(tokens[:-1] if ended else tokens)
    if text.stopped:
        return tokens[:count], shown, "stop"
    if finish is not None:
        shown += text.finish()
        if text.stopped:
            finish = "stop"
    return tokens, shown, finish


def _completion(
    text: str, token_ids: list[int], prompt_tokens: int, finish: FinishReason, tally: Tally
) -> Completion:
    return Completion(
        text=text,
        token_ids=token_ids,
        prompt_tokens=prompt_tokens,
        finish_reason=finish,
        rounds=tally.rounds,
        tau=tally.tau,
        acceptance_by_depth=tally.acceptance_by_depth,
        target_passes=tally.target_passes,
        tok_s=len(token_ids) / tally.timings.total_s,
        timings=tally.timings,
        work=tally.work,
    )
