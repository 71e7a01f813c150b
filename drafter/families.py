"""Target families: how each Hugging Face `config.json` maps to `TargetConfig`.

All are the same decoder; a family is a row of `FAMILIES`: the few things that its config implies
but does not say.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafter.config import RopeConfig, TargetConfig, read_json
from drafter.errors import UsageError


@dataclass(frozen=True)
class Family:
    """What a `model_type` implies. `qkv_bias` None: as the config's `attention_bias` says."""

    qkv_bias: bool | None = None
    qk_norm: bool = False
    tie_default: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(qkv_bias=False),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
}


def read_target_config(folder: Path) -> TargetConfig:
    """The target config of a Hugging Face folder, end-of-sequence ids of `generation_config.json`
    included.

    Raises UsageError for an unknown family, an unknown RoPE rule or a sliding window.
    """
    raw = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    return target_config_from_hf(raw, eos if eos is not None else raw.get("eos_token_id"))


def target_config_from_hf(raw: dict[str, Any], eos: int | list[int] | None) -> TargetConfig:
    """Map a Hugging Face config to ours. Raises UsageError."""
    family = _family(raw)
    heads = int(raw["num_attention_heads"])
    bias = bool(raw.get("attention_bias", False))
    return TargetConfig(
        family=raw["model_type"],
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope=_rope(raw),
        tie_embeddings=raw.get("tie_word_embeddings", family.tie_default),
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=bias and family.qkv_bias is None,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        max_positions=raw.get("max_position_embeddings", 2048),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
    )


def _family(raw: dict[str, Any]) -> Family:
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise UsageError(
            f"Target family {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}. "
            "CONTRIBUTING.md says how to add one."
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise UsageError(f"hidden_act is {raw['hidden_act']!r}; the decoder supports 'silu'.")
    layers = raw.get("layer_types") or []
    if "sliding_attention" in layers or (
        raw.get("sliding_window") and raw.get("use_sliding_window", kind == "mistral")
    ):
        raise UsageError(
            f"The target uses sliding-window attention ({raw.get('sliding_window')} tokens); "
            "the decoder supports full attention. Set sliding_window to null for shorter contexts."
        )
    return FAMILIES[kind]


def _rope(raw: dict[str, Any]) -> RopeConfig:
    """RoPE parameters: transformers 5 keeps them in `rope_parameters`, 4 in `rope_theta` and
    `rope_scaling`.
    """
    rules = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = rules.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = rules.get("rope_type", rules.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UsageError(
            f"RoPE scaling {kind!r} is not supported; supported: default, linear, llama3."
        )
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=rules.get("factor", 1.0),
        low_freq_factor=rules.get("low_freq_factor", 1.0),
        high_freq_factor=rules.get("high_freq_factor", 4.0),
        original_max_positions=rules.get("original_max_position_embeddings", 8192),
    )
