"""Our drafters as EAGLE-3 checkpoints that other engines load. The way back: `drafter.published`.

Other engines know no low-rank head, so it is written as the dense matrix it stands for: the product
of its factors, taken in float32, or for a rescoring head the target's own rows, which give its
scores. That is compatibility without SlimSpec's speed: V x H weights instead of (V + H) x r.

Tap ids. Ours mean "input of layer i". vLLM and speculators read ids so too; SGLang and SpecForge
read "output of layer i", 0-based, so for them every id is one less. Names and loaders' habits:
vLLM `llama_eagle3.py` and SGLang `llama_eagle3.py` of mid 2026, speculators 0.9. SGLang skips
tensors that it does not know without a word, so what it cannot compute must be refused here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from drafter.config import VARIANTS, DrafterConfig
from drafter.eagle3 import Drafter
from drafter.errors import UsageError
from drafter.heads.low_rank import LowRankHead
from drafter.heads.truncated import TruncatedHead
from drafter.rounding import rounded
from drafter.sources.folder import WEIGHTS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Layout:
    """How an engine wants a drafter: the layer's name, its config, whether it needs the maps
    between draft and target ids even where they are the identity, and the target's embedding, and
    which variants of the forward it cannot compute.
    """

    layer: str
    config: Callable[[DrafterConfig, dict[str, Any]], dict[str, Any]]
    identity_maps: bool = False
    embedding: bool = False
    lacks: tuple[str, ...] = ()


def dense_head(drafter: Drafter) -> Tensor:
    """The head as one matrix [V, H], float32: its scores of h are W h. Of a truncated head only the
    rows it has, [Vd, H].
    """
    head = drafter.lm_head
    if isinstance(head, TruncatedHead):
        return head.weight.detach().float()
    if isinstance(head, LowRankHead) and not head.rescore:
        return factor_product(head)
    identity = torch.eye(drafter.config.hidden_size)
    scores: Tensor = head.scores(identity)  # type: ignore[operator]  # [H, V]
    return scores.detach().float().T.contiguous()


def factor_product(head: LowRankHead) -> Tensor:
    """W_up W_down in float32: [V, H]."""
    return head.up.weight.detach().float() @ head.down.weight.detach().float()


def check_format(layout: str, dtype: str, config: DrafterConfig) -> None:
    """Raise UsageError for an unknown layout or dtype, or a drafter that the layout cannot hold."""
    if layout not in LAYOUTS:
        raise UsageError(f"the format '{layout}' is unknown; known: {', '.join(LAYOUTS)}.")
    if dtype not in DTYPES:
        raise UsageError(f"the precision '{dtype}' is unknown; known: {', '.join(DTYPES)}.")
    for name in (*config.variants, *["own_embedding"] * config.own_embedding):
        if name in LAYOUTS[layout].lacks:
            raise UsageError(
                f"this drafter has the variant {name}, which {layout} does not compute and would "
                f"leave out without an error; train one without it, or choose another --format."
            )
    if config.hidden_size != config.target_hidden_size:
        raise UsageError(
            f"this drafter's hidden size {config.hidden_size} is not its target's "
            f"({config.target_hidden_size}), whose embedding it reads; the format '{layout}' needs "
            "equal ones: train one of the target's own size."
        )


def write_eagle3(
    drafter: Drafter, folder: Path, layout: str, dtype: str, target: dict[str, Any]
) -> None:
    """Write `config.json` and `model.safetensors` into an existing folder.

    `target`: `name` and `architectures` of the model it drafts for. Raises UsageError for an
    unknown layout or dtype, a tap or variant that the layout cannot name, or weights that are not
    finite as `dtype`.
    """
    check_format(layout, dtype, drafter.config)
    chosen = LAYOUTS[layout]
    config = chosen.config(drafter.config, target) | {"torch_dtype": _torch_name(dtype)}
    tensors = {
        name.replace("midlayer.", chosen.layer, 1): tensor
        for name, tensor in drafter.state_dict().items()
        if not name.startswith("lm_head.")
    }
    tensors["lm_head.weight"] = dense_head(drafter)
    if chosen.embedding:
        tensors["embed_tokens.weight"] = drafter.embedding
    mend = "choose --precision bf16, which ends where fp32 does"
    tensors = rounded(tensors, DTYPES[dtype], "this drafter's weights", mend)
    head, vocab = drafter.lm_head, drafter.config.vocab_size
    if isinstance(head, TruncatedHead) or chosen.identity_maps:
        ids = head.draft_ids if isinstance(head, TruncatedHead) else torch.arange(vocab)
        tensors["d2t"] = ids - torch.arange(len(ids))  # target id = draft id + d2t
        tensors["t2d"] = torch.isin(torch.arange(vocab), ids)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _torch_name(dtype: str) -> str:
    return str(DTYPES[dtype]).removeprefix("torch.")


def _layer_config(config: DrafterConfig) -> dict[str, Any]:
    """The drafter's one layer as a Llama config. Nothing is left to a loader's default."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope.theta}
    if config.rope.kind == "linear":
        rope |= {"rope_type": "linear", "factor": config.rope.factor}
    if config.rope.kind == "llama3":
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope.factor,
            "low_freq_factor": config.rope.low_freq_factor,
            "high_freq_factor": config.rope.high_freq_factor,
            "original_max_position_embeddings": config.rope.original_max_positions,
        }
    return {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope.theta,
        "rope_parameters": rope,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
    }


def _plain(config: DrafterConfig, taps: tuple[int, ...]) -> dict[str, Any]:
    return _layer_config(config) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        # null would make SGLang borrow the target's head
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "target_hidden_size": config.target_hidden_size,
        **_variants(config),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(taps),
            "use_aux_hidden_state": True,
            "norm_before_fc": config.norm_before_fc,  # vLLM looks here first, TensorRT-LLM only
        },
    }


def _variants(config: DrafterConfig) -> dict[str, bool]:
    """Every variant, those that are off too: loaders' defaults differ."""
    return {name: getattr(config, name) for name in VARIANTS}


def _vllm(config: DrafterConfig, target: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    return _plain(config, config.taps)


def _sglang(config: DrafterConfig, target: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    if 0 in config.taps:
        raise UsageError(
            "this drafter reads the input of layer 0, the embedding; the format 'sglang' names "
            "outputs of layers and cannot say that: train with other --taps."
        )
    return _plain(config, tuple(tap - 1 for tap in config.taps))


def _speculators(config: DrafterConfig, target: dict[str, Any]) -> dict[str, Any]:
    layer = _layer_config(config) | {"architectures": ["LlamaForCausalLM"]}
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": 4,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        **_variants(config),
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": list(config.taps),
        "embed_requires_grad": False,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {
                "name_or_path": target["name"],
                "architectures": target["architectures"],
            },
        },
    }


LAYOUTS: dict[str, Layout] = {
    "vllm": Layout("midlayer.", _vllm),
    "sglang": Layout(  # it puts the target's embedding over a drafter's own
        "midlayer.",
        _sglang,
        identity_maps=True,
        lacks=("norm_before_fc", "norm_before_residual", "own_embedding"),
    ),
    # speculators 0.9 leaves an embedding that is not in the file uninitialised, without an error
    "speculators": Layout("layers.0.", _speculators, embedding=True),
}
