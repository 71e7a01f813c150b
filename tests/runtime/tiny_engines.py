"""Tiny random engines that honour the graph contract with real mathematics, for runtime tests.

The target is the project's own decoder with random weights. Two drafters: `random` is a real
EAGLE-3 layer with random weights (most guesses fail); `twin` runs the target's own layers, so it
guesses well, but it never sees x_0, and `noise` makes it as bad as wanted. Both depend on
positions, masks, cached rows and the fed-back state, so a slip in any of them shows. Outputs of a
run are overwritten with NaN by the next one, as the contract allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from drafter.config import DrafterConfig, TargetConfig, drafter_config_for
from drafter.decoder import TargetDecoder, rope_tables
from drafter.eagle3 import Drafter
from engines.base import Arrays, CachedRows, decode_by_run
from engines.torch_backend import rows_of
from export.contract import GraphContract, drafter_contract, target_contract
from runtime.drafter import EngineDrafter
from runtime.target import EngineTarget

TAPS = (0, 1, 2)
FEATURE = 0.0005  # how much of the taps (or of the state) the twin takes in


class Tiny(NamedTuple):
    """A target, a drafter and the decoder behind the target."""

    target: EngineTarget
    drafter: EngineDrafter
    decoder: TargetDecoder
    engines: dict[str, TinyEngine]
    drafter_config: DrafterConfig


class TinyEngine:
    """An engine around a function; remembers its last feeds, refuses feeds outside the contract."""

    def __init__(
        self,
        contract: GraphContract,
        compute: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    ) -> None:
        self.name: str = contract.name
        self.input_names = tuple(spec.name for spec in contract.inputs)
        self.output_names = tuple(spec.name for spec in contract.outputs)
        self.contract = contract
        self.calls: list[dict[str, Tensor]] = []
        self._compute = compute
        self._last: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One pass."""
        assert set(feeds) == set(self.input_names)
        assert all(value.is_contiguous() for value in feeds.values())
        self.contract.check(feeds)
        self.calls.append({name: value.clone() for name, value in feeds.items()})
        outputs = self._compute(feeds)
        for stale in self._last.values():
            if stale.is_floating_point():
                stale.fill_(float("nan"))
        assert set(outputs) == set(self.output_names)
        self._last = outputs
        return outputs

    def decode(self, feeds: Mapping[str, npt.NDArray[Any]], past: CachedRows) -> Arrays:
        """One pass as the decode loop asks for it."""
        return decode_by_run(self, feeds, past)


def tiny(
    seed: int = 0,
    *,
    vocab: int = 24,
    kind: str = "twin",
    noise: float = 0.0,
    max_context: int = 96,
    top_k: int | None = None,
    sharpness: float = 1.0,
) -> Tiny:
    """A target and a drafter with seeded weights."""
    config = TargetConfig(
        family="llama",
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        rms_norm_eps=1e-5,
        rope={"theta": 100.0},  # type: ignore[arg-type]  # pydantic reads it
        tie_embeddings=False,
        max_positions=max_context,
    )
    generator = torch.Generator().manual_seed(seed)
    decoder = TargetDecoder(config, TAPS).requires_grad_(False)
    _scatter(decoder, generator)
    decoder.lm_head.weight *= sharpness
    wanted = min(16, vocab) if top_k is None else top_k
    if kind == "twin":
        width = config.num_layers * config.kv_size
        drafter_config = drafter_config_for(
            config, taps=TAPS, head="target", top_k=wanted, num_kv_heads=1, head_dim=width, rope={}
        )
        extend, step = _twin(decoder, drafter_config, generator, noise)
    else:
        drafter_config = drafter_config_for(config, taps=TAPS, head="target", top_k=wanted)
        extend, step = _eagle(decoder, drafter_config, generator)
    engine = _target_engine(decoder)
    engines = {"target": engine, "extend": extend, "step": step}
    return Tiny(
        EngineTarget(engine, config, max_context),
        EngineDrafter(extend, step, drafter_config, max_context),
        decoder,
        engines,
        drafter_config,
    )


