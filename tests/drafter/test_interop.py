"""EAGLE-3 checkpoints for other engines: names, shapes, tap ids, and the same scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from drafter.config import VARIANTS, RopeConfig
from drafter.errors import UsageError
from drafter.interop import LAYOUTS, dense_head, write_eagle3
from drafter.unroll import unroll
from tests.eagle3_reference import Reference
from tests.tiny_drafter import FORMS, VOCAB, form, tiny_drafter, tiny_target

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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_whoever_follows_the_formulas_gets_our_scores(
    name: str, layout: str, tmp_path: Path
) -> None:
    """Three draft steps, so that what is fed back counts; the variants are those of the config."""
    if set(FORMS[name]) & set(LAYOUTS[layout].lacks):
        with pytest.raises(UsageError, match=f"variant norm_.*, which {layout} does not compute"):
            written(tmp_path, layout, rescore=0, **form(name))
        assert not list(tmp_path.iterdir())
        return
    config, tensors = written(tmp_path, layout, rescore=0, **form(name))
    said = tuple(variant for variant in VARIANTS if config[variant])
    reference = Reference(tensors, TARGET.embed_tokens.weight, LAYOUTS[layout].layer, said)
    ids, taps = torch.randint(0, VOCAB, (12,)), torch.randn(9, 3 * 32)
    drafter = tiny_drafter(TARGET, rescore=0, **form(name))
    more = torch.cat((taps, torch.zeros(3, 3 * 32)))
    for state, got in zip(
        unroll(drafter, ids[None], more[None], 3), reference.scores(ids[1:], taps, 3), strict=True
    ):
        wanted = drafter.lm_head.scores(drafter.head_input(state[0, :9]))  # type: ignore[operator]
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


def test_variants_bring_the_published_names(tmp_path: Path) -> None:
    config, tensors = written(tmp_path, "vllm", **form("all-fc_norm"))
    assert {f"fc_norm.{i}.weight" for i in range(3)} <= tensors.keys()
    assert tensors["fc_norm.0.weight"].shape == (32,)
    assert [config[name] for name in VARIANTS] == [True, False, True, True]
    config, tensors = written(tmp_path, "vllm", **form("norm_before_fc"))
    assert tensors["input_norm.weight"].shape == (96,)
    assert config["norm_before_fc"] is config["eagle_config"]["norm_before_fc"] is True


def test_maps_between_draft_and_target_ids_are_the_identity(tmp_path: Path) -> None:
    _, tensors = written(tmp_path, "sglang")
    assert not tensors["d2t"].any()
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].all()
    assert tensors["t2d"].dtype == torch.bool


def test_speculators_names_the_layer_and_the_verifier_its_way(tmp_path: Path) -> None:
    """It has the embedding too, and maps only where a vocabulary is left out."""
    config, tensors = written(tmp_path, "speculators")
    assert torch.equal(tensors["embed_tokens.weight"], TARGET.embed_tokens.weight)
    assert not {"d2t", "t2d"} & tensors.keys()
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
    narrow = {"head": "dense", "hidden_size": 16, "num_heads": 2, "num_kv_heads": 2}
    with pytest.raises(UsageError, match="hidden size 16 is not its target's"):
        written(tmp_path, "vllm", **narrow)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fc.weight", "lm_head.weight"])
@torch.no_grad()
def test_weights_that_half_precision_cannot_hold_are_refused(name: str, tmp_path: Path) -> None:
    drafter = tiny_drafter(TARGET, head="dense")
    drafter.state_dict()[name][0, 0] = 70_000.0
    words = rf"largest value of {name} is 70000, but float16 ends at 65504; choose --precision bf16"
    with pytest.raises(UsageError, match=words):
        write_eagle3(drafter, tmp_path, "vllm", "fp16", ABOUT)
    assert not list(tmp_path.iterdir())
    write_eagle3(drafter, tmp_path, "vllm", "bf16", ABOUT)
    assert load_file(tmp_path / "model.safetensors")[name].isfinite().all()
