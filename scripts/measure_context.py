"""tau after long conversations against short ones, longer than what the drafter was trained on.

    python scripts/measure_context.py ENGINE CORPUS --contexts 512 4096 --prompts 8

Each MT-Bench question is asked after as many earlier dialogues, taken from CORPUS (of the same
target), as fill the context; those of a short context are the last of a long one. tau is pooled
over prompts, with a paired 95 % interval of the ratio to the first context.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from drafter.corpus import read_corpus
from drafter.tokenizer import ChatTokenizer
from pipeline.intervals import Pooled, pooled, ratio
from pipeline.prompt_sets import benchmark_prompts
from runtime.generator import Completion, Generator


def conversation(
    tokenizer: ChatTokenizer, turns: list[list[int]], question: str, context: int
) -> list[int]:
    """Token ids of about `context`: whole earlier turns [T], then the question."""
    asked: list[int] = tokenizer.apply_chat_template([{"role": "user", "content": question}])
    before: list[int] = []
    for turn in turns:
        if len(before) + len(turn) + len(asked) > context:
            break
        before = turn + before
    return before + asked


def main() -> None:
    """Parse, decode, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("engine", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    generator = Generator.load(args.engine, threads=args.threads)
    tokenizer = ChatTokenizer.load(args.engine)
    turns = [document.ids.tolist() for document in read_corpus(args.corpus)]
    found: dict[int, list[Completion]] = {context: [] for context in args.contexts}
    for number, prompt in enumerate(benchmark_prompts("mt-bench", args.prompts).prompts):
        mine = turns[64 * number :]
        for context, completions in found.items():
            ids = conversation(tokenizer, mine, prompt.text, context)
            completions.append(generator.generate(ids, max_tokens=args.max_tokens))
    taus = {context: _tau(completions) for context, completions in found.items()}
    first = taus[args.contexts[0]]
    report = {
        context: {
            "prompt_tokens": float(np.mean([c.prompt_tokens for c in found[context]])),
            "tau": pooled(tau)._asdict(),
            "ratio": ratio(tau, first)._asdict(),
        }
        for context, tau in taus.items()
    }
    print(json.dumps(report, indent=1))


def _tau(completions: list[Completion]) -> Pooled:
    tokens = np.array([len(c.token_ids) - 1 for c in completions], dtype=np.float64)
    return Pooled(tokens, np.array([c.rounds for c in completions], dtype=np.float64))


if __name__ == "__main__":
    main()
