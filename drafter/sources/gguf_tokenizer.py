"""The tokenizer of a GGUF file as `tokenizer.json`, with its chat template and end-of-text ids.

Byte-level BPE only: the file's tokens, merges and token types, and the splitting rule that
`tokenizer.ggml.pre` names. Rules are those of the original tokenizers, digits included.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from drafter.errors import UsageError

if TYPE_CHECKING:
    from drafter.sources.gguf import GgufFile

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Control tokens that end a turn or a text, whatever the metadata says (as llama.cpp has it).
_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>")


@dataclass(frozen=True)
class Splitting:
    """How text is cut before BPE. `whole_words`: a word that is a token is taken without merges."""

    split: Callable[[], Any]
    normalizer: Callable[[], Any] | None = None
    whole_words: bool = False


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> Any:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _byte_level()])


def _by_pattern(digits: str) -> Any:
    pattern = Regex(f"{_CONTRACTIONS}|{digits}|{_REST}")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


SPLITTINGS: dict[str, Splitting] = {
    "gpt-2": Splitting(_byte_level),
    "smollm": Splitting(_single_digits),
    "qwen2": Splitting(lambda: _by_pattern(r"\p{N}"), normalizers.NFC),
    "llama-bpe": Splitting(lambda: _by_pattern(r"\p{N}{1,3}"), whole_words=True),
}
SPLITTINGS["default"] = SPLITTINGS["gpt-2"]


def write_tokenizer(gguf: GgufFile, folder: Path) -> list[int]:
    """Write the tokenizer files and the chat template; return the ids that end a text.

    A file without a chat template gives none. Raises UsageError for another kind of tokenizer.
    """
    tokens: list[str] = gguf.need("tokenizer.ggml.tokens")
    types: list[int] = list(gguf.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens)))
    tokenizer = _bpe(gguf, tokens)
    tokenizer.add_tokens(_added(tokens, types, TokenType.USER_DEFINED))
    tokenizer.add_special_tokens(_added(tokens, types, TokenType.CONTROL))
    if gguf.get("tokenizer.ggml.add_bos_token", False):
        bos = int(gguf.need("tokenizer.ggml.bos_token_id"))
        tokenizer.post_processor = TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    named = {
        f"{role}_token": tokens[token_id]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (token_id := gguf.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    if template := gguf.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return _end_ids(gguf, tokens, types)


def _bpe(gguf: GgufFile, tokens: list[str]) -> Tokenizer:
    model = gguf.need("tokenizer.ggml.model")
    if model != "gpt2":
        raise UsageError(
            f"{gguf.path} has a tokenizer of kind '{model}', only 'gpt2' (byte-level BPE) can be "
            "converted; use the model's Hugging Face folder"
        )
    rule = gguf.get("tokenizer.ggml.pre", "default")
    if rule not in SPLITTINGS:
        raise UsageError(
            f"{gguf.path} has the text splitting rule '{rule}', "
            f"supported: {', '.join(SPLITTINGS)}; use the model's Hugging Face folder"
        )
    splitting = SPLITTINGS[rule]
    merges = [tuple(merge.split(" ", 1)) for merge in gguf.need("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=splitting.whole_words))
    if splitting.normalizer is not None:
        tokenizer.normalizer = splitting.normalizer()
    tokenizer.pre_tokenizer = splitting.split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _added(tokens: list[str], types: list[int], wanted: TokenType) -> list[AddedToken]:
    special = wanted == TokenType.CONTROL
    return [
        AddedToken(token, normalized=False, special=special)
        for token, kind in zip(tokens, types, strict=True)
        if kind == wanted
    ]


def _end_ids(gguf: GgufFile, tokens: list[str], types: list[int]) -> list[int]:
    named = [gguf.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = [int(token_id) for token_id in named if token_id is not None]
    for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == TokenType.CONTROL and token in _END_TOKENS:
            ends.append(token_id)
    return list(dict.fromkeys(ends))  # the file's own end token first
