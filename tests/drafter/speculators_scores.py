"""Scores of EAGLE-3 checkpoints by the PyPI package `speculators`, alone: run with a Python that
has it, which need not have ours.

    python speculators_scores.py FOLDER...

Each folder has `checkpoint/` and `inputs.safetensors` (tokens [T], taps [T, n * Ht]). Written
there: `scores.safetensors` (one tensor [T, Vd] a draft step) and `saved/`, the checkpoint as the
package itself saves it. Versions go to standard output as JSON.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

STEPS = 3


@torch.no_grad()
def main(folder: Path) -> None:
    """Load a checkpoint as a user of the package would and run its own forward."""
    config = Eagle3SpeculatorConfig.from_pretrained(folder / "checkpoint")
    config.transformer_layer_config._attn_implementation = "eager"  # the default needs a compiler
    model = Eagle3DraftModel.from_pretrained(folder / "checkpoint", config=config).eval()
    found: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, scores: found.append(scores[0]))
    inputs = load_file(folder / "inputs.safetensors")
    model(
        hidden_states=inputs["taps"][None],
        input_ids=inputs["tokens"][None],
        document_ids=torch.zeros(1, len(inputs["tokens"]), dtype=torch.int64),
        ttt_steps=STEPS,
    )
    save_file({str(k): x.contiguous() for k, x in enumerate(found)}, folder / "scores.safetensors")
    model.save_pretrained(folder / "saved")


for argument in sys.argv[1:]:
    main(Path(argument))
names = ("speculators", "transformers", "torch")
sys.stdout.write(json.dumps({name: metadata.version(name) for name in names}) + "\n")
