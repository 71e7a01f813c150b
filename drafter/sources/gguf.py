"""GGUF files as Hugging Face style folders: fp32 weights, config and tokenizer.

Quantised tensors are expanded to exactly the numbers the file encodes, a block of rows at a time,
so memory stays far below the size of the model. Files of architecture `llama` hold the rows of the
query and key projections in the order of interleaved rotary pairs; they are put back into halves.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray

from drafter.errors import SlimSpecError, UsageError
from drafter.sources.folder import CONFIG, WEIGHTS
from drafter.sources.gguf_tokenizer import write_tokenizer
from drafter.sources.progress import Report, silent

# An argument of every converted artifact: raise it when the same file would convert differently.
CONVERTER_VERSION = 1
_BLOCK_VALUES = 4 << 20  # values expanded at a time


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture maps to Hugging Face: class, and whether q/k rows are interleaved."""

    model_type: str
    model_class: str
    interleaved_rotary: bool = False
    attention_bias: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved_rotary=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", attention_bias=True),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
}
OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
INNER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


class GgufFile:
    """An open GGUF file: metadata as Python values, tensors as memory maps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not a readable GGUF file ({error})") from None
        name = str(self.get("general.architecture", ""))
        if name not in ARCHITECTURES:
            raise UsageError(
                f"{path} has architecture '{name}', supported: {', '.join(ARCHITECTURES)}"
            )
        self.architecture_name = name
        self.architecture = ARCHITECTURES[name]
        self.tensors: dict[str, ReaderTensor] = {t.name: t for t in self._reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value of `key`; "{arch}." stands for the file's architecture."""
        if key.startswith("{arch}."):
            key = f"{self.architecture_name}.{key.removeprefix('{arch}.')}"
        field = self._reader.get_field(key)
        if field is None:
            return default
        if field.types[-1] == GGUFValueType.STRING and field.types[0] == GGUFValueType.ARRAY:
            return [bytes(field.parts[i]).decode("utf-8") for i in field.data]
        return field.contents()

    def need(self, key: str) -> Any:
        """As `get`, but a missing key is a UsageError."""
        value = self.get(key)
        if value is None:
            name = key.replace("{arch}", self.architecture_name)
            raise UsageError(f"{self.path} has no metadata field '{name}', which is needed")
        return value

    @property
    def fp32_bytes(self) -> int:
        """Size of all tensors as fp32."""
        return sum(4 * int(tensor.n_elements) for tensor in self.tensors.values())


def convert_gguf(gguf: GgufFile, folder: Path, report: Report = silent) -> None:
    """Write config, tokenizer, chat template and fp32 weights of a GGUF file into `folder`.

    Raises UsageError for an architecture, tensor or tokenizer that cannot be converted.
    """
    try:
        config = hf_config(gguf)
        eos = write_tokenizer(gguf, folder)
        _write_json(folder / CONFIG, config)
        generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": eos}
        _write_json(folder / "generation_config.json", generation)
        write_weights(gguf, folder / WEIGHTS, report)
    except (SlimSpecError, OSError):
        raise
    except Exception as error:  # fields and tables of a damaged file may be wrong in any way
        raise UsageError(
            f"{gguf.path} cannot be converted ({type(error).__name__}: {error}); the file is "
            "damaged or unusual: get it again, or use the model's Hugging Face folder"
        ) from error


