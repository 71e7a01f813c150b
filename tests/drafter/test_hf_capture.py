"""Capturing from `transformers`: our decoder's values for a Llama, the model's own for the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from drafter.capture import capture, capture_shards, read_captured
from drafter.checkpoint import load_target
from drafter.corpus import write_shards
from drafter.errors import UnsupportedTarget, UsageError
from drafter.families import read_target_config
from drafter.hf_capture import load_hf_ends, load_hf_target, read_hf_config
from tests.tiny_drafter import tiny_documents

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3Moe": {"num_experts": 4, **EXPERTS},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Gemma": {},
    "Gemma2": {"final_logit_softcapping": None, "sliding_window": 8},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "GPT2": {},
}
TAPS = (1, 2, 3)


def write_model(folder: Path, name: str, **changes: Any) -> Any:
    """A random model whose norms are random too, saved as a Hugging Face folder."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS.get(name, {}), **changes})
    kind = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_taps_and_states_are_the_model_s_own_and_its_logits_follow(
    name: str, tmp_path: Path
) -> None:
    """Each document of a padded batch as the model alone sees it: layer inputs, final state,
    logits.
    """
    model = write_model(tmp_path, name)
    target = load_hf_target(tmp_path, TAPS)
    documents = tiny_documents(5)
    lengths = [len(d.ids) for d in documents]
    assert len(set(lengths)) > 1, "nothing is padded"
    ids = torch.zeros(5, max(lengths), dtype=torch.int64)
    for row, d in enumerate(documents):
        ids[row, : len(d.ids)] = d.ids
    seen = target.view(ids, lengths)
    ends = load_hf_ends(tmp_path)
    assert torch.equal(ends.embed_tokens.weight, model.get_input_embeddings().weight)
    assert torch.equal(ends.lm_head.weight, model.get_output_embeddings().weight)
    for row, n in enumerate(lengths):
        alone = model(documents[row].ids[None], output_hidden_states=True, use_cache=False)
        taps = torch.cat([alone.hidden_states[i][0] for i in TAPS], dim=-1)
        torch.testing.assert_close(seen.taps[row, :n], taps, atol=1e-5, rtol=1e-5)
        logits = target.logits(seen.states[row, :n])
        torch.testing.assert_close(logits, alone.logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(seen.states[row, :n] @ ends.lm_head.weight.T, logits)
    captured = list(capture(target, documents))
    assert torch.equal(
        captured[0].likeliest[:, 0].long(), target.logits(seen.states)[0].argmax(-1)[: lengths[0]]
    )


@torch.no_grad()
def test_a_llama_is_captured_as_our_own_decoder_captures_it(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """The stored shards are equal to a bfloat16 rounding, the values before it to 1e-5."""
    ours, theirs = load_target(tiny_llama_dir, TAPS), load_hf_target(tiny_llama_dir, TAPS)
    documents = tiny_documents(6)
    (tmp_path / "corpus").mkdir()
    write_shards(tmp_path / "corpus", documents)
    for name, target in (("ours", ours), ("theirs", theirs)):
        capture_shards(target, tmp_path / "corpus", tmp_path / name, fingerprint="f")
    for a, b in zip(
        read_captured(tmp_path / "ours"), read_captured(tmp_path / "theirs"), strict=True
    ):
        for field in ("taps", "states"):
            torch.testing.assert_close(getattr(a, field), getattr(b, field), atol=1e-5, rtol=8e-3)
        assert torch.equal(a.likeliest[:, 0], b.likeliest[:, 0])
    ids = documents[0].ids[None]
    from drafter.capture import _view

    mine, other = _view(ours, ids), theirs.view(ids, [ids.shape[1]])
    torch.testing.assert_close(other.taps, mine.taps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.states, mine.states, atol=1e-5, rtol=1e-5)


def test_the_sizes_are_those_of_our_own_reader(tiny_llama_dir: Path) -> None:
    ours, theirs = read_target_config(tiny_llama_dir), read_hf_config(tiny_llama_dir)
    assert theirs == ours


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Gemma2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ("Phi", {}, "head has a bias"),
    ],
)
def test_logits_that_are_no_matrix_times_a_state_are_refused_by_name(
    name: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_model(tmp_path, name, **changes)
    with pytest.raises(UsageError, match=words):
        load_hf_target(tmp_path, TAPS)


def test_a_scale_that_nobody_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, "Cohere")
    monkeypatch.setattr("drafter.hf_capture._named_scales", lambda _: [1.0])
    with pytest.raises(UsageError, match=r"not its head times its final state .* is 0\.25"):
        load_hf_target(tmp_path, TAPS)


def test_weights_that_are_missing_or_pickled_and_code_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_model(tmp_path / "m", "Mixtral")
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    lost = next(name for name in weights if "layers.2" in name and "norm" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="1 are missing"):
        load_hf_target(tmp_path / "m", TAPS)
    torch.save(weights, tmp_path / "m" / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(UsageError, match="safetensors"):
        load_hf_target(tmp_path / "m", TAPS)
    (tmp_path / "c").mkdir()
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "c" / "config.json").write_text(json.dumps(code))
    (tmp_path / "c" / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UsageError, match="without code of its own"):
        read_hf_config(tmp_path / "c")


def test_our_own_reader_says_what_such_a_target_can_do(tmp_path: Path) -> None:
    write_model(tmp_path, "Mixtral")
    with pytest.raises(UnsupportedTarget, match=r"'mixtral' .* cannot be exported"):
        read_target_config(tmp_path)
