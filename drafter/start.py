"""A drafter before training: random, or started from the target's own weights.

`from_target`: `fc` passes the highest tap through, attention and MLP are the target's last layer
acting on the hidden half of the input (the embedding half starts small), and the final norm is the
target's. The head's low-rank factors start as `activation-pca` of the target's final states, as
the target's `svd`, or `random`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drafter.config import DrafterConfig
from drafter.decoder import DecoderLayer, TargetDecoder
from drafter.eagle3 import Drafter
from drafter.errors import UsageError
from drafter.heads.low_rank import LowRankHead, initialise
from drafter.heads.truncated import TruncatedHead


def start_drafter(
    config: DrafterConfig,
    target: TargetDecoder,
    *,
    head_init: str = "activation-pca",
    from_target: bool = True,
    states: Tensor | None = None,
    draft_ids: Tensor | None = None,
    body: Drafter | None = None,
    seed: int = 0,
) -> Drafter:
    """A fresh drafter. `states` [N, H] (final-normed) are needed by `activation-pca`, `draft_ids`
    [Vd] by a truncated head. With a `body`, all but the head is that drafter's. Raises UsageError.
    """
    torch.manual_seed(seed)
    drafter = Drafter(
        config, target.embed_tokens.weight.detach().float(), target.lm_head.weight.detach().float()
    )
    for module in drafter.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.02)
    if body is not None:
        copy_body(drafter, body)
    elif from_target and config.hidden_size == target.config.hidden_size:
        copy_last_layer(drafter, target)
    if isinstance(drafter.lm_head, TruncatedHead):
        if draft_ids is None:
            raise UsageError("A truncated head needs the ids it may draft.")
        drafter.lm_head.choose(draft_ids, target.lm_head.weight.detach())
    if isinstance(drafter.lm_head, LowRankHead):
        initialise(drafter.lm_head, head_init, target.lm_head.weight.detach(), states)
    return drafter


@torch.no_grad()
def copy_body(drafter: Drafter, other: Drafter) -> None:
    """Take over everything but the head from another drafter of this target. Raises UsageError for
    another shape.
    """
    mine, its = drafter.config.variants, other.config.variants
    if mine != its:
        raise UsageError(
            f"The drafter to take the layer from has the variants {list(its)}; {list(mine)} are "
            "needed."
        )
    head = "lm_head."
    body = {name: w for name, w in other.state_dict().items() if not name.startswith(head)}
    needed = {name: w for name, w in drafter.state_dict().items() if not name.startswith(head)}
    for name in sorted({*body, *needed}):
        found, wanted = (list(d[name].shape) if name in d else None for d in (body, needed))
        if found != wanted or drafter.config.taps != other.config.taps:
            raise UsageError(
                f"The drafter to take the layer from has {name} {found} and taps "
                f"{list(other.config.taps)}; {wanted} and {list(drafter.config.taps)} are needed."
            )
    drafter.load_state_dict(body, strict=False)


@torch.no_grad()
def copy_last_layer(drafter: Drafter, target: TargetDecoder) -> None:
    """Start the drafter's layer as the target's last one, reading the hidden half of the input."""
    size = target.config.hidden_size
    source, layer = target.layers[-1], drafter.midlayer
    assert isinstance(source, DecoderLayer)
    drafter.fc.weight.mul_(0.5)
    drafter.fc.weight[:, -size:] += torch.eye(size)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layer.self_attn, name).weight[:, -size:] = getattr(
            source.self_attn, name
        ).weight.float()
    layer.self_attn.o_proj.weight.copy_(source.self_attn.o_proj.weight)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(layer.mlp, name).weight.copy_(getattr(source.mlp, name).weight)
    layer.hidden_norm.weight.copy_(source.input_layernorm.weight)
    layer.post_attention_layernorm.weight.copy_(source.post_attention_layernorm.weight)
    drafter.norm.weight.copy_(target.norm.weight)
