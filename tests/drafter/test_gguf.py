"""GGUF conversion: the numbers, names, settings and tokens of the model the file was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from drafter.errors import UsageError
from drafter.sources import resolve_target, silent
from drafter.sources.gguf import GgufFile, convert_gguf, halves_from_interleaved, hf_config
from tests.tiny_llama import CHAT_TEMPLATE, random_weights, tiny_config, tiny_tokenizer

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Change = Callable[[GGUFWriter], None]


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, suffix = name.rpartition(".")
    if stem in outer:
        return f"{outer[stem]}.{suffix}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[inner]}.{suffix}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head as GGUF files of architecture llama hold them, one by one."""
    size = weight.shape[0] // heads
    rows = [
        weight[head * size + half * (size // 2) + i]
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return np.stack(rows)


def write_gguf(
    path: Path,
    weights: dict[str, np.ndarray],
    config: dict[str, Any],
    *,
    architecture: str = "llama",
    splitting: str | None = "smollm",
    tokenizer: Tokenizer | None = None,
    change: Change | None = None,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """A GGUF file as converters for this architecture write it."""
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    add_tokenizer(writer, tokenizer or tiny_tokenizer(), splitting)
    if change is not None:
        change(writer)
    for name, tensor in weights.items():
        data = tensor
        if architecture == "llama" and ".q_proj." in name:
            data = interleaved(data, config["num_attention_heads"])
        if architecture == "llama" and ".k_proj." in name:
            data = interleaved(data, config["num_key_value_heads"])
        if data.ndim == 2 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, splitting: str | None) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    if splitting is not None:
        writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def convert(path: Path, folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir()
    convert_gguf(GgufFile(path), folder)
    return load_file(folder / "model.safetensors")


def test_a_llama_file_gives_back_the_weights_it_was_made_from(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=2)
    weights = random_weights(config)
    found = convert(write_gguf(tmp_path / "tiny.gguf", weights, config), tmp_path / "out")
    assert set(found) == set(weights)
    for name, tensor in weights.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_the_config_is_that_of_the_model(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=2, head_dim=16)
    path = write_gguf(tmp_path / "tiny.gguf", random_weights(config), config)
    found = hf_config(GgufFile(path))
    del config["mlp_bias"]
    assert found.pop("rms_norm_eps") == float(np.float32(config.pop("rms_norm_eps")))
    assert found == config


def test_qwen_rows_stay_in_order_and_biases_and_head_are_kept(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=2, tie_word_embeddings=False)
    weights = random_weights(config)
    for layer in range(2):
        for part, size in (("q", 32), ("k", 16), ("v", 16)):
            name = f"model.layers.{layer}.self_attn.{part}_proj.bias"
            weights[name] = np.arange(size, dtype=np.float32)
    path = write_gguf(tmp_path / "q.gguf", weights, config, architecture="qwen2", splitting="qwen2")
    found = convert(path, tmp_path / "out")
    assert set(found) == set(weights)
    for name, tensor in weights.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "qwen2"
    assert written["attention_bias"] is True
    assert written["tie_word_embeddings"] is False


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16", "F16"])
def test_quantised_tensors_become_exactly_what_they_encode(tmp_path: Path, kind: str) -> None:
    quantised = GGMLQuantizationType[kind]
    config = tiny_config(num_hidden_layers=1)
    weights = random_weights(config)
    path = write_gguf(
        tmp_path / "q.gguf",
        weights,
        config,
        architecture="qwen3",
        splitting="qwen2",
        kind=quantised,
    )
    found = convert(path, tmp_path / "out")
    for name, tensor in weights.items():
        expected = tensor
        if tensor.ndim == 2:
            expected = dequantize(quantize(tensor, quantised), quantised).reshape(tensor.shape)
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_large_tensors_are_expanded_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(num_hidden_layers=1)
    path = write_gguf(tmp_path / "tiny.gguf", random_weights(config), config)
    whole = convert(path, tmp_path / "whole")
    monkeypatch.setattr("drafter.sources.gguf._BLOCK_VALUES", 7 * 32)
    blocks = convert(path, tmp_path / "blocks")
    for name, tensor in whole.items():
        np.testing.assert_array_equal(blocks[name], tensor)


def test_halves_from_interleaved_undoes_the_order_of_gguf() -> None:
    weight = np.arange(3 * 8 * 2, dtype=np.float32).reshape(24, 2)
    np.testing.assert_array_equal(halves_from_interleaved(interleaved(weight, 3), 3), weight)


def llama3_divisors(half: int, theta: float, factor: float) -> np.ndarray:
    """The published Llama 3 rule, frequency by frequency."""
    divisors = []
    for i in range(half):
        wavelength = 2 * np.pi * theta ** (i / half)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def test_the_llama3_rope_rule_is_recognised_by_its_divisors(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=1, head_dim=64)
    config["rope_parameters"]["rope_theta"] = 500000.0
    weights = random_weights(config)

    def with_divisors(divisors: np.ndarray) -> Change:
        return lambda writer: writer.add_tensor("rope_freqs.weight", divisors)

    good = with_divisors(llama3_divisors(32, 500000.0, 32.0))
    path = write_gguf(tmp_path / "good.gguf", weights, config, change=good)
    assert hf_config(GgufFile(path))["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert set(convert(path, tmp_path / "out")) == set(weights)
    bad = with_divisors(np.linspace(1, 32, 32, dtype=np.float32))
    path = write_gguf(tmp_path / "bad.gguf", weights, config, change=bad)
    with pytest.raises(UsageError, match="does not follow the llama3 rule"):
        hf_config(GgufFile(path))


def test_the_tokenizer_is_that_of_the_model(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=1)
    path = write_gguf(tmp_path / "t.gguf", random_weights(config), config, splitting="gpt-2")
    convert(path, tmp_path / "out")
    found = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    original = tiny_tokenizer()
    for text in ("the target drafts", "naïve 🙂 42", "<|im_start|>user\nhi<|im_end|>", " \n\n x"):
        assert found.encode(text).ids == original.encode(text).ids
        assert found.decode(found.encode(text).ids, skip_special_tokens=False) == text
    assert {i for i, t in found.get_added_tokens_decoder().items() if t.special} == {0, 1, 2}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]  # the file's own first, then <|endoftext|>


DIGITS = {"gpt-2": ["1234567", "Ġ89"], "smollm": [*"1234567", "Ġ", "8", "9"]}
DIGITS |= {"qwen2": [*"1234567", "Ġ", "8", "9"], "llama-bpe": ["123", "456", "7", "Ġ", "89"]}


@pytest.mark.parametrize("rule", DIGITS)
def test_digits_are_split_as_the_file_says(tmp_path: Path, rule: str) -> None:
    config = tiny_config(num_hidden_layers=1)
    path = write_gguf(tmp_path / "t.gguf", random_weights(config), config, splitting=rule)
    convert(path, tmp_path / "out")
    found = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    words = [word for word, _ in found.pre_tokenizer.pre_tokenize_str("1234567 89")]
    assert words == DIGITS[rule]


def test_a_begin_token_is_added_where_the_file_asks_for_it(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=1)
    weights = random_weights(config)
    change: Change = lambda writer: writer.add_add_bos_token(True)  # noqa: E731
    convert(write_gguf(tmp_path / "t.gguf", weights, config, change=change), tmp_path / "out")
    found = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert found.encode("the").ids[0] == 1
    assert found.encode("the", add_special_tokens=False).ids == found.encode("the").ids[1:]


BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "mamba"}, "architecture 'mamba', supported: llama, qwen2"),
    "splitting": ({"splitting": "klingon"}, "splitting rule 'klingon', supported: gpt-2"),
    "rope": (
        {"change": lambda w: w.add_string("llama.rope.scaling.type", "yarn")},
        "RoPE scaling 'yarn', supported: none and llama3",
    ),
    "tensor": (
        {"change": lambda w: w.add_tensor("blk.0.mystery.weight", np.ones(32, np.float32))},
        "tensor 'blk.0.mystery.weight' is not known",
    ),
    "heads": (
        {"change": lambda w: w.add_array("llama.attention.head_count", [4, 4])},
        "cannot be converted .TypeError",
    ),
    "begin token": (
        {"change": lambda w: (w.add_add_bos_token(True), w.add_bos_token_id(10**6))},
        "cannot be converted .IndexError",
    ),
    "merges": (
        {"change": lambda w: w.add_token_merges(["no such"])},
        "cannot be converted .* the file is damaged or unusual",
    ),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_what_cannot_be_converted_is_named(tmp_path: Path, what: str) -> None:
    changes, message = BAD_FILES[what]
    config = tiny_config(num_hidden_layers=1)
    path = write_gguf(tmp_path / "bad.gguf", random_weights(config), config, **changes)
    with pytest.raises(UsageError, match=message):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize("kept", [0, 3, 200, 20_000, -100])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    config = tiny_config(num_hidden_layers=1)
    path = write_gguf(tmp_path / "cut.gguf", random_weights(config), config)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UsageError, match=r"cut.gguf is not a readable GGUF file"):
        GgufFile(path)


def test_a_gguf_path_is_converted_once_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMSPEC_CACHE", str(tmp_path / "cache"))
    config = tiny_config(num_hidden_layers=1)
    path = write_gguf(tmp_path / "tiny.gguf", random_weights(config), config)
    labels: list[str] = []

    def report(label: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        labels.append(label)

    first = resolve_target(str(path), progress=report)
    assert set(labels) == {"converting tiny.gguf"}
    labels.clear()
    assert resolve_target(str(path), progress=report) == first
    assert labels == []
    assert first.path.parent == tmp_path / "cache" / "targets"
    # the same contents, elsewhere, are the same target
    first.path.rename(tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").unlink()
    copy = resolve_target(str(tmp_path / "copy"), progress=silent)
    assert copy.fingerprint == first.fingerprint


def test_a_damaged_conversion_is_refused_and_mended_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMSPEC_CACHE", str(tmp_path / "cache"))
    config = tiny_config(num_hidden_layers=1)
    path = write_gguf(tmp_path / "tiny.gguf", random_weights(config), config)
    good = resolve_target(str(path), progress=silent)
    weights = good.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UsageError, match=r"model.safetensors has .* bytes") as caught:
        resolve_target(str(path), progress=silent)
    assert f"pipeline fetch --target {path}" in str(caught.value)
    assert resolve_target(str(path), progress=silent, mend=True) == good
    (good.path / "manifest.json").unlink()
    assert resolve_target(str(path), progress=silent, mend=True) == good
    assert resolve_target(str(path), progress=silent) == good
