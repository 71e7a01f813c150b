"""Try draft trees on one engine and print tau and speed against plain decoding, best last.

Every tree answers every prompt, trees interleaved, so that a noisy machine is equally unkind to
all. Tune on prompts you will not report: the fixed 40 of `pipeline evaluate` are left for that.

    python scripts/sweep_trees.py ENGINE prompts.jsonl 4,4,8,0.03,8,0 4,4,8,0.08,8,0.3 ...

A tree is depth,width,budget,min_prob,lookup,min_level.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from pipeline.prompts import read_prompts
from runtime.generator import Completion, Generator
from runtime.tree import TreeConfig


def parse_tree(text: str) -> TreeConfig:
    """`4,4,12,0.03,8,0.3` -> TreeConfig."""
    depth, width, budget, min_prob, lookup, min_level = text.split(",")
    shape = (int(depth), int(width), int(budget))
    return TreeConfig(*shape, float(min_prob), int(lookup), float(min_level))


def summary(completions: list[Completion], plain: list[Completion]) -> tuple[float, float, float]:
    """Median paired speed-up, tau over all rounds, median tokens a second."""
    ratios = [a.tok_s / b.tok_s for a, b in zip(completions, plain, strict=True)]
    emitted = sum(len(c.token_ids) - 1 for c in completions)
    rounds = sum(c.rounds for c in completions)
    speed = statistics.median(c.tok_s for c in completions)
    return statistics.median(ratios), emitted / max(rounds, 1), speed


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("engine", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("trees", nargs="+", type=parse_tree)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    generator = Generator.load(args.engine, threads=args.threads)
    choices: list[TreeConfig | None] = [None, *args.trees]
    found: dict[TreeConfig | None, list[Completion]] = {tree: [] for tree in choices}
    for prompt in read_prompts(args.prompts).prompts:
        for tree in choices:
            completion = generator.generate(
                prompt.text,
                max_tokens=args.max_tokens,
                temperature=args.temperature,
                seed=0,
                speculate=tree is not None,
                tree=tree,
            )
            found[tree].append(completion)
    print(f"plain: {summary(found[None], found[None])[2]:.1f} tok/s")
    for tree in sorted(args.trees, key=lambda t: summary(found[t], found[None])[0]):
        ratio, tau, speed = summary(found[tree], found[None])
        same = sum(
            a.token_ids == b.token_ids for a, b in zip(found[tree], found[None], strict=True)
        )
        c = found[tree]
        rounds = sum(x.rounds for x in c)
        parts = [
            1e3 * sum(getattr(x.timings, k) for x in c) / rounds
            for k in ("draft_s", "verify_s", "overhead_s")
        ]
        print(
            f"{tree}: {ratio:.2f}x, tau {tau:.2f}, {speed:.1f} tok/s, identical {same}/{len(c)}, "
            f"ms a round: draft {parts[0]:.1f}, verify {parts[1]:.1f}, own {parts[2]:.2f}"
        )


if __name__ == "__main__":
    main()
