"""Our exports in the PyPI package `speculators` (extra `interop`): loaded, run and saved by it.

The package wants an older `transformers` than the rest of our tests, so it may live in an
environment of its own: SLIMSPEC_INTEROP_PYTHON is that environment's Python.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafter.artifact import write_artifact
from drafter.checkpoint import load_target
from drafter.decoder import TargetDecoder
from drafter.eagle3 import Drafter
from drafter.heads.truncated import TruncatedHead
from drafter.interop import write_eagle3
from drafter.published import read_eagle3
from drafter.unroll import unroll
from tests.tiny_drafter import FORMS, form, tiny_drafter
from tests.tiny_llama import write_tiny_llama

SCRIPT = Path(__file__).with_name("speculators_scores.py")
STEPS, SLOTS = 3, 9
HEADS: dict[str, dict[str, Any]] = {
    "merged": {"head": "low_rank", "rescore": 0},
    "rescored": {"head": "low_rank", "rescore": 16},
    "truncated": {"head": "truncated", "draft_vocab_size": 80},
}
CASES = [(head, name) for head in HEADS for name in FORMS]


def interpreter() -> str | None:
    """A Python that has speculators."""
    if given := os.environ.get("SLIMSPEC_INTEROP_PYTHON"):
        return given
    return sys.executable if importlib.util.find_spec("speculators") else None


pytestmark = pytest.mark.skipif(
    interpreter() is None,
    reason="speculators is not installed here: set SLIMSPEC_INTEROP_PYTHON to a Python that has it",
)


def drafter_of(target: TargetDecoder, head: str, name: str) -> Drafter:
    made = tiny_drafter(target, **HEADS[head], **form(name))
    if isinstance(made.lm_head, TruncatedHead):
        made.lm_head.choose(torch.arange(2, 320, 4)[:80], target.lm_head.weight)
    return made


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case written as `export-drafter` writes it, and run by speculators in one process."""
    root = tmp_path_factory.mktemp("speculators")
    target_folder = write_tiny_llama(root / "target")
    target = load_target(target_folder)
    about = {"name": str(target_folder), "architectures": ["LlamaForCausalLM"]}
    generator = torch.Generator().manual_seed(3)
    folders = []
    for head, name in CASES:
        folder = root / f"{head}-{name}"
        folders.append(str(folder))
        with write_artifact(folder / "checkpoint", "eagle3", "tiny", {}, {}, {}) as out:
            write_eagle3(drafter_of(target, head, name), out, "speculators", "fp32", about)
        tokens = torch.randint(3, 300, (SLOTS + STEPS,), generator=generator)
        taps = torch.randn(len(tokens), 96, generator=generator)
        save_file({"tokens": tokens, "taps": taps}, folder / "inputs.safetensors")
    python = interpreter()
    assert python is not None
    done = subprocess.run(
        [python, str(SCRIPT), *folders],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # what transformers says of tensors that the model does not know, or lacks
    assert not {"UNEXPECTED", "MISSING", "MISMATCH"} & set(done.stderr.split())
    (root / "versions.json").write_text(done.stdout.splitlines()[-1])
    return root


@pytest.mark.parametrize(("head", "name"), CASES)
@torch.no_grad()
def test_speculators_computes_our_scores(ran: Path, head: str, name: str) -> None:
    """Three draft steps on random taps, to 1e-4."""
    target, folder = load_target(ran / "target"), ran / f"{head}-{name}"
    drafter, inputs = drafter_of(target, head, name), load_file(folder / "inputs.safetensors")
    theirs = load_file(folder / "scores.safetensors")
    assert len(theirs) == STEPS
    ids = torch.cat((torch.zeros(1, dtype=torch.int64), inputs["tokens"]))  # x_0 is never read
    taps = torch.cat((inputs["taps"], torch.zeros(1, 96)))
    for k, state in enumerate(unroll(drafter, ids[None], taps[None], STEPS)):
        scores = drafter.lm_head.scores(drafter.head_input(state[0, :SLOTS]))  # type: ignore[operator]
        if isinstance(drafter.lm_head, TruncatedHead):
            scores = scores[:, drafter.lm_head.draft_ids]
        torch.testing.assert_close(theirs[str(k)][:SLOTS], scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("head", "name"), CASES)
def test_what_speculators_saves_is_read_to_the_bit(ran: Path, head: str, name: str) -> None:
    """Its own names, config and embedding; the head is dense where no vocabulary is left out."""
    target, folder = load_target(ran / "target"), ran / f"{head}-{name}"
    found = read_eagle3(folder / "saved", target, None)
    wanted = load_file(folder / "checkpoint" / "model.safetensors")
    assert found.config.variants == FORMS[name]
    assert found.config.taps == drafter_of(target, head, name).config.taps
    assert found.config.rope == drafter_of(target, head, name).config.rope
    ids = wanted.pop("d2t", None)
    if isinstance(found.lm_head, TruncatedHead):
        assert ids is not None
        assert torch.equal(found.lm_head.draft_ids, ids + torch.arange(len(ids)))
    for key, tensor in found.state_dict().items():
        if key != "lm_head.draft_ids":
            assert torch.equal(tensor, wanted[key.replace("midlayer.", "layers.0.")]), key


def test_the_package_is_one_that_the_docs_name(ran: Path) -> None:
    """docs/interop.md says with which versions the above was run."""
    version = json.loads((ran / "versions.json").read_text())["speculators"]
    text = (Path(__file__).parents[2] / "docs" / "interop.md").read_text()
    assert f"speculators {version}" in text
