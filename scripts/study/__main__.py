"""Which head, which loss: train every variant under one budget, measure, and write the report.

    python scripts/study --corpus CORPUS          # everything; goes on where it was stopped
    python scripts/study --corpus CORPUS --only report

CORPUS is a folder of `pipeline corpus --keep-states` for the default target. Results lie in --out
(JSON, one file a run); the report is docs/study.md with its figures.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from decode import measure_decoding  # noqa: E402
from report import write_report  # noqa: E402
from runs import Study, run  # noqa: E402
from texts import write_texts  # noqa: E402
from variants import heads, variants  # noqa: E402

from drafter.config import read_drafter_config  # noqa: E402
from drafter.families import read_target_config  # noqa: E402
from pipeline.stages import fetch_target  # noqa: E402

STAGES = ("texts", "runs", "decode", "report")
TARGET = "smollm2-135m"


def main() -> None:
    """Parse and run the stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "study")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--tokens", type=int, default=100_000, help="budget of a run")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--text-tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--only", choices=STAGES, nargs="+", default=STAGES)
    args = parser.parse_args()
    target = fetch_target(TARGET).path
    body = ROOT / "drafter" / "pretrained" / TARGET
    study = Study(target, body, args.corpus, args.out, args.tokens, args.learning_rate)
    chosen = variants(list(heads(read_target_config(target))), args.seeds)
    if "texts" in args.only:
        write_texts(target, read_drafter_config(body).taps, args.out, args.text_tokens)
    if "runs" in args.only:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            for done in as_completed([pool.submit(run, study, variant) for variant in chosen]):
                print(done.result(), flush=True)
    if "decode" in args.only:
        measure_decoding(study)
    if "report" in args.only:
        write_report(study, chosen, args.docs)


if __name__ == "__main__":
    main()
