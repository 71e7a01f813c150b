"""Published EAGLE-3 checkpoints, read: those of EAGLE, SpecForge and speculators.

Names: `midlayer.*` or `layers.0.*`, with or without `model.`; `d2t` holds target id minus draft id.
Tap ids: ours mean "input of layer i"; whoever means "output of layer i" has each one less. The same
words mean different things in different projects: what cannot be told from the files is asked for,
never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafter.checkpoint import fill, read_tensors
from drafter.config import VARIANTS, DrafterConfig, TargetConfig, drafter_config_for, read_json
from drafter.decoder import TargetDecoder
from drafter.eagle3 import Drafter
from drafter.errors import UsageError
from drafter.families import read_rope
from drafter.rounding import check_finite
from drafter.vocabulary import check_draft_ids

TAP_IDS = ("input", "output")  # what layer ids name: vLLM, speculators; SGLang, SpecForge
NORM_OUTPUT = ("fed-back", "head")  # what `norm_output` norms: EAGLE-3.1, all engines; SpecForge
_MAPS = ("d2t", "t2d")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Other names of the variants: an older SGLang's, TensorRT-LLM's.
_ALIASES = {"use_aux_norm": "fc_norm", "return_hidden_post_norm": "norm_output"}
_OLD_NORMS = {f"aux_norm_{which}": f"fc_norm.{i}" for i, which in enumerate(("low", "mid", "high"))}
_UNKNOWN = ("eh_proj_before_attn", "parallel_drafting")  # forms of others that we do not compute


def read_eagle3(
    folder: Path, target: TargetDecoder, tap_ids: str | None, norm_output: str | None = None
) -> Drafter:
    """The drafter of a published checkpoint, weights in their own dtype.

    `tap_ids`, one of `TAP_IDS`: what the layer ids in its config mean; None where the config names
    none or is of speculators. `norm_output`, one of `NORM_OUTPUT`: what that key means; None where
    it is not set or the config is of speculators. An embedding that is not the target's stays the
    drafter's own. Raises UsageError for a form of the layer that we do not compute, or weights that
    do not fit.
    """
    found = read_json(folder / "config.json")
    if found.get("model_type") == "slimspec":
        raise UsageError(f"{folder} is a drafter of ours already; use it with --drafter {folder}.")
    layer = _object(found, "transformer_layer_config", folder) or found
    configs = (_object(found, "eagle_config", folder), found, layer)  # the first that says it wins
    _check_form(configs, folder)
    variants = _variants(configs, norm_output, folder)
    _check_target(found, layer, target.config, folder)
    tensors = _own_names(dict(read_tensors(folder)))
    for name, tensor in tensors.items():
        if name not in _MAPS:
            _check_values(name, tensor, folder)
    own_embedding = _has_own_embedding(tensors, target)
    ids = _draft_ids(tensors, found.get("draft_vocab_size"), target.config.vocab_size, folder)
    taps = _taps(found, target.config, tap_ids, folder)
    _check_sizes(tensors, len(taps), target.config, folder)
    more = {**variants, "taps": taps, "own_embedding": own_embedding}
    config = _native_config(layer, tensors, ids, target.config, folder, **more)
    model = Drafter(config, target.embed_tokens.weight, target.lm_head.weight)
    if ids is not None and config.head == "truncated":
        check_draft_ids(ids, config.vocab_size, target.config.eos_token_ids, str(folder))
        tensors["lm_head.draft_ids"] = ids
    fill(model, tensors, folder)
    return model.eval()


def _check_values(name: str, tensor: Tensor, where: Path) -> None:
    """Raise UsageError for weights that are no plain floating-point numbers, or not finite."""
    if tensor.dtype not in _FLOATS:
        raise UsageError(
            f"{where}: {name} is {tensor.dtype}; float16, bfloat16 or float32 is needed."
        )
    check_finite(name, tensor, str(where))


def _object(config: dict[str, Any], name: str, where: Path) -> dict[str, Any]:
    """A nested object of a config; {} where it is not there."""
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"{where}/config.json: {name} is no object.")
    return value or {}


def _check_form(configs: Iterable[dict[str, Any]], where: Path) -> None:
    for config in configs:
        for name in _UNKNOWN:
            if config.get(name):
                raise UsageError(
                    f"{where}: its config sets {name}, a form of EAGLE-3 that this version does "
                    f"not compute; it can compute {', '.join(VARIANTS)}."
                )
        if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise UsageError(f"{where}: its config sets hidden_act to {act!r}, silu is needed.")


def _check_target(
    found: dict[str, Any], layer: dict[str, Any], target: TargetConfig, where: Path
) -> None:
    """Raise UsageError where a config names sizes of another target."""
    width = found.get("target_hidden_size") or layer.get("hidden_size")
    for field, said, needed in (
        ("vocab_size", layer.get("vocab_size"), target.vocab_size),
        ("target_hidden_size", width, target.hidden_size),
    ):
        if said is not None and said != needed:
            raise UsageError(
                f"{where} drafts for another target: its {field} is {said!r:.80}, the target's is "
                f"{needed}; give its own --target."
            )


def _check_sizes(tensors: dict[str, Tensor], taps: int, target: TargetConfig, where: Path) -> None:
    """Raise UsageError where the weights are of another number of taps or another width."""
    fc = tensors.get("fc.weight")
    if fc is not None and (fc.ndim != 2 or fc.shape[1] != taps * target.hidden_size):
        raise UsageError(
            f"{where}: fc.weight is {list(fc.shape)}, but {taps} taps of this target are "
            f"{taps * target.hidden_size} wide; it drafts for another target, or its config names "
            "other layers than it was trained with."
        )


def _variants(
    configs: tuple[dict[str, Any], ...], norm_output: str | None, where: Path
) -> dict[str, bool]:
    """Which variants a checkpoint has; one that its config does not name is off.

    For speculators' configs too: their own class has `norm_before_residual` off by default, though
    vLLM takes it as on where such a config lacks it (speculators itself always writes it).
    """
    found = dict.fromkeys(VARIANTS, False)
    for config in reversed(configs):
        for key in (*_ALIASES, *VARIANTS):
            value = config.get(key)
            if value is not None and not isinstance(value, bool):
                raise UsageError(f"{where}/config.json: {key} is {value!r:.80}, not true or false.")
            if value is not None:
                found[_ALIASES.get(key, key)] = value
    plain = [config["norm_output"] for config in configs if "norm_output" in config]
    if norm_output is None and any("speculators_model_type" in config for config in configs):
        norm_output = "fed-back"
    if plain and norm_output == "head":
        return found | {"norm_output": _without_feedback(plain[0], where)}
    if plain and plain[0] and norm_output != "fed-back":
        raise UsageError(
            f"{where}: its config sets norm_output; projects disagree whether that means the state "
            "fed back or only what the head reads: say --norm-output fed-back (EAGLE-3.1, vLLM, "
            "SGLang) or head (SpecForge)."
        )
    return found


def _without_feedback(normed_head: bool, where: Path) -> bool:
    if not normed_head:
        raise UsageError(
            f"{where}: its config sets norm_output to false, for SpecForge a head without a norm "
            "before it, which this version does not compute."
        )
    return False


def _own_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for name, tensor in tensors.items():
        own = name.removeprefix("model.")
        if own.startswith("layers.0."):
            own = own.replace("layers.0.", "midlayer.", 1)
        stem, _, kind = own.rpartition(".")
        named[f"{_OLD_NORMS.get(stem, stem)}.{kind}" if stem else own] = tensor
    return named


def _has_own_embedding(tensors: dict[str, Tensor], target: TargetDecoder) -> bool:
    """Whether the file's embedding is another than the target's; one that equals it, in its own
    dtype, is taken out.
    """
    own, theirs = tensors.get("embed_tokens.weight"), target.embed_tokens.weight
    if own is None:
        return False
    if own.shape == theirs.shape and torch.equal(own, theirs.to(own.dtype)):
        del tensors["embed_tokens.weight"]
        return False
    return True


def _draft_ids(
    tensors: dict[str, Tensor], said: Any, vocab_size: int, where: Path
) -> Tensor | None:
    """Target ids of the draft ids; None where they are the whole vocabulary in order.

    `said`: the config's `draft_vocab_size`. Raises UsageError where it, `d2t`, `t2d` and the head's
    rows contradict each other.
    """
    drafted, differences = tensors.pop("t2d", None), tensors.pop("d2t", None)
    head = tensors.get("lm_head.weight")
    rows = vocab_size if head is None else head.shape[0] if head.ndim else 0
    if said is not None and (isinstance(said, bool) or said != rows):
        whose = "the target's head, for there is no lm_head.weight," if head is None else "its head"
        raise UsageError(
            f"{where}/config.json: draft_vocab_size is {said!r:.80}, but {whose} has {rows} rows."
        )
    if differences is None:
        _check_mask(drafted, torch.arange(vocab_size), vocab_size, where)
        return None
    if differences.ndim != 1 or differences.is_floating_point():
        raise UsageError(f"{where}: d2t is {differences.dtype} {list(differences.shape)}, not ids.")
    if len(differences) != rows:
        raise UsageError(
            f"{where}: d2t names {len(differences)} tokens, but the head has {rows} rows"
            f"{'; its lm_head.weight is missing' if head is None else ''}."
        )
    ids = torch.arange(rows) + differences.long()
    _check_mask(drafted, ids, vocab_size, where)
    whole = rows == vocab_size and not differences.any()
    if head is None and not whole:
        raise UsageError(f"{where}: d2t reorders the tokens of a head that is not in the file.")
    return None if whole else ids


def _check_mask(drafted: Tensor | None, ids: Tensor, vocab_size: int, where: Path) -> None:
    """Raise UsageError where t2d, a mask over the target's tokens, marks others than `ids`."""
    if drafted is None:
        return
    wanted = torch.isin(torch.arange(vocab_size), ids)
    if drafted.shape != wanted.shape or not torch.equal(drafted.bool(), wanted):
        raise UsageError(
            f"{where}: t2d marks {int(drafted.bool().sum())} of {drafted.numel()} tokens, not "
            f"those {len(ids)} of {vocab_size} that d2t or the head names."
        )


