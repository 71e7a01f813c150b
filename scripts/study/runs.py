"""One run of the study: a fresh head on the body, trained, then replayed on the prompt sets' texts.

The result is a JSON file with sums per prompt, written last: what it is there for is not run again,
and a stopped training goes on from its last state.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from texts import SETS, TEMPERATURES, read_texts, texts_settings
from variants import Head, Variant, heads

from drafter.artifact import sha256_file
from drafter.capture import Captured, read_captured
from drafter.checkpoint import load_drafter, load_target, save_drafter
from drafter.config import (
    DrafterConfig,
    checked_drafter_config,
    default_top_k,
    read_drafter_config,
    read_json,
)
from drafter.corpus import read_shard, shards
from drafter.decoder import TargetDecoder
from drafter.disk import atomic_write_json
from drafter.errors import UsageError
from drafter.replay import replay
from drafter.rounding import narrowest
from drafter.sources.folder import weights_fingerprint
from drafter.start import start_drafter
from drafter.tokenizer import ChatTokenizer
from drafter.train_config import TrainConfig
from drafter.train_log import read_log
from drafter.training import train
from drafter.vocabulary import coverage, frequent_ids, token_counts

CHAIN = 4  # drafted tokens of the replayed chain
STRIDE = 3  # chains start at every third token
_STATE_DOCUMENTS = 100  # whose states start the factors


@dataclass(frozen=True)
class Study:
    """What all runs share. `tokens`: of the corpus, one pass over them is a run's budget."""

    target: Path
    body: Path
    corpus: Path
    out: Path
    tokens: int
    learning_rate: float
    batch_tokens: int = 2048

    def made_from(self) -> dict[str, Any]:
        """What a result rests on besides its variant."""
        corpus = "".join(sha256_file(path) for path in shards(self.corpus))
        return {
            "tokens": self.tokens,
            "learning_rate": self.learning_rate,
            "batch_tokens": self.batch_tokens,
            "corpus": hashlib.sha256(corpus.encode()).hexdigest(),
            "body": weights_fingerprint(self.body),
            "target": weights_fingerprint(self.target),
            "texts": texts_settings(self.out),
        }

    def config(self, variant: Variant) -> TrainConfig:
        """The training of a variant."""
        return TrainConfig(
            epochs=1,
            loss=variant.loss,
            seed=variant.seed,
            learning_rate=self.learning_rate,
            final_rate=0.0,
            warmup_steps=5,
            batch_tokens=self.batch_tokens,
            checkpoint_minutes=2,
        )

    def result(self, variant: Variant) -> Path:
        """Where a variant's figures are."""
        return self.out / "results" / f"{variant.name}.json"

    def drafter(self, variant: Variant) -> Path:
        """Where a variant's drafter is."""
        return self.out / "drafters" / variant.name


def run(study: Study, variant: Variant) -> str:
    """Train and replay a variant unless that was done; returns a line to print."""
    torch.set_num_threads(1)
    if study.result(variant).exists():
        read_result(study, variant, study.made_from())
        return f"{variant.name}: was there"
    body = read_drafter_config(study.body)
    target = load_target(study.target, body.taps)
    head = heads(target.config)[variant.head]
    documents = training_documents(study)
    drafter = _start(study, variant, head, target, body, documents)
    runs = study.out / "runs" / variant.name
    train(drafter, documents, study.config(variant), runs)
    log = [row.model_dump() for row in read_log(runs)]
    figures: dict[str, Any] = {
        "made_from": study.made_from(),
        "head": variant.head,
        "loss": variant.loss,
        "init": variant.init,
        "seed": variant.seed,
        "steps": len(log),
        "tokens_per_second": log[-1]["tokens_per_second"],
        "training_alpha": [row["alpha"][0] for row in log],
        "parameters": sum(w.numel() for w in drafter.lm_head.parameters()),
        "replayed": _replayed(study, drafter.eval()),
    }
    folder = study.drafter(variant)
    folder.mkdir(parents=True, exist_ok=True)
    save_drafter(drafter, folder, narrowest(drafter))
    atomic_write_json(study.result(variant), figures)
    shutil.rmtree(runs)
    return f"{variant.name}: {len(log)} steps, alpha {log[-1]['alpha'][0]:.3f} in training"


def read_result(study: Study, variant: Variant, made_from: dict[str, Any]) -> dict[str, Any]:
    """A variant's figures. Raises UsageError where they are of another study."""
    path = study.result(variant)
    found = read_json(path)
    for field, needed in made_from.items():
        if (value := found.get("made_from", {}).get(field)) != needed:
            raise UsageError(
                f"{path} is of {field} {value}, this study of {needed}; give another --out."
            )
    return found


def training_documents(study: Study) -> list[Captured]:
    """The first documents of the corpus that have `tokens` tokens together."""
    total, found = 0, []
    for document in read_captured(study.corpus / "captured"):
        if total >= study.tokens:
            break
        found.append(document)
        total += len(document.ids)
    return found


def _start(
    study: Study,
    variant: Variant,
    head: Head,
    target: TargetDecoder,
    body: DrafterConfig,
    documents: list[Captured],
) -> Any:
    fields = {**body.model_dump(), "lm_head_rank": None, "rescore": 0, "draft_vocab_size": None}
    fields |= head.fields
    fields["top_k"] = default_top_k(
        fields["rescore"], fields["draft_vocab_size"] or fields["vocab_size"]
    )
    config = checked_drafter_config(fields, variant.name)
    states = torch.cat([d.states[d.mask] for d in documents[:_STATE_DOCUMENTS]]).float()
    return start_drafter(
        config,
        target,
        head_init=variant.init,
        states=states,
        draft_ids=draft_ids(study, head, config),
        body=load_drafter(study.body, target),
        seed=variant.seed,
    )


def draft_ids(study: Study, head: Head, config: DrafterConfig) -> torch.Tensor | None:
    """The truncated vocabulary, by frequency in the whole corpus; None for other heads."""
    if config.draft_vocab_size is None:
        return None
    tokenizer = ChatTokenizer.load(study.target)
    texts = (document for path in shards(study.corpus) for document in read_shard(path))
    counts = token_counts(texts, config.vocab_size, head.source)
    needed = tokenizer.eos_ids | {i for i in tokenizer.special_ids if i < config.vocab_size}
    ids = frequent_ids(counts, config.draft_vocab_size, needed)
    print(f"{head.source}: {coverage(counts, ids):.2%} covered", flush=True)
    return ids


def _replayed(study: Study, drafter: Any) -> list[dict[str, Any]]:
    """Per text: its set, temperature, roots, and sums over them of the chance that the first k
    drafted tokens are accepted, k = 1 .. CHAIN.
    """
    rows = []
    for temperature in TEMPERATURES:
        for name in SETS:
            texts = read_texts(study.out, name, temperature)
            for number, survival in enumerate(
                replay(drafter, texts, CHAIN, temperature, stride=STRIDE)
            ):
                rows.append(
                    {
                        "set": name,
                        "temperature": temperature,
                        "prompt": number,
                        "roots": len(survival),
                        "survival": survival.double().sum(0).tolist(),
                    }
                )
    return rows
