"""What a request cost and what speculation gave it.

A round is one target pass after the prompt's: it emits the accepted tokens and one bonus token. The
prompt's pass emits the first token and is no round. Only tokens that reach the user count: what a
round accepted beyond a stop or the token limit is in no figure. So, for one request, tokens = 1 +
tau * rounds, and plain decoding has tau = 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Work:
    """What was asked of the models: the same on every machine. `target_tokens`, `drafter_tokens`:
    tokens fed; `drafter_calls`: of extend and step.
    """

    target_tokens: int = 0
    drafter_tokens: int = 0
    drafter_calls: int = 0

    def __add__(self, other: Work) -> Work:
        """The two together."""
        return Work(
            self.target_tokens + other.target_tokens,
            self.drafter_tokens + other.drafter_tokens,
            self.drafter_calls + other.drafter_calls,
        )

    def __sub__(self, other: Work) -> Work:
        """What the later one, this, has more."""
        return Work(
            self.target_tokens - other.target_tokens,
            self.drafter_tokens - other.drafter_tokens,
            self.drafter_calls - other.drafter_calls,
        )


NO_WORK = Work()


@dataclass(frozen=True, slots=True)
class RoundStats:
    """One target pass. Seconds are split without overlap; their sum is the pass's wall time.

    `emitted`: tokens that count. `accepted`: how many of them were drafted. `drafted`: nodes
    verified, root excluded. `overhead_s`: our own code, outside of any engine.
    """

    emitted: int
    accepted: int
    drafted: int
    draft_s: float
    verify_s: float
    overhead_s: float
    prompt: bool = False  # the prompt's pass: chunks through target and drafter, first token
    work: Work = NO_WORK

    def trimmed(self, emitted: int, text_s: float) -> RoundStats:
        """The same pass when only `emitted` tokens count and its text took `text_s` more."""
        return replace(
            self,
            emitted=emitted,
            accepted=min(self.accepted, emitted),
            overhead_s=self.overhead_s + text_s,
        )

    @property
    def seconds(self) -> float:
        """Wall time of the pass."""
        return self.draft_s + self.verify_s + self.overhead_s


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of a request; `prefill_s` is all of the prompt's pass, the rest are the rounds'."""

    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    overhead_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Prompt and rounds; time spent by the reader of a stream is not in it."""
        return self.prefill_s + self.draft_s + self.verify_s + self.overhead_s

    def as_dict(self) -> dict[str, float]:
        """The four parts by name."""
        return asdict(self)


@dataclass(slots=True)
class Tally:
    """The passes of one request (or of many), summed up."""

    depth: int = 0  # levels of `acceptance_by_depth`; 0 for plain decoding
    tokens: int = 0
    rounds: int = 0
    target_passes: int = 0
    round_tokens: int = 0
    timings: Timings = field(default_factory=Timings)
    work: Work = NO_WORK  # of the rounds; the prompt's own tokens are not in it
    accepted_at: list[int] = field(default_factory=list)  # [d]: rounds that accepted depth d+1

    def add(self, stats: RoundStats) -> None:
        """Count one pass. A prompt counts as one, however many parts it goes through in."""
        self.tokens += stats.emitted
        self.target_passes += stats.emitted > 0 or not stats.prompt
        times = self.timings
        if stats.prompt:
            self.timings = Timings(
                times.prefill_s + stats.seconds, times.draft_s, times.verify_s, times.overhead_s
            )
            return
        self.rounds += 1
        self.work += stats.work
        self.round_tokens += stats.emitted
        self.timings = Timings(
            times.prefill_s,
            times.draft_s + stats.draft_s,
            times.verify_s + stats.verify_s,
            times.overhead_s + stats.overhead_s,
        )
        missing = max(self.depth, stats.accepted) - len(self.accepted_at)
        self.accepted_at += [0] * missing
        for level in range(stats.accepted):
            self.accepted_at[level] += 1

    @property
    def tau(self) -> float:
        """Mean tokens emitted per round, bonus included; 1.0 when there was no round."""
        return self.round_tokens / self.rounds if self.rounds else 1.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """[d]: fraction of rounds in which a node of depth d+1 was accepted."""
        levels = self.accepted_at or [0] * self.depth
        return [count / self.rounds if self.rounds else 0.0 for count in levels]
