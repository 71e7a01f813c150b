"""Target families: how each Hugging Face `config.json` maps to `TargetConfig`.

All are the same decoder; a family is a row of `FAMILIES`: the few things that its config implies
but does not say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafter.config import RopeConfig, TargetConfig, read_json
from drafter.errors import UnsupportedTarget, UsageError


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


_OTHERS = (
    "For such a target `pipeline train` captures with transformers, and `pipeline corpus --server` "
    "has a server answer; it cannot be exported, checked or served."
)


def read_target_config(folder: Path) -> TargetConfig:
    """The target config of a Hugging Face folder, end-of-sequence ids of `generation_config.json`
    included.

    Raises UnsupportedTarget for an unknown family, an unknown RoPE rule or a sliding window,
    UsageError for a field that is missing or bad.
    """
    path = folder / "config.json"
    raw = read_json(path)
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    return target_config_from_hf(raw, eos if eos is not None else raw.get("eos_token_id"), path)


def target_config_from_hf(
    raw: dict[str, Any], eos: int | list[int] | None, where: Path | str = "config.json"
) -> TargetConfig:
    """Map a Hugging Face config to ours; `where` is its file. Raises UsageError."""
    family = _family(raw)
    fields = _Fields(raw, where)
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    bias = fields.flag("attention_bias", False)
    return TargetConfig(
        family=raw["model_type"],
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", heads),
        head_dim=fields.size("head_dim", max(1, hidden // heads)),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields),
        tie_embeddings=fields.flag("tie_word_embeddings", family.tie_default),
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=bias and family.qkv_bias is None,
        mlp_bias=fields.flag("mlp_bias", False),
        qk_norm=family.qk_norm,
        max_positions=fields.size("max_position_embeddings", 2048),
        eos_token_ids=_end_ids(eos, where),
    )


@dataclass(frozen=True)
class _Fields:
    """Checked values of a JSON object. A missing field has its default; so has a null size or flag
    (null means "as implied" there), but not a null number.
    """

    raw: dict[str, Any]
    where: Path | str
    prefix: str = ""

    def size(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.bad(name, "a whole number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.raw.get(name, default)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not plain or not 0 < value < math.inf:
            raise self.bad(name, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.bad(name, "true or false")
        return default if value is None else value

    def bad(self, name: str, needed: str) -> UsageError:
        found = f"is {self.raw[name]!r:.60}" if name in self.raw else "is missing"
        return UsageError(f"{self.where}: field '{self.prefix}{name}' {found}, {needed} is needed.")


def _end_ids(eos: Any, where: Path | str) -> tuple[int, ...]:
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise UsageError(
            f"{where} or generation_config.json beside it: field 'eos_token_id' is {eos!r:.60}, "
            "a token id or a list of them is needed."
        )
    return tuple(ids)


def _family(raw: dict[str, Any]) -> Family:
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnsupportedTarget(
            f"Target family {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}. "
            f"{_OTHERS} CONTRIBUTING.md says how to add a family."
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedTarget(
            f"hidden_act is {raw['hidden_act']!r}; the decoder supports 'silu'. {_OTHERS}"
        )
    if "sliding_attention" in str(raw.get("layer_types")) or (
        raw.get("sliding_window") and raw.get("use_sliding_window", kind == "mistral")
    ):
        raise UnsupportedTarget(
            f"The target uses sliding-window attention ({raw.get('sliding_window')} tokens); "
            "the decoder supports full attention. Set sliding_window to null for shorter contexts. "
            f"{_OTHERS}"
        )
    return FAMILIES[kind]


def read_rope(config: dict[str, Any], where: str) -> RopeConfig:
    """RoPE of a Hugging Face config. Raises UsageError."""
    return _rope(_Fields(config, where))


def _rope(fields: _Fields) -> RopeConfig:
    """RoPE parameters: transformers 5 keeps them in `rope_parameters`, 4 in `rope_theta` and
    `rope_scaling`.
    """
    name = "rope_parameters" if fields.raw.get("rope_parameters") else "rope_scaling"
    found = fields.raw.get(name) or {}
    if not isinstance(found, dict):
        raise fields.bad(name, "an object or null")
    rules = _Fields(found, fields.where, f"{name}.")
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedTarget(
            f"RoPE scaling {kind!r} is not supported; supported: default, linear, llama3. {_OTHERS}"
        )
    return RopeConfig(
        theta=(rules if "rope_theta" in found else fields).number("rope_theta", 10_000.0),
        kind=kind,
        factor=rules.number("factor", 1.0),
        low_freq_factor=rules.number("low_freq_factor", 1.0),
        high_freq_factor=rules.number("high_freq_factor", 4.0),
        original_max_positions=rules.size("original_max_position_embeddings", 8192),
    )
