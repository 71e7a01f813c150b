"""A target written as GGUF and read again is the same target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from drafter.errors import UnsupportedTarget
from drafter.families import read_target_config
from drafter.sources.gguf import GgufFile, convert_gguf
from drafter.sources.gguf_write import write_gguf
from tests.tiny_families import write_family
from tests.tiny_llama import write_tiny_llama


def there_and_back(folder: Path, out: Path, precision: Any = "f32") -> Path:
    path = out / "model.gguf"
    write_gguf(folder, path, precision)
    back = out / "back"
    back.mkdir()
    convert_gguf(GgufFile(path), back)
    return back


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
def test_weights_config_and_tokens_come_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_tiny_llama(tmp_path / "target", **changes)
    back = there_and_back(folder, tmp_path)
    weights, found = (load_file(f / "model.safetensors") for f in (folder, back))
    assert weights.keys() == found.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight, found[name], err_msg=name)
    wanted, config = read_target_config(folder), read_target_config(back)
    eps = {"rms_norm_eps": 0.5}  # GGUF holds a float32
    assert config.model_copy(update=eps) == wanted.model_copy(
        update={**eps, "eos_token_ids": config.eos_token_ids}
    )
    assert set(wanted.eos_token_ids) <= set(config.eos_token_ids)
    texts = "The target checks <|im_end|> what the drafter guesses 123."
    first, second = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (folder, back))
    assert first.encode(texts).ids == second.encode(texts).ids


@pytest.mark.parametrize(("precision", "error"), [("f16", 1e-3), ("q8_0", 2e-2)])
def test_narrower_weights_are_close(tmp_path: Path, precision: str, error: float) -> None:
    folder = write_tiny_llama(tmp_path / "target")
    back = there_and_back(folder, tmp_path, precision)
    weights, found = (load_file(f / "model.safetensors") for f in (folder, back))
    for name, weight in weights.items():
        assert np.abs(weight - found[name]).max() <= error * np.abs(weight).max()
        assert weight.ndim == 1 or not np.array_equal(weight, found[name])


def test_biases_and_norms_of_other_families(tmp_path: Path) -> None:
    for family in ("llama", "qwen3"):
        out = tmp_path / family
        folder = write_family(out / "target", family, tied=True, layers=2)
        back = there_and_back(folder, out)
        weights, found = (load_file(f / "model.safetensors") for f in (folder, back))
        assert weights.keys() == found.keys()
        assert all(np.array_equal(weights[name], found[name]) for name in weights)


def test_a_rotary_rule_that_gguf_would_need_more_for_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    folder = write_tiny_llama(tmp_path / "target", rope_parameters=rope)
    with pytest.raises(UnsupportedTarget, match=r"linear .* default"):
        write_gguf(folder, tmp_path / "model.gguf")
    assert json.loads((folder / "config.json").read_text())["rope_parameters"] == rope
