"""Shapes of a target and of its drafter, read from JSON and checked once.

`TargetConfig` is what a Hugging Face `config.json` says of a decoder, in our words; `DrafterConfig`
is our own native `config.json`. Unknown keys in ours are refused; a target's file has many keys we
do not need. Tap ids mean "input of layer i" (the residual stream before layer i), 0-based.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from drafter.errors import UsageError

# Variants of the EAGLE-3 forward, under the names that published configs give them.
VARIANTS = ("fc_norm", "norm_before_fc", "norm_output", "norm_before_residual")


class RopeConfig(BaseModel):
    """Rotary embedding: base and, for `llama3` scaling, the four numbers of that rule."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    theta: float = Field(default=10_000.0, gt=0, allow_inf_nan=False)
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    low_freq_factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    high_freq_factor: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    original_max_positions: int = Field(default=8192, gt=0)


class TargetConfig(BaseModel):
    """A decoder of the Llama family. `qkv_bias`, `qk_norm` are what tells the families apart."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    family: str
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_positions: int = Field(gt=0)
    eos_token_ids: tuple[int, ...] = ()

    @property
    def kv_size(self) -> int:
        """Width of one cached key (or value) row: kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim

    @property
    def default_taps(self) -> tuple[int, ...]:
        """Three taps, low, middle and high, in the "input of layer i" convention."""
        n = self.num_layers
        return tuple(sorted({min(2, n - 1), n // 2, max(n - 3, 0)}))


class DrafterConfig(BaseModel):
    """One EAGLE-3 layer and its head. Written beside the weights as `config.json`.

    `tokenizer_sha256` is `drafter.tokenizer.vocabulary_sha256` of the target's tokenizer.
    `lm_head_rank` is None for a dense head; `rescore` is the number of preview candidates that get
    exact scores from the target's own head rows (0: none). `draft_vocab_size` is None but for a
    truncated head: how many tokens it can draft. `top_k` is how many candidates the
    graphs return. `VARIANTS` are off in the original EAGLE-3: `fc_norm` norms each tap before `fc`,
    `norm_before_fc` all of them as one vector; `norm_output` feeds the final-normed state back
    (EAGLE-3.1); with `norm_before_residual` the layer's residual is the normed hidden.
    `own_embedding`: tokens are embedded by a table in the checkpoint, not by the target's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model_type: Literal["slimspec"] = "slimspec"
    target_hidden_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, multiple_of=2)  # rotary positions turn pairs
    vocab_size: int = Field(gt=0)
    rms_norm_eps: float = Field(gt=0, allow_inf_nan=False)
    rope: RopeConfig
    taps: tuple[int, ...] = Field(min_length=1)
    target_layers: int = Field(gt=0)
    head: str = "low_rank"
    lm_head_rank: int | None = None
    rescore: int = 0
    draft_vocab_size: int | None = None
    top_k: int = Field(default=16, gt=0)
    max_positions: int = Field(default=8192, gt=0)
    tokenizer_sha256: str | None = None
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    own_embedding: bool = False

    @model_serializer(mode="wrap")
    def _only_variants_used(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What has no variant is written as it was before there were any: files and runs stay equal.
        fields: dict[str, Any] = dump(self)
        later = (*VARIANTS, "own_embedding")
        return {name: value for name, value in fields.items() if value or name not in later}

    @model_validator(mode="after")
    def _layer_fits(self) -> DrafterConfig:
        for tap in self.taps:
            if not 0 <= tap < self.target_layers:
                raise ValueError(
                    f"tap id {tap} is out of range: the target has {self.target_layers} layers, "
                    f'so tap ids ("input of layer i") run from 0 to {self.target_layers - 1}'
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("fc_norm and norm_before_fc exclude each other; choose one of them")
        return self

    @model_validator(mode="after")
    def _head_fits(self) -> DrafterConfig:
        if self.top_k > self.vocab_size:
            raise ValueError(f"top_k {self.top_k} exceeds the vocabulary ({self.vocab_size})")
        rank = self.lm_head_rank
        if self.head != "low_rank" and rank is not None:
            raise ValueError(f"lm_head_rank {rank} does not go with head '{self.head}'")
        if rank is not None and not 0 < rank <= self.hidden_size:
            raise ValueError(
                f"lm_head_rank {rank} must be between 1 and the hidden size {self.hidden_size}"
            )
        size = self.draft_vocab_size
        if (size is not None) != (self.head == "truncated"):
            raise ValueError(f"draft_vocab_size {size} does not go with head '{self.head}'")
        if size is not None and not self.top_k <= size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size {size} must be between top_k ({self.top_k}) and the vocabulary "
                f"({self.vocab_size})"
            )
        return self

    @model_validator(mode="after")
    def _rescoring_fits(self) -> DrafterConfig:
        if self.rescore and self.head != "low_rank":
            raise ValueError(f"rescore {self.rescore} does not go with head '{self.head}'")
        if self.rescore < 0 or 0 < self.rescore < self.top_k:
            raise ValueError(
                f"rescore {self.rescore} must be 0 (off) or at least top_k ({self.top_k})"
            )
        if self.rescore > self.vocab_size:
            raise ValueError(f"rescore {self.rescore} exceeds the vocabulary ({self.vocab_size})")
        if self.rescore and self.hidden_size != self.target_hidden_size:
            raise ValueError(
                f"rescore needs equal hidden sizes: drafter {self.hidden_size}, "
                f"target {self.target_hidden_size}"
            )
        return self

    @property
    def variants(self) -> tuple[str, ...]:
        """The `VARIANTS` that this drafter has."""
        return tuple(name for name in VARIANTS if getattr(self, name))

    @property
    def kv_size(self) -> int:
        """Width of one cached key (or value) row."""
        return self.num_kv_heads * self.head_dim


def default_rank(hidden_size: int) -> int:
    """d/8, rounded to a multiple of 8 (SlimSpec, arXiv 2605.10453), at least 8."""
    return max(8, round(hidden_size / 8 / 8) * 8)


def drafter_config_for(target: TargetConfig, **changes: Any) -> DrafterConfig:
    """The default drafter of a target: one layer of the target's own shape, low-rank head of rank
    d/8.
    """
    fields: dict[str, Any] = {
        "target_hidden_size": target.hidden_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_heads": target.num_heads,
        "num_kv_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "vocab_size": target.vocab_size,
        "rms_norm_eps": target.rms_norm_eps,
        "rope": RopeConfig(theta=target.rope.theta),
        "taps": target.default_taps,
        "target_layers": target.num_layers,
        "max_positions": target.max_positions,
    }
    fields.update(changes)
    vocabulary = fields.get("draft_vocab_size") or target.vocab_size
    fields.setdefault("top_k", default_top_k(fields.get("rescore", 0), vocabulary))
    if fields.get("head", "low_rank") == "low_rank" and fields.get("lm_head_rank") is None:
        fields["lm_head_rank"] = default_rank(fields["hidden_size"])
    return checked_drafter_config(fields, "drafter options")


def default_top_k(rescore: int, vocab_size: int) -> int:
    """Candidates that the graphs return: drawing at temperature > 0 wants much of the law's mass,
    and a rescored head knows exact scores of `rescore` rows only (at least 16 are asked of it).
    """
    return min(64, max(16, rescore or vocab_size), vocab_size)


def checked_drafter_config(fields: dict[str, Any], where: str) -> DrafterConfig:
    """Build a DrafterConfig; a bad value becomes one sentence naming the field.

    Raises UsageError.
    """
    try:
        return DrafterConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "config"
        message = first["msg"].removeprefix("Value error, ")
        unsaid = first["type"] in ("missing", "value_error", "extra_forbidden")
        found = "" if unsaid else f" is {first['input']!r:.80}"
        raise UsageError(f"{where}: {field}{found}: {message}.") from None


def read_drafter_config(folder: Path) -> DrafterConfig:
    """The native `config.json` of a drafter folder. Raises UsageError."""
    return checked_drafter_config(read_json(folder / "config.json"), str(folder / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UsageError when it is missing or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}); write it again.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds {type(value).__name__}, not a JSON object.")
    return value
