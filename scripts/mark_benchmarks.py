"""Write `pipeline/benchmark_marks.json` anew, after a change of `BENCHMARKS`.

python scripts/mark_benchmarks.py
"""

from __future__ import annotations

import json

from pipeline.benchmark_marks import PATH, mark
from pipeline.prompt_sets import BENCHMARKS, bare_prompts


def main() -> None:
    """Mark every prompt of every set, as it stands in the set."""
    rows = [mark(name, p.name, p.text) for name in BENCHMARKS for p in bare_prompts(name)]
    lines = ",\n".join(json.dumps(row) for row in rows)
    PATH.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
