"""A target folder as one GGUF file, for engines that read nothing else: `gguf` turned around.

The file holds weights, sizes and vocabulary. It is made for token ids in and out: how text is split
is named where this project knows the rule, else `default`, and may then differ from the target's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quant_shape_to_byte_shape, quantize
from numpy.typing import NDArray
from tokenizers import Tokenizer

from drafter.checkpoint import read_tensors
from drafter.config import TargetConfig
from drafter.errors import UnsupportedTarget
from drafter.families import read_target_config
from drafter.sources.folder import CONFIG, TOKENIZER
from drafter.sources.gguf import ARCHITECTURES, INNER_NAMES, OUTER_NAMES
from drafter.sources.gguf_tokenizer import SPLITTINGS
from drafter.sources.progress import Report, silent

Precision = Literal["f32", "f16", "q8_0"]
_TYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama.cpp's numbers, shown by it only
_INNER = {hf: name for name, hf in INNER_NAMES.items()}
_OUTER = {hf: name for name, hf in OUTER_NAMES.items()}
Array = NDArray[Any]


def write_gguf(
    folder: Path, path: Path, precision: Precision = "f32", report: Report = silent
) -> None:
    """Write the target in `folder` as `path`, its matrices as `precision`, norms and biases as f32.

    Raises UnsupportedTarget for a family or a rotary rule that this cannot say in GGUF.
    """
    config = read_target_config(folder)
    writer = GGUFWriter(path, _architecture(config))
    _write_sizes(writer, config, precision)
    _write_vocabulary(writer, folder, config)
    kinds = {name: _kind(array, precision) for name, array in _tensors(folder, config)}
    total = 0
    for name, array in _tensors(folder, config):
        total += _announce(writer, name, array, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done = 0
    for name, array in _tensors(folder, config):
        data = quantize(array, kinds[name])
        writer.write_tensor_data(data)
        done += data.nbytes
        report(f"writing {path.name}", done, total)
    writer.close()


def _architecture(config: TargetConfig) -> str:
    family = "llama" if config.family == "mistral" else config.family
    if family not in ARCHITECTURES or config.rope.kind != "default":
        raise UnsupportedTarget(
            f"a {config.family} target with {config.rope.kind} rotary positions cannot be written "
            f"as GGUF; {', '.join(ARCHITECTURES)} with default ones can."
        )
    return family


def _write_sizes(writer: GGUFWriter, config: TargetConfig, precision: str) -> None:
    writer.add_file_type(_FILE_TYPES[precision])
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_vocabulary(writer: GGUFWriter, folder: Path, config: TargetConfig) -> None:
    """Every id has a token: ids without text are padding that is never shown."""
    tokenizer = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    tokens = [f"[unused {place}]" for place in range(config.vocab_size)]
    types = [TokenType.UNUSED] * config.vocab_size
    for token, place in tokenizer["model"]["vocab"].items():
        tokens[place], types[place] = token, TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(folder))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = tokenizer["model"].get("merges", [])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if (begin := settings.get("bos_token_id")) is not None:
        writer.add_bos_token_id(begin)
    if config.eos_token_ids:
        writer.add_eos_token_id(config.eos_token_ids[0])
    writer.add_add_bos_token(False)  # prompts come as ids, whole


def _splitting(folder: Path) -> str:
    found = Tokenizer.from_file(str(folder / TOKENIZER)).pre_tokenizer
    for name, rule in SPLITTINGS.items():
        if found is not None and found.__getstate__() == rule.split().__getstate__():
            return name
    return "default"


def _tensors(folder: Path, config: TargetConfig) -> Iterator[tuple[str, Array]]:
    """The tensors under their GGUF names, rows in the order of the architecture, fp32."""
    import torch

    interleaved = ARCHITECTURES[_architecture(config)].interleaved_rotary
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    for name, tensor in read_tensors(folder, torch.float32):
        stem, _, suffix = name.rpartition(".")
        if stem == "lm_head" and config.tie_embeddings:
            continue
        array = tensor.numpy()
        if stem in _OUTER:
            yield f"{_OUTER[stem]}.{suffix}", array
            continue
        _, _, layer, inner = stem.split(".", 3)
        kind = _INNER[inner]
        if interleaved and kind in heads:
            array = interleaved_from_halves(array, heads[kind])
        yield f"blk.{layer}.{kind}.{suffix}", array


def interleaved_from_halves(weight: Array, heads: int) -> Array:
    """Rows [heads * D, ...] of each head from (x0, x1, ..., y0, ...) to (x0, y0, x1, y1, ...)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def _kind(array: Array, precision: str) -> GGMLQuantizationType:
    """Q8_0 has blocks of 32: a matrix of another width stays f32, as does every vector."""
    wide = array.ndim == 2 and (precision != "q8_0" or array.shape[1] % 32 == 0)
    return _TYPES[precision] if wide else GGMLQuantizationType.F32


def _announce(writer: GGUFWriter, name: str, array: Array, kind: GGMLQuantizationType) -> int:
    """Put a tensor into the file's directory; returns its bytes."""
    if kind == GGMLQuantizationType.Q8_0:
        shape = quant_shape_to_byte_shape(array.shape, kind)
        size = int(np.prod(shape))
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), size, raw_dtype=kind)
        return size
    dtype = np.dtype(np.float16 if kind == GGMLQuantizationType.F16 else np.float32)
    size = array.size * dtype.itemsize
    writer.add_tensor_info(name, array.shape, dtype, size)
    return size
