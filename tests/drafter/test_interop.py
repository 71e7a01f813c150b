"""EAGLE-3 checkpoints for other engines: names, shapes, tap ids, and the same scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from drafter.config import RopeConfig
from drafter.decoder import RMSNorm, causal_mask
from drafter.errors import UsageError
from drafter.interop import LAYOUTS, dense_head, write_eagle3
from tests.tiny_drafter import VOCAB, tiny_drafter, tiny_target

TARGET = tiny_target()
ABOUT = {"name": "org/tiny", "architectures": ["LlamaForCausalLM"]}
HEADS: list[dict[str, Any]] = [
    {"head": "low_rank", "rescore": 0},
    {"head": "low_rank", "rescore": 16},
    {"head": "dense"},
    {"head": "target"},
]


def written(folder: Path, layout: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    drafter = tiny_drafter(TARGET, **changes)
    write_eagle3(drafter, folder, layout, "fp32", ABOUT)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("changes", HEADS, ids=str)
@torch.no_grad()
def test_the_dense_matrix_scores_as_the_head_does(changes: dict[str, Any]) -> None:
    drafter = tiny_drafter(TARGET, **changes)
    h = torch.randn(7, drafter.config.hidden_size)
    wanted = drafter.lm_head.scores(h)  # type: ignore[operator]
    torch.testing.assert_close(h @ dense_head(drafter).T, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def eagle3_logits(tensors: dict[str, Any], layer: str, tokens: torch.Tensor, taps: torch.Tensor):  # type: ignore[no-untyped-def]
    """The EAGLE-3 forward from the paper's formulas and the published names alone, no cache."""
    heads, kv_heads, size, eps = 4, 2, 8, 1e-5

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        module = RMSNorm(x.shape[-1], eps)
        module.weight.copy_(tensors[name])
        return module(x)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ tensors[f"{layer}{name}.weight"].T

    n = tokens.shape[0]
    g = taps @ tensors["fc.weight"].T
    e = TARGET.embed_tokens.weight[tokens]
    u = torch.cat(
        (norm(e, f"{layer}input_layernorm.weight"), norm(g, f"{layer}hidden_norm.weight")), -1
    )
    q, k, v = (linear(u, f"self_attn.{name}_proj").view(n, -1, size) for name in "qkv")
    angles = torch.arange(n)[:, None] * 1000.0 ** (-torch.arange(0, size, 2) / size)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((angles.sin(),) * 2, -1)

    def turn(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]

    q, k = turn(q), turn(k).repeat_interleave(heads // kv_heads, 1)
    v = v.repeat_interleave(heads // kv_heads, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / size**0.5
    scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
    y = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(n, -1)
    a = g + linear(y, "self_attn.o_proj")
    m = norm(a, f"{layer}post_attention_layernorm.weight")
    gate = torch.nn.functional.silu(linear(m, "mlp.gate_proj"))
    f = a + linear(gate * linear(m, "mlp.up_proj"), "mlp.down_proj")
    return norm(f, "norm.weight") @ tensors["lm_head.weight"].T


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_whoever_follows_the_formulas_gets_our_scores(layout: str, tmp_path: Path) -> None:
    _, tensors = written(tmp_path, layout, rescore=0)
    drafter = tiny_drafter(TARGET, rescore=0)
    tokens, taps = torch.randint(0, VOCAB, (9,)), torch.randn(9, 3 * 32)
    none = torch.zeros(1, 0, drafter.config.kv_size)
    where, mask = torch.arange(9)[None], causal_mask(1, 9)
    state = drafter.extend(tokens[None], taps[None], where, mask, none, none).state
    wanted = drafter.lm_head.scores(drafter.head_input(state))[0]  # type: ignore[operator]
    got = eagle3_logits(tensors, LAYOUTS[layout].layer, tokens, taps)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_names_and_shapes_are_the_published_ones(tmp_path: Path) -> None:
    config, tensors = written(tmp_path, "vllm")
    layer = {f"self_attn.{n}_proj" for n in "qkvo"} | {
        f"mlp.{n}_proj" for n in ("gate", "up", "down")
    }
    layer |= {"hidden_norm", "input_layernorm", "post_attention_layernorm"}
    outer = {"fc.weight", "norm.weight", "lm_head.weight"}
    assert set(tensors) == outer | {f"midlayer.{name}.weight" for name in layer}
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    assert tensors["lm_head.weight"].shape == (VOCAB, 32)
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == config["vocab_size"] == VOCAB


def test_each_reader_gets_tap_ids_in_its_own_convention(tmp_path: Path) -> None:
    """Ours, "input of layer i", are 2, 4, 5 here."""
    taps = tiny_drafter(TARGET).config.taps
    assert taps == (2, 4, 5)
    found = {}
    for layout in LAYOUTS:
        (tmp_path / layout).mkdir()
        config, _ = written(tmp_path / layout, layout)
        key = "eagle_aux_hidden_state_layer_ids"
        found[layout] = config[key] if key in config else config["eagle_config"][key]
    assert found == {"vllm": [2, 4, 5], "speculators": [2, 4, 5], "sglang": [1, 3, 4]}


@pytest.mark.parametrize("layout", ["sglang", "speculators"])
def test_maps_between_draft_and_target_ids_are_the_identity(tmp_path: Path, layout: str) -> None:
    _, tensors = written(tmp_path, layout)
    assert not tensors["d2t"].any()
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].all()
    assert tensors["t2d"].dtype == torch.bool


def test_speculators_names_the_layer_and_the_verifier_its_way(tmp_path: Path) -> None:
    config, tensors = written(tmp_path, "speculators")
    assert "layers.0.self_attn.q_proj.weight" in tensors
    assert not any(name.startswith("midlayer") for name in tensors)
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/tiny"
    assert config["transformer_layer_config"]["num_hidden_layers"] == 1


def test_llama3_scaling_is_written_out(tmp_path: Path) -> None:
    config, _ = written(tmp_path, "vllm", rope=RopeConfig(theta=5e5, kind="llama3", factor=8.0))
    assert config["rope_parameters"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == 8.0
    assert config["rope_theta"] == 5e5


def test_what_a_format_cannot_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="reads the input of layer 0"):
        written(tmp_path, "sglang", taps=(0, 4, 5))
    with pytest.raises(UsageError, match="format 'gguf' is unknown; known: vllm, sglang"):
        written(tmp_path, "gguf")
    with pytest.raises(UsageError, match="precision 'int3' is unknown"):
        write_eagle3(tiny_drafter(TARGET), tmp_path, "vllm", "int3", ABOUT)
    assert not list(tmp_path.iterdir())
