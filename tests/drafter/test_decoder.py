"""The target decoder is the same function as `transformers`, family by family, cached or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from drafter.checkpoint import load_target
from drafter.config import RopeConfig, TargetConfig
from drafter.decoder import TargetDecoder, causal_mask, rope_frequencies
from drafter.errors import UsageError
from drafter.families import read_target_config, target_config_from_hf

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, untied, biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
}


def random_model(family: str, changes: dict[str, Any]) -> Any:
    """A random transformers model whose norms and biases are random too, so that none can be
    forgotten.
    """
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else 0.1)
    return model


def run(
    target: TargetDecoder, ids: torch.Tensor, past: int = 0, keys: Any = None, values: Any = None
) -> Any:
    batch, new = ids.shape
    positions = torch.arange(past, past + new).expand(batch, new)
    empty = target.empty_past(batch)
    return target(ids, positions, causal_mask(batch, new, past), keys or empty, values or empty)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_and_taps_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = random_model(*FAMILIES[name])
    theirs.save_pretrained(tmp_path)
    ours = load_target(tmp_path, taps=(0, 2, 3))
    ids = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(2))
    output, expected = run(ours, ids), theirs(ids, output_hidden_states=True)
    assert (ours.logits(output.states) - expected.logits).abs().max() <= 1e-4
    for place, tap in enumerate((0, 2, 3)):
        mine = output.taps[..., place * 48 : (place + 1) * 48]
        torch.testing.assert_close(mine, expected.hidden_states[tap], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cached_continuation_equals_one_pass(tmp_path: Path) -> None:
    random_model("Llama", {}).save_pretrained(tmp_path)
    target = load_target(tmp_path)
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(3))
    whole, head = run(target, ids), run(target, ids[:, :21])
    tail = run(target, ids[:, 21:], 21, head.new_keys, head.new_values)
    torch.testing.assert_close(tail.states, whole.states[:, 21:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tail.taps, whole.taps[:, 21:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_tree_node_sees_its_ancestors_only(tmp_path: Path) -> None:
    """Two siblings in one pass give what each gives alone at the same position."""
    random_model("Qwen3", {"head_dim": 12}).save_pretrained(tmp_path)
    target = load_target(tmp_path)
    prefix, siblings = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[11, 12]])
    head = run(target, prefix)
    mask = torch.ones(1, 1, 2, 6, dtype=torch.bool)
    mask[0, 0, 0, 5] = mask[0, 0, 1, 4] = False
    both = target(siblings, torch.full((1, 2), 4), mask, head.new_keys, head.new_values)
    for i in range(2):
        alone = run(target, siblings[:, i : i + 1], 4, head.new_keys, head.new_values)
        torch.testing.assert_close(both.states[:, i], alone.states[:, 0], atol=1e-5, rtol=1e-5)


def test_llama3_scaling_keeps_fast_waves_and_slows_slow_ones() -> None:
    plain = rope_frequencies(RopeConfig(theta=500_000.0), 128)
    rope = RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, original_max_positions=8192)
    scaled = rope_frequencies(rope, 128)
    assert scaled[0] == plain[0]
    assert scaled[-1] == plain[-1] / 8


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "'gelu'"),
        ({"model_type": "mistral", "sliding_window": 4096}, "4096"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}}, "'yarn'"),
    ],
)
def test_what_the_decoder_cannot_run_is_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        target_config_from_hf({**SIZES, **changes}, None)


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    *(({name: value}, f"'{name}' is {value!r}") for name in SIZES for value in (-1, 0, "48", 1.5)),
    ({"vocab_size": None}, "'vocab_size' is None"),
    ({"head_dim": -4}, "'head_dim' is -4"),
    ({"hidden_size": True}, "'hidden_size' is True"),
    ({"rope_scaling": "x"}, "'rope_scaling' is 'x', an object or null is needed"),
    ({"rope_parameters": [1]}, r"'rope_parameters' is \[1\]"),
    ({"rope_theta": None}, "'rope_theta' is None"),
    ({"rope_parameters": {"rope_theta": "1"}}, r"'rope_parameters\.rope_theta' is '1'"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, r"'rope_scaling\.factor' is 0"),
    ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan"),
    ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings' is 'yes', true or false"),
    ({"eos_token_id": "</s>"}, "'eos_token_id' is '</s>'"),
    ({"model_type": ["llama"]}, "llama"),
    ({"layer_types": 3, "vocab_size": 0}, "'vocab_size' is 0"),
]


@pytest.mark.parametrize(("changes", "named"), BAD_FIELDS)
def test_a_bad_field_of_the_config_is_refused_by_name(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config = {"model_type": "llama", **SIZES, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=named) as caught:
        read_target_config(tmp_path)
    assert "config.json" in str(caught.value) or "model_type" in changes


@pytest.mark.parametrize("name", [n for n in SIZES if "max" not in n and "key_value" not in n])
def test_a_field_that_is_missing_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config = {"model_type": "llama", **SIZES}
    del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=rf"config\.json: field '{name}' is missing"):
        read_target_config(tmp_path)


def test_what_a_config_leaves_out_is_implied() -> None:
    left_out = {"head_dim": None, "num_key_value_heads": None, "attention_bias": None}
    config = target_config_from_hf({"model_type": "llama", **SIZES, **left_out}, 7)
    assert (config.head_dim, config.num_kv_heads, config.eos_token_ids) == (8, 6, (7,))
    assert not config.qkv_bias
    assert config.rope == RopeConfig()


def test_sizes_are_above_zero() -> None:
    config = target_config_from_hf({"model_type": "llama", **SIZES}, None)
    for name in ("vocab_size", "num_layers", "head_dim", "max_positions", "rms_norm_eps"):
        with pytest.raises(ValueError, match=f"{name}\n.*greater than 0"):
            TargetConfig(**{**config.model_dump(), name: 0})


def test_a_tap_id_beyond_the_layers_is_refused(tmp_path: Path) -> None:
    random_model("Llama", {}).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="Tap id 4 is out of range: the target has 4 layers"):
        load_target(tmp_path, taps=(1, 4))


def test_missing_unexpected_and_truncated_weights_are_refused(tmp_path: Path) -> None:
    random_model("Llama", {}).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"num_hidden_layers": 4', '"num_hidden_layers": 3')
    )
    with pytest.raises(UsageError, match=r"unexpected: layers\.3"):
        load_target(tmp_path)
    (tmp_path / "config.json").write_text(
        config.replace('"num_hidden_layers": 4', '"num_hidden_layers": 5')
    )
    with pytest.raises(UsageError, match=r"Missing: layers\.4"):
        load_target(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UsageError, match="truncated or damaged"):
        load_target(tmp_path)


@pytest.mark.real
@torch.no_grad()
def test_the_real_model_writes_what_transformers_writes(real_target_dir: Path) -> None:
    """Greedy, 8 prompts, 128 tokens: token for token."""
    ours = load_target(real_target_dir)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(real_target_dir, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_target_dir)
    questions = (
        "Why is the sky blue?",
        "Write a haiku about rain.",
        "List three fruits.",
        "What is 17 + 25?",
    )
    questions += (
        "Explain recursion.",
        "Tell me about Paris.",
        "def fib(n):",
        "Name a famous painter.",
    )
    for question in questions:
        ids = torch.tensor(
            [
                tokenizer(
                    f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
                ).input_ids
            ]
        )
        expected = theirs.generate(ids, max_new_tokens=128, do_sample=False)[0, ids.shape[1] :]
        assert greedy(ours, ids, len(expected)) == expected.tolist()


@torch.no_grad()
def greedy(target: TargetDecoder, ids: torch.Tensor, count: int) -> list[int]:
    """Plain greedy decoding with a growing cache."""
    keys, values = target.empty_past(1), target.empty_past(1)
    written: list[int] = []
    while len(written) < count:
        output = run(target, ids, keys[0].shape[1], keys, values)
        keys = [torch.cat(pair, 1) for pair in zip(keys, output.new_keys, strict=True)]
        values = [torch.cat(pair, 1) for pair in zip(values, output.new_values, strict=True)]
        ids = target.logits(output.states[:, -1:]).argmax(-1)
        written.append(int(ids))
    return written
