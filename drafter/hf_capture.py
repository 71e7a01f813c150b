"""Capture from any causal model of `transformers`, mixtures of experts included: for targets that
our own decoder cannot compute. Training only.

Taps are the inputs of the model's layers, states what its head reads, times the constant by which
the model scales its logits (Cohere, Granite, Falcon-H1): the teacher's logits are head(state). A
model whose logits are something else is refused. Weights are read from safetensors only and no
code of a checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafter.capture import View
from drafter.checkpoint import read_tensors
from drafter.config import RopeConfig, TargetConfig
from drafter.decoder import TargetDecoder
from drafter.errors import MissingError, UsageError

_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest


class HfTarget:
    """A model of `transformers` as `drafter.capture.Watched`. Make one with `load_hf_target`."""

    def __init__(self, model: Any, taps: Sequence[int], name: str) -> None:
        self.taps = tuple(taps)
        self.dtype: torch.dtype = model.dtype
        self._name = name
        self._decoder = model.get_decoder()
        self._head: Any = model.get_output_embeddings()
        self._layers = _layers(self._decoder, _text_config(model.config), name)
        self._size = self._head.weight.shape[1]
        _check_head(model, self._head, name)
        self._scale = _logit_scale(model, self._decoder, self._head, name)

    @torch.no_grad()
    def view(self, ids: Tensor, lengths: Sequence[int]) -> View:
        """See `Watched`. Raises UsageError for a model whose layers do not pass [B, T, H] on."""
        device = self._head.weight.device
        real = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]  # [B, T]
        with self._watching() as seen:
            output = self._decoder(
                input_ids=ids.to(device), attention_mask=real.long().to(device), use_cache=False
            )
        states = output.last_hidden_state  # [B, T, H]
        shape = (*ids.shape, self._size)
        if any(seen.get(i) is None or seen[i].shape != shape for i in self.taps):
            raise UsageError(
                f"{self._name}: its layers do not read one residual stream {list(shape)}, which "
                "taps are; a drafter needs a target that has one."
            )
        return View(torch.cat([seen[i] for i in self.taps], dim=-1), states * self._scale)

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """The teacher's logits of scaled states: [..., H] -> [..., V]."""
        found: Tensor = self._head(states)
        return found

    @contextmanager
    def _watching(self) -> Iterator[dict[int, Tensor]]:
        """Note the input of every tapped layer."""
        seen: dict[int, Tensor] = {}

        def note(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[i] = args[0] if args else kwargs["hidden_states"]

        hooks = [
            self._layers[i].register_forward_pre_hook(
                lambda _, args, kwargs, i=i: note(i, args, kwargs), with_kwargs=True
            )
            for i in self.taps
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


def load_hf_target(
    folder: Path,
    taps: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> HfTarget:
    """The model of a Hugging Face folder. Raises UsageError, MissingError without transformers."""
    return HfTarget(_load(folder, dtype).to(device), taps, str(folder))


def load_hf_ends(folder: Path) -> TargetDecoder:
    """What a drafter shares with such a target: embedding and head, fp32, in a decoder without
    layers. No other weight is read. Raises UsageError.
    """
    config = read_hf_config(folder)
    ends = TargetDecoder(config.model_copy(update={"num_layers": 0, "vocab_size": 1}), ())
    embedding, head = _end_names(folder)
    found = {name: t for name, t in read_tensors(folder) if name in (*embedding, *head)}
    first = next((found[name] for name in embedding if name in found), None)
    last = next((found[name] for name in head if name in found), None)
    if first is None or last is None:
        lacking = (embedding if first is None else head)[0]
        raise UsageError(f"{folder}: its safetensors hold no {lacking}; fetch it again.")
    ends.embed_tokens.weight = nn.Parameter(first.float())
    ends.lm_head.weight = nn.Parameter(last.float())
    ends.config = config
    return ends.eval().requires_grad_(False)


def _end_names(folder: Path) -> tuple[list[str], list[str]]:
    """What a checkpoint may call the weights of embedding and head: with and without the prefix
    that `transformers` adds.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        raise _unreadable(folder, error) from None
    every = [*model.named_parameters(remove_duplicate=False)]  # tied ones under all their names

    def names(weight: nn.Parameter) -> list[str]:
        own = [name for name, parameter in every if parameter is weight]
        return own + [name.removeprefix(f"{model.base_model_prefix}.") for name in own]

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return names(ends[0].weight), names(ends[1].weight)


def read_hf_config(folder: Path) -> TargetConfig:
    """The sizes of such a target, from which its drafter gets its own. Raises UsageError."""
    transformers = _transformers()
    try:
        whole = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        ends = transformers.GenerationConfig.from_model_config(whole).eos_token_id
        if (folder / "generation_config.json").is_file():
            given = transformers.GenerationConfig.from_pretrained(folder)
            ends = ends if given.eos_token_id is None else given.eos_token_id
        config = _text_config(whole)
        hidden, heads = config.hidden_size, config.num_attention_heads
        return TargetConfig(
            family=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=hidden,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * hidden,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            rms_norm_eps=getattr(config, "rms_norm_eps", None) or 1e-6,
            rope=RopeConfig(theta=_theta(config)),
            tie_embeddings=bool(config.tie_word_embeddings),
            max_positions=getattr(config, "max_position_embeddings", None) or 2048,
            eos_token_ids=tuple(ends if isinstance(ends, list) else [] if ends is None else [ends]),
        )
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise _unreadable(folder, error) from None


def _load(folder: Path, dtype: torch.dtype) -> Any:
    transformers = _transformers()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        raise _unreadable(folder, error) from None
    if lacking := sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])}):
        raise UsageError(
            f"{folder}: its weights do not fit its config.json: {len(lacking)} are missing or "
            f"misshapen, the first {lacking[0]}; fetch it again."
        )
    return model.eval().requires_grad_(False)


def _unreadable(folder: Path, error: Exception) -> UsageError:
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return UsageError(
        f"{folder} is no causal model that transformers can open from safetensors, without code "
        f"of its own ({first:.200}); use another target, or a newer transformers."
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingError(
            "this target needs transformers, which is not installed; run "
            "`pip install 'slimspec[train]'`."
        ) from None
    return transformers


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _theta(config: Any) -> float:
    """The base of the rotary embedding; of several layer types that of full attention."""
    rules = getattr(config, "rope_parameters", None) or {}
    rules = rules.get("full_attention", rules)
    return float(rules.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0)


def _layers(decoder: nn.Module, config: Any, name: str) -> nn.ModuleList:
    found = [
        module
        for module in decoder.children()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if len(found) != 1:
        raise UsageError(
            f"{name}: {type(decoder).__name__} has {len(found)} lists of "
            f"{config.num_hidden_layers} layers, one is needed to know where taps are."
        )
    return found[0]


def _check_head(model: Any, head: Any, name: str) -> None:
    """A drafter is taught by, and rescored with, a plain matrix."""
    config = _text_config(model.config)
    for field in _CAPS:
        if (cap := getattr(config, field, None)) is not None:
            raise UsageError(
                f"{name}: its config.json has {field} {cap}: its logits are capped, those of a "
                "drafter's teacher are a matrix times a state; use another target."
            )
    if getattr(head, "bias", None) is not None:
        raise UsageError(
            f"{name}: its head has a bias, the logits of a drafter's teacher are a matrix times a "
            "state; use another target."
        )


@torch.no_grad()
def _logit_scale(model: Any, decoder: Any, head: Any, name: str) -> float:
    """The constant s with logits = head(s * state), of those that the config names; measured on a
    few tokens. Raises UsageError where none fits.
    """
    ids = torch.arange(3, 19, device=model.device)[None] % head.weight.shape[0]
    logits = model(input_ids=ids, use_cache=False).logits.float()  # [1, T, V]
    plain = head(decoder(input_ids=ids, use_cache=False).last_hidden_state).float()
    scales = _named_scales(_text_config(model.config))
    errors = [float((logits - s * plain).abs().max()) for s in scales]
    best = min(range(len(scales)), key=errors.__getitem__)
    allowed = _TOLERANCE[model.dtype] * float(logits.abs().max())
    if logits.shape != plain.shape or not errors[best] <= allowed:
        fit = float((logits * plain).sum() / (plain * plain).sum())
        raise UsageError(
            f"{name}: its logits are not its head times its final state (off by "
            f"{errors[best]:.2g}, {allowed:.2g} are allowed; the best constant between them is "
            f"{fit:.4g}); use another target."
        )
    return scales[best]


def _named_scales(config: Any) -> list[float]:
    """1, and what Cohere, Granite (and MiniCPM3) and Falcon-H1 call the scale of their logits."""
    times = [getattr(config, field, None) for field in ("logit_scale", "lm_head_multiplier")]
    over = getattr(config, "logits_scaling", None)
    return [1.0, *(float(s) for s in times if s), *([1 / float(over)] if over else [])]
