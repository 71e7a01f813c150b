"""Load a target from a Hugging Face folder; save and load the native drafter checkpoint.

Native drafter: `config.json` + `model.safetensors` with the names of `drafter.eagle3.Drafter` (low-
rank factors as `lm_head.down.weight` [r, H] and `lm_head.up.weight` [V, r]). Missing and unexpected
keys are both errors. safetensors only; weights are read memory-mapped, one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from drafter.config import DrafterConfig, TargetConfig, read_drafter_config
from drafter.decoder import TargetDecoder
from drafter.eagle3 import Drafter
from drafter.errors import UsageError
from drafter.families import read_target_config
from drafter.heads.truncated import TruncatedHead
from drafter.rounding import rounded
from drafter.sources.folder import WEIGHTS
from drafter.sources.folder import weight_files as weight_files  # noqa: PLC0414 - part of this module
from drafter.vocabulary import check_draft_ids


def load_target(
    folder: Path, taps: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32
) -> TargetDecoder:
    """The target of a Hugging Face folder, in evaluation mode. Raises UsageError."""
    config = read_target_config(folder)
    check_taps(config, taps)
    with torch.device("meta"):
        model = TargetDecoder(config, taps)
    tensors = {name.removeprefix("model."): t for name, t in read_tensors(folder, dtype)}
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    fill(model, tensors, folder, aliases={"lm_head.weight"} if config.tie_embeddings else set())
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return materialise_buffers(model, TargetDecoder(config_without_layers(config), (0,))).eval()


def config_without_layers(config: TargetConfig) -> TargetConfig:
    """The same config with one tiny layer: enough to compute the rotary table."""
    return config.model_copy(update={"num_layers": 1, "vocab_size": 1, "intermediate_size": 1})


def materialise_buffers(model: TargetDecoder, reference: TargetDecoder) -> TargetDecoder:
    """Give a model built on the meta device its rotary frequencies."""
    model.inverse = reference.inverse
    return model


def check_taps(config: TargetConfig, taps: tuple[int, ...] | None) -> None:
    """Raises UsageError when a tap id is not a layer of the target."""
    for tap in taps or ():
        if not 0 <= tap < config.num_layers:
            raise UsageError(
                f"Tap id {tap} is out of range: the target has {config.num_layers} layers, so "
                f'tap ids ("input of layer i") run from 0 to {config.num_layers - 1}.'
            )


def read_tensors(folder: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors files (sharded or not), as `dtype` when given and not
    of whole numbers. Raises UsageError.
    """
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 - safe_open is not a mapping
                    tensor = reader.get_tensor(name)
                    floating = dtype is not None and tensor.is_floating_point()
                    yield name, tensor.to(dtype) if floating else tensor
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"{path} cannot be read as safetensors ({error}); it is truncated or damaged: "
                "fetch or write it again."
            ) from None


def fill(
    model: nn.Module, tensors: dict[str, Tensor], where: Path, aliases: set[str] | None = None
) -> None:
    """Assign tensors to a model's parameters. Missing, unexpected and misshapen keys raise
    UsageError.
    """
    wanted = {k: v.shape for k, v in model.state_dict().items() if k not in (aliases or set())}
    missing, unexpected = (
        sorted(wanted.keys() - tensors.keys()),
        sorted(tensors.keys() - wanted.keys()),
    )
    if missing or unexpected:
        raise UsageError(
            f"{where}: the weights do not fit the config. Missing: {_some(missing)}; "
            f"unexpected: {_some(unexpected)}."
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise UsageError(
                f"{where}: {name} has shape {list(tensors[name].shape)}, "
                f"the config needs {list(shape)}."
            )
    model.load_state_dict(tensors, strict=False, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "none"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def save_drafter(model: Drafter, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write `config.json` and `model.safetensors` into an existing folder, weights as `dtype`.

    Raises UsageError for weights that are not finite as `dtype`; `rounding.narrowest` holds them.
    """
    mend = "save them as float32"
    tensors = rounded(model.state_dict(), dtype, "this drafter's weights", mend)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(model.config.model_dump(mode="json"), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def load_drafter(
    folder: Path, target: TargetDecoder, dtype: torch.dtype = torch.float32
) -> Drafter:
    """A native folder's drafter, wired to the target's embedding and head. Raises UsageError."""
    config = read_drafter_config(folder)
    check_fits(config, target.config, folder)
    model = Drafter(config, target.embed_tokens.weight, target.lm_head.weight)
    fill(model, dict(read_tensors(folder, dtype)), folder)
    if isinstance(model.lm_head, TruncatedHead):
        ends = target.config.eos_token_ids
        check_draft_ids(model.lm_head.draft_ids, config.vocab_size, ends, str(folder))
    return model.eval()


def check_weights(folder: Path) -> None:
    """Whether a native drafter's weights are whole and fit its config; needs no target. Raises
    UsageError.
    """
    config = read_drafter_config(folder)
    with torch.device("meta"):
        model = Drafter(config, torch.empty(config.vocab_size, config.target_hidden_size))
    fill(model, dict(read_tensors(folder)), folder)


def check_fits(config: DrafterConfig, target: TargetConfig, where: Path) -> None:
    """A drafter belongs to one target: vocabulary, hidden size and depth must agree. Raises
    UsageError.
    """
    for field, mine, its in (
        ("vocab_size", config.vocab_size, target.vocab_size),
        ("target_hidden_size", config.target_hidden_size, target.hidden_size),
        ("target_layers", config.target_layers, target.num_layers),
    ):
        if mine != its:
            raise UsageError(
                f"The drafter in {where} was trained for another target: its {field} is {mine}, "
                f"the target's is {its}. Train one for this target with `pipeline train`."
            )
