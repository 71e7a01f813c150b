"""Train the default drafter in so many minutes, on a GPU where there is one.

    python scripts/train_default.py --target model.gguf --corpus CORPUS... --minutes 25 --out OUT
    ... --generate-minutes 10      # first let the target write and answer prompts of its own

Needs `drafter/` of this repository beside it, and torch, transformers or tokenizers, safetensors,
numpy, pydantic, jinja2, huggingface_hub and the pure-Python gguf wheel; nothing is downloaded. The
target is a GGUF file or a folder. Corpora are folders of shards; the target looks at each batch as
it is trained on, so nothing large is written. The number of steps is found from the speed of the
first ones and kept in OUT/budget.json: the same command goes on with a stopped run, states are
saved every minute. OUT/drafter is the result, with its log and a manifest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from drafter.acceptance import measure_acceptance  # noqa: E402
from drafter.artifact import sha256_file  # noqa: E402
from drafter.capture import Online  # noqa: E402
from drafter.checkpoint import load_drafter, load_target, save_drafter  # noqa: E402
from drafter.config import drafter_config_for, read_json  # noqa: E402
from drafter.corpus import Document, read_shard, shards  # noqa: E402
from drafter.decoder import TargetDecoder  # noqa: E402
from drafter.disk import atomic_write_json  # noqa: E402
from drafter.documents import Documents, texts_of  # noqa: E402
from drafter.eagle3 import Drafter  # noqa: E402
from drafter.families import read_target_config  # noqa: E402
from drafter.generate import GenerateConfig, generate_corpus, self_prompts  # noqa: E402
from drafter.rounding import narrowest  # noqa: E402
from drafter.sources.gguf import GgufFile, convert_gguf  # noqa: E402
from drafter.start import start_drafter  # noqa: E402
from drafter.supervision import check_measurable  # noqa: E402
from drafter.tokenizer import ChatTokenizer, vocabulary_sha256  # noqa: E402
from drafter.train_config import TrainConfig  # noqa: E402
from drafter.train_log import StepReport  # noqa: E402
from drafter.training import train  # noqa: E402

_TRIAL_STEPS = 12  # whose speed says how many steps the minutes hold
_HELD_OUT = 64
_PROMPTS = 4096  # of one round of generating
_STATE_DOCUMENTS = 100


class Texts:
    """Corpora in memory: ids and masks only."""

    def __init__(self, folders: list[Path]) -> None:
        self.documents: list[Document] = [
            document
            for folder in folders
            for path in shards(folder)
            for document in read_shard(path)
        ]
        self.lengths = [len(document.ids) for document in self.documents]

    def __getitem__(self, index: int) -> Document:
        return self.documents[index]


def main() -> None:
    """Parse, generate, train, measure, write."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    folder = _target_folder(args.target, args.out)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    taps = read_target_config(folder).default_taps
    target = load_target(folder, taps, dtype).to(args.device)
    corpora = list(args.corpus)
    if args.generate_minutes:
        corpora += _generated(target, folder, args)
    documents = Online(target, Texts(corpora), batch=args.capture_batch)
    print(f"{len(documents)} documents, {sum(documents.lengths):,} tokens", flush=True)
    drafter = _drafter(folder, documents, args).place(args.device)
    config = _budget(drafter, documents[:-_HELD_OUT], args)
    held_out = texts_of(documents[-_HELD_OUT:])
    check_measurable([*held_out], config.draft_steps, corpora[-1])
    trained = train(drafter, documents[:-_HELD_OUT], config, args.out / "run", _told)
    _write(trained, documents[-_HELD_OUT:], config, corpora, args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", type=Path, required=True, help="GGUF file or folder")
    parser.add_argument("--corpus", type=Path, nargs="*", default=[], help="folders of shards")
    parser.add_argument("--minutes", type=float, required=True, help="of training")
    parser.add_argument("--generate-minutes", type=float, default=0.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="train on from this drafter")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--loss", default="lk_hybrid")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--capture-batch", type=int, default=32)
    parser.add_argument("--generate-batch", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _target_folder(target: Path, out: Path) -> Path:
    """The target as a folder; a GGUF file is converted once."""
    if target.is_dir():
        return target
    folder = out / "target"
    if not (folder / "config.json").exists():
        partial = out / "target.partial"
        partial.mkdir(exist_ok=True)
        convert_gguf(GgufFile(target), partial, lambda *_: None)
        partial.rename(folder)
    return folder


def _generated(target: TargetDecoder, folder: Path, args: argparse.Namespace) -> list[Path]:
    """Corpora of the target's own, made for so many minutes; each round is a corpus folder, and
    those that are there count as made.
    """
    tokenizer = ChatTokenizer.load(folder)
    found: list[Path] = []
    end = time.monotonic() + 60 * args.generate_minutes
    while time.monotonic() < end:
        out = args.out / "corpora" / f"{len(found):04d}"
        config = GenerateConfig(batch=args.generate_batch, seed=args.seed * 1000 + len(found))
        if not (out / "done").exists():
            out.mkdir(parents=True, exist_ok=True)
            prompts = self_prompts(target, tokenizer, _PROMPTS, config)
            generate_corpus(target, prompts, out, config)
            (out / "done").touch()
            minutes = (end - time.monotonic()) / 60
            print(f"corpus {len(found)} written, {minutes:.1f} minutes left", flush=True)
        found.append(out)
    return found


def _drafter(folder: Path, documents: Documents, args: argparse.Namespace) -> Drafter:
    ends = load_target(folder)
    if args.start is not None:
        return load_drafter(args.start, ends).train()
    vocabulary = vocabulary_sha256(folder / "tokenizer.json")
    config = drafter_config_for(ends.config, rescore=128, tokenizer_sha256=vocabulary)
    seen = documents.take(range(min(_STATE_DOCUMENTS, len(documents))))
    states = torch.cat([d.states[d.mask] for d in seen]).float()
    return start_drafter(config, ends, states=states, seed=args.seed)


def _budget(drafter: Drafter, documents: Documents, args: argparse.Namespace) -> TrainConfig:
    """The training that fits into the minutes, timed once on a copy that is thrown away."""
    path = args.out / "budget.json"
    fields = {
        "loss": args.loss,
        "learning_rate": args.learning_rate,
        "final_rate": 0.0,
        "batch_tokens": args.batch_tokens,
        "precision": args.precision,
        "seed": args.seed,
        "checkpoint_minutes": 1.0,
    }
    if not path.exists():
        weights = {name: w.clone() for name, w in drafter.state_dict().items()}
        trial = TrainConfig(**fields, steps=_TRIAL_STEPS)
        ends: list[float] = []
        scratch = args.out / f"trial-{time.time_ns()}"
        train(drafter, documents, trial, scratch, lambda _: ends.append(time.monotonic()))
        shutil.rmtree(scratch)
        drafter.load_state_dict(weights)
        half = len(ends) // 2  # the first steps warm up
        seconds = (ends[-1] - ends[half]) / (len(ends) - 1 - half)
        atomic_write_json(path, {"steps": max(1, int(60 * args.minutes / seconds))})
    steps = read_json(path)["steps"]
    return TrainConfig(**fields, steps=steps, warmup_steps=min(100, steps // 10))


def _told(report: StepReport) -> None:
    if report.step % 20 == 0 or report.step == report.steps:
        print(
            f"step {report.step}/{report.steps}, loss {report.loss:.3f}, "
            f"alpha {' '.join(f'{a:.3f}' for a in report.alpha)}, "
            f"{report.tokens_per_second:.0f} tokens/s",
            flush=True,
        )


def _write(
    drafter: Drafter,
    held_out: Documents,
    config: TrainConfig,
    corpora: list[Path],
    args: argparse.Namespace,
) -> None:
    """The drafter and, beside it, what it was made from and how good it is."""
    found = measure_acceptance(drafter.place("cpu").eval(), list(held_out), config.draft_steps)
    out = args.out / "drafter"
    out.mkdir(exist_ok=True)
    save_drafter(drafter, out, narrowest(drafter))
    (out / "log.jsonl").write_bytes((args.out / "run" / "log.jsonl").read_bytes())
    card = {
        "training": config.model_dump(mode="json"),
        "start": None if args.start is None else sha256_file(args.start / "model.safetensors"),
        "device": args.device,
        "torch": torch.__version__,
        "corpora": {str(path): sha256_file(path) for folder in corpora for path in shards(folder)},
        "acceptance": {
            "alpha": list(found.alpha),
            "top1": list(found.top1),
            "tokens": found.tokens,
        },
    }
    atomic_write_json(out / "card.json", card)
    print(json.dumps(card["acceptance"]), flush=True)


if __name__ == "__main__":
    main()
