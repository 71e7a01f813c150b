"""The target's own answers to the benchmark prompts, with what it saw: what chains are replayed on.

Greedy and at temperature 1, up to so many tokens, in bfloat16 as corpora are. Only for measuring:
no drafter is trained on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from drafter.capture import Captured, computed_in, read_captured, write_captured
from drafter.checkpoint import load_target
from drafter.config import read_json
from drafter.disk import atomic_write_json
from drafter.errors import UsageError
from drafter.generate import GenerateConfig, answer_prompts, seen_document
from drafter.tokenizer import ChatTokenizer
from pipeline.prompt_sets import benchmark_prompts

SETS = {"mt-bench": 80, "humaneval": 40, "gsm8k": 40}
TEMPERATURES = (0.0, 1.0)
_SETTINGS = "settings.json"


def texts_path(out: Path, name: str, temperature: float) -> Path:
    """Folder of a prompt set's answers."""
    return out / "texts" / f"{name}-t{temperature:g}"


def write_texts(target: Path, taps: tuple[int, ...], out: Path, tokens: int) -> None:
    """Answer every prompt set at every temperature; what exists is kept. Raises UsageError where
    that is of other settings.
    """
    settings = {"tokens": tokens, "taps": list(taps)}
    path = out / "texts" / _SETTINGS
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, settings)
    if (found := texts_settings(out)) != settings:
        raise UsageError(
            f"{path.parent} holds texts of {found}, not of {settings}; give another --out."
        )
    todo = [
        (name, count, temperature)
        for name, count in SETS.items()
        for temperature in TEMPERATURES
        if not (texts_path(out, name, temperature) / "shard-00000.safetensors").exists()
    ]
    if not todo:
        return
    model = load_target(target, taps, torch.bfloat16)
    tokenizer = ChatTokenizer.load(target)
    for name, count, temperature in todo:
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": prompt.text}])
            for prompt in benchmark_prompts(name, count).prompts
        ]
        config = GenerateConfig(
            max_new_tokens=tokens, temperatures=(temperature,), batch=40, keep_states=True
        )
        answered = sorted(answer_prompts(model, prompts, config, shard=0), key=lambda t: t.index)
        folder = texts_path(out, name, temperature)
        folder.mkdir(parents=True, exist_ok=True)
        seen = [seen_document(text) for text in answered]
        write_captured(folder / "shard-00000.safetensors", seen, taps, "", computed_in(model))
        print(f"texts: {name} at temperature {temperature:g}, {len(seen)} answers", flush=True)


def texts_settings(out: Path) -> dict[str, Any]:
    """What the texts were made with."""
    return read_json(out / "texts" / _SETTINGS)


def read_texts(out: Path, name: str, temperature: float) -> list[Captured]:
    """The answers of a prompt set, in the order of its prompts."""
    return list(read_captured(texts_path(out, name, temperature)))