def hf_config(gguf: GgufFile) -> dict[str, Any]:
    """The Hugging Face `config.json` that the metadata describes."""
    kind = gguf.architecture
    heads = int(gguf.need("{arch}.attention.head_count"))
    hidden = int(gguf.need("{arch}.embedding_length"))
    return {
        "architectures": [kind.model_class],
        "model_type": kind.model_type,
        "vocab_size": int(gguf.tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": int(gguf.need("{arch}.feed_forward_length")),
        "num_hidden_layers": int(gguf.need("{arch}.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(gguf.get("{arch}.attention.head_count_kv", heads)),
        "head_dim": int(gguf.get("{arch}.attention.key_length", hidden // heads)),
        "hidden_act": "silu",
        "attention_bias": kind.attention_bias or "blk.0.attn_q.bias" in gguf.tensors,
        "max_position_embeddings": int(gguf.need("{arch}.context_length")),
        # the float32 of the file, as the reference implementation computes with it
        "rms_norm_eps": float(gguf.need("{arch}.attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope_parameters(gguf),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": gguf.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": gguf.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def _rope_parameters(gguf: GgufFile) -> dict[str, Any]:
    scaling = gguf.get("{arch}.rope.scaling.type", "none")
    if scaling != "none":
        raise UsageError(f"{gguf.path} has RoPE scaling '{scaling}', supported: none and llama3")
    theta = float(gguf.get("{arch}.rope.freq_base", 10_000.0))
    if _ROPE_FACTORS not in gguf.tensors:
        return {"rope_type": "default", "rope_theta": theta}
    # GGUF keeps only the divisors of the frequencies: find the llama3 rule that gives them.
    factors = np.asarray(gguf.tensors[_ROPE_FACTORS].data, dtype=np.float32)
    rule = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not np.allclose(factors, _llama3_factors(rule, len(factors)), rtol=1e-4):
        raise UsageError(f"{gguf.path}: {_ROPE_FACTORS} does not follow the llama3 rule")
    return rule


def _llama3_factors(rule: dict[str, Any], half: int) -> NDArray[np.float64]:
    """Divisors of the rotary frequencies [half]: 1 for short waves, `factor` for long ones."""
    wavelength = 2 * np.pi * rule["rope_theta"] ** (np.arange(half) / half)
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    smooth = (rule["original_max_position_embeddings"] / wavelength - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / rule["factor"] + smooth))


def write_weights(gguf: GgufFile, path: Path, report: Report = silent) -> None:
    """Write all tensors as one fp32 safetensors file, streaming."""
    tensors = [
        (hf_name(gguf, name), tensor)
        for name, tensor in gguf.tensors.items()
        if name != _ROPE_FACTORS
    ]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + 4 * int(tensor.n_elements)
        shape = [int(n) for n in reversed(tensor.shape)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    done, label = 0, f"converting {gguf.path.name}"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors:
            for block in expanded_blocks(gguf, name, tensor):
                file.write(block.data)
                done += block.nbytes
                report(label, done, end)


def hf_name(gguf: GgufFile, name: str) -> str:
    """The Hugging Face name of a GGUF tensor. Raises UsageError for one that has none."""
    match = _NAME.fullmatch(name)
    layer, stem, suffix = match.groups() if match else (None, "", "")
    if layer is None and stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.{suffix}"
    if layer is not None and stem in INNER_NAMES:
        return f"model.layers.{layer}.{INNER_NAMES[stem]}.{suffix}"
    raise UsageError(
        f"{gguf.path}: tensor '{name}' is not known in architecture '{gguf.architecture_name}'"
    )


def expanded_blocks(
    gguf: GgufFile, name: str, tensor: ReaderTensor
) -> Iterator[NDArray[np.float32]]:
    """The values of a tensor in order, as contiguous little-endian fp32 blocks of rows."""
    if gguf.architecture.interleaved_rotary and (".q_proj." in name or ".k_proj." in name):
        key = "{arch}.attention.head_count" + ("_kv" if ".k_proj." in name else "")
        heads = int(gguf.get(key) or gguf.need("{arch}.attention.head_count"))
        yield halves_from_interleaved(_expand(tensor.data, tensor), heads)
        return
    rows = tensor.data.shape[0]
    step = max(1, _BLOCK_VALUES // max(1, int(tensor.n_elements) // rows))
    for start in range(0, rows, step):
        yield _expand(tensor.data[start : start + step], tensor)


def halves_from_interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows [heads * D, ...] of each head from (x0, y0, x1, y1, ...) to (x0, x1, ..., y0, ...)."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _expand(data: NDArray[Any], tensor: ReaderTensor) -> NDArray[np.float32]:
    try:
        values = dequantize(data, tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise UsageError(
            f"tensor '{tensor.name}' has type {kind}, which is not supported"
        ) from None
    return np.ascontiguousarray(values, dtype="<f4")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