def full_pass(decoder: TargetDecoder, tokens: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits [T, V], taps [T, 3H] and keys per layer [T, KV] of one causal pass without a cache."""
    count = len(tokens)
    past = decoder.empty_past(1)
    mask = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        out = decoder(torch.tensor([tokens]), torch.arange(count)[None], mask, past, past)
        return decoder.logits(out.states)[0], out.taps[0], [key[0] for key in out.new_keys]


def _scatter(module: torch.nn.Module, generator: torch.Generator) -> None:
    for name, weight in module.named_parameters():
        if "norm" not in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.5)


def _target_engine(decoder: TargetDecoder) -> TinyEngine:
    layers = range(decoder.config.num_layers)

    def compute(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = decoder(
            feeds["input_ids"],
            feeds["position_ids"],
            feeds["attention_mask"],
            [feeds[f"past_key_{i}"] for i in layers],
            [feeds[f"past_value_{i}"] for i in layers],
        )
        logits = decoder.logits(rows_of(out.states, feeds["rows"]))
        keys = {f"new_key_{i}": rows for i, rows in enumerate(out.new_keys)}
        values = {f"new_value_{i}": rows for i, rows in enumerate(out.new_values)}
        return {"logits": logits, "taps": out.taps, **keys, **values}

    return TinyEngine(target_contract(decoder.config, len(TAPS)), compute)


def _top_k(scores: Tensor, k: int) -> dict[str, Tensor]:
    """The head's outputs for scores [B, R, V], by a full sort; ties to the lower id."""
    total = scores.logsumexp(-1)
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    return {
        "topk_logprobs": values[..., :k] - total[..., None],
        "topk_ids": ids[..., :k].contiguous(),
        "log_sum_exp": total,
    }


def _drafter_engines(
    config: DrafterConfig,
    run: Callable[[Mapping[str, Tensor], Tensor, Tensor], dict[str, Tensor]],
    fuse: Callable[[Tensor], Tensor],
) -> tuple[TinyEngine, TinyEngine]:
    """`run(feeds, hidden, rows)` computes a pass whose features [B, T, H] are `hidden`."""

    def extend(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return run(feeds, fuse(feeds["taps"]), feeds["rows"])

    def step(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batch, steps = feeds["input_ids"].shape
        return run(feeds, feeds["parent_state"], torch.arange(steps).expand(batch, -1))

    return (
        TinyEngine(drafter_contract(config, "extend"), extend),
        TinyEngine(drafter_contract(config, "step"), step),
    )


def _eagle(
    decoder: TargetDecoder, config: DrafterConfig, generator: torch.Generator
) -> tuple[TinyEngine, TinyEngine]:
    model = Drafter(config, decoder.embed_tokens.weight, decoder.lm_head.weight)
    model.requires_grad_(False)
    _scatter(model, generator)

    def run(feeds: Mapping[str, Tensor], hidden: Tensor, rows: Tensor) -> dict[str, Tensor]:
        out = model.step(
            feeds["input_ids"],
            hidden,
            feeds["position_ids"],
            feeds["attention_mask"],
            feeds["past_key_0"],
            feeds["past_value_0"],
        )
        state = rows_of(out.state, rows)
        scores = decoder.logits(model.head_input(state))
        return {
            **_top_k(scores, config.top_k),
            "state": state,
            "new_key_0": out.new_key,
            "new_value_0": out.new_value,
        }

    return _drafter_engines(config, run, model.fc)


def _twin(
    decoder: TargetDecoder, config: DrafterConfig, generator: torch.Generator, noise: float
) -> tuple[TinyEngine, TinyEngine]:
    """All of the target's layers as one drafter; their keys lie side by side in one cached row."""
    size, width = decoder.config.hidden_size, decoder.config.kv_size
    fuse = torch.randn(len(TAPS) * size, size, generator=generator)
    disturb = torch.randn(size, decoder.config.vocab_size, generator=generator) * noise

    def run(feeds: Mapping[str, Tensor], hidden: Tensor, rows: Tensor) -> dict[str, Tensor]:
        x = decoder.embed_tokens(feeds["input_ids"]) + FEATURE * hidden
        cos, sin = rope_tables(decoder.inverse, feeds["position_ids"])
        keys, values = [], []
        for i, layer in enumerate(decoder.layers):
            part = slice(i * width, (i + 1) * width)
            past_key = feeds["past_key_0"][..., part]
            past_value = feeds["past_value_0"][..., part]
            x, key, value = layer(x, cos, sin, feeds["attention_mask"], past_key, past_value)
            keys.append(key)
            values.append(value)
        state = rows_of(x, rows)
        scores = decoder.logits(decoder.norm(state)) + torch.tanh(state) @ disturb
        return {
            **_top_k(scores, config.top_k),
            "state": state,
            "new_key_0": torch.cat(keys, -1),
            "new_value_0": torch.cat(values, -1),
        }

    return _drafter_engines(config, run, lambda taps: taps @ fuse)