def _taps(
    config: dict[str, Any], target: TargetConfig, tap_ids: str | None, where: Path
) -> tuple[int, ...]:
    """Taps in our convention, "input of layer i"."""
    key = "eagle_aux_hidden_state_layer_ids"
    ids = config.get(key) or (config.get("eagle_config") or {}).get(key)
    if not ids:
        return target.default_taps
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise UsageError(f"{where}/config.json: {key} is {ids!r:.80}, a list of layers is needed.")
    if "speculators_model_type" in config and tap_ids is None:
        tap_ids = "input"
    if tap_ids not in ("input", "output"):
        raise UsageError(
            f"{where}: its config names the layers {list(ids)}; projects disagree whether that "
            "means inputs or outputs: say --tap-ids input (vLLM) or output (SGLang, SpecForge)."
        )
    return tuple(int(i) + (tap_ids == "output") for i in ids)


def _native_config(
    layer: dict[str, Any],
    tensors: dict[str, Tensor],
    ids: Tensor | None,
    target: TargetConfig,
    where: Path,
    **more: Any,
) -> DrafterConfig:
    needed = ("hidden_size", "intermediate_size", "num_attention_heads")
    implied = ("num_key_value_heads", "head_dim", "max_position_embeddings")
    for name in (*needed, *(key for key in implied if layer.get(key) is not None)):
        value = layer.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(
                f"{where}/config.json: {name} is {value!r:.80}, a whole number above 0 is needed."
            )
    heads = layer["num_attention_heads"]
    head = "target" if "lm_head.weight" not in tensors else "dense" if ids is None else "truncated"
    return drafter_config_for(
        target,
        hidden_size=layer["hidden_size"],
        intermediate_size=layer["intermediate_size"],
        num_heads=heads,
        num_kv_heads=layer.get("num_key_value_heads") or heads,
        head_dim=layer.get("head_dim") or layer["hidden_size"] // heads,
        rms_norm_eps=layer.get("rms_norm_eps", 1e-6),
        rope=read_rope(layer, str(where)),
        max_positions=layer.get("max_position_embeddings") or target.max_positions,
        head=head,
        draft_vocab_size=len(ids) if head == "truncated" and ids is not None else None,
        **more,
    )
