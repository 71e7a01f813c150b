"""Text to token ids and back, chat template included, without any model library.

A target's `tokenizer.json` and chat template are all it takes. Templates come with downloaded
models, so they run sandboxed: no attribute tricks, no changes to their inputs, bounded in size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from drafter.errors import UsageError
from drafter.sources.folder import read_json_object

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TEMPLATE_BYTES = 256 * 1024
_MARK = "\u241fanswer\u241f"


def vocabulary(path: Path) -> dict[str, int]:
    """Token -> id of a `tokenizer.json`, added tokens included. Raises UsageError."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(
            f"{path} is not a readable tokenizer ({error}); fetch the target again with "
            "`pipeline fetch`."
        ) from None
    found: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return found


def vocabulary_sha256(path: Path) -> str:
    """Hex SHA-256 over the ids and tokens of a `tokenizer.json`.

    Unlike the file's own hash it does not change with the version of the library that wrote it.
    """
    pairs = sorted((number, token) for token, number in vocabulary(path).items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


class ChatTokenizer:
    """A tokenizer with its chat template; make one with `ChatTokenizer.load(folder)`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None,
        eos_ids: Sequence[int],
        special_tokens: Mapping[str, str],
    ) -> None:
        self._tokenizer = tokenizer
        self._template = None if template is None else _compile(template)
        self._template_text = template or ""
        self._special_tokens = dict(special_tokens)  # "bos_token" -> text, for the template
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.added_ids: frozenset[int] = frozenset(added)  # special ones and others
        self._bytes_of = _bytes_rule(tokenizer)
        self._known: dict[int, bytes] = {}  # of ids that were asked for: texts repeat them
        self.eos_ids: frozenset[int] = frozenset(eos_ids)
        self.special_ids: frozenset[int] = frozenset(i for i, t in added.items() if t.special)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: Path | str) -> ChatTokenizer:
        """The tokenizer, template and end-of-text ids of a target folder. Raises UsageError."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UsageError(f"{folder} has no tokenizer.json; give the folder of a target")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UsageError(f"{path} is not a readable tokenizer ({error})") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        settings = _optional_json(folder / "tokenizer_config.json")
        named = _special_texts(settings)
        eos = _eos_ids(folder, tokenizer, named)
        return cls(tokenizer, _template_text(folder, settings), eos, named)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised.

        `add_special` adds what the tokenizer puts around a text by itself (often nothing, or a
        begin token). Raises UsageError for text that is not valid Unicode.
        """
        _check_unicode(text, "text")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no valid UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def id_bytes(self, token_id: int) -> bytes:
        """The raw bytes a token adds to a text; empty for an id the tokenizer does not have."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else self._bytes_of(token)

    @property
    def has_template(self) -> bool:
        """Whether the target says how dialogues are written; base models do not."""
        return self._template is not None

    def knows(self, option: str) -> bool:
        """Whether the chat template reads a variable of that name, such as `enable_thinking`."""
        if self._template is None:
            return False
        tree = self._template.environment.parse(self._template_text)
        return option in meta.find_undeclared_variables(tree)

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The chat template filled with `messages`, up to where the assistant's answer begins.

        A message is `{"role": ..., "content": text}`; `options` are variables of the template.
        Raises UsageError for a bad message, for a target without a template, and for what the
        template itself refuses.
        """
        if self._template is None:
            raise UsageError("the target has no chat template; give a plain prompt instead")
        checked = _check_messages(messages)
        try:
            return self._template.render(
                messages=checked,
                add_generation_prompt=True,
                tools=None,
                **self._special_tokens,
                **options,
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise UsageError(f"the chat template refuses these messages: {error}") from None

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> list[int]:
        """Token ids of `render(messages)`; the template itself writes any begin token."""
        return self.encode(self.render(messages, **options), add_special=False)

    def end_of_turn(self) -> int:
        """The token that ends an answer: of the end-of-text ids the one that the chat template
        writes after an assistant's turn. Raises UsageError where it writes none of them.
        """
        turns = [("user", "a"), ("assistant", _MARK), ("user", "b")]
        text = self.render([{"role": role, "content": content} for role, content in turns])
        after = self.encode(text.rpartition(_MARK)[2], add_special=False)
        for token in after:
            if token in self.eos_ids:
                return token
        raise UsageError(
            "the chat template writes no end-of-text token after an assistant's turn (known: "
            f"{', '.join(map(str, sorted(self.eos_ids))) or 'none'}), so it is unknown how an "
            "answer ends"
        )


def _compile(text: str) -> Template:
    if (size := len(text.encode())) > MAX_TEMPLATE_BYTES:
        raise UsageError(
            f"the chat template has {size} bytes, at most {MAX_TEMPLATE_BYTES} are read"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(text)
    except TemplateError as error:
        raise UsageError(f"the chat template is not valid: {error}") from None


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not messages:
        raise UsageError("messages is empty, at least one message is needed")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UsageError(f"messages[{i}] is {message!r:.60}, an object is needed")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UsageError(f"messages[{i}].role is {role!r:.60}, needed: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UsageError(f"messages[{i}].content is {content!r:.60}, a text is needed")
        _check_unicode(content, f"messages[{i}].content")
    return [dict(message) for message in messages]


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start : error.start + 1]
        raise UsageError(
            f"{what} is not valid Unicode: it has {found!r} at character {error.start}"
        ) from None


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _special_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    texts = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(name)
        if isinstance(value, dict):  # older files hold the whole added token
            value = value.get("content")
        if isinstance(value, str):
            texts[name] = value
    return texts


def _template_text(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise UsageError(f"{path} has more than {MAX_TEMPLATE_BYTES} bytes")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text ({error}); get the file again") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        by_name = {entry.get("name"): entry.get("template") for entry in template}
        template = by_name.get("default")
    return template if isinstance(template, str) else None


def _eos_ids(folder: Path, tokenizer: Tokenizer, named: Mapping[str, str]) -> list[int]:
    for file in ("generation_config.json", "config.json"):
        eos = _optional_json(folder / file).get("eos_token_id")
        if eos is not None:
            return [int(i) for i in eos] if isinstance(eos, list) else [int(eos)]
    eos = tokenizer.token_to_id(named["eos_token"]) if "eos_token" in named else None
    return [] if eos is None else [eos]


def _bytes_rule(tokenizer: Tokenizer) -> Callable[[str], bytes]:
    """How this tokenizer writes bytes in its tokens: a function from token text to bytes."""
    decoder = "none" if tokenizer.decoder is None else tokenizer.decoder.__getstate__().decode()
    if '"ByteLevel"' in decoder:
        return _byte_level_bytes
    if '"ByteFallback"' in decoder:
        return _sentencepiece_bytes
    raise UsageError(
        f"the tokenizer's decoder is {decoder:.80}, needed: byte-level BPE or byte fallback"
    )


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # not written in byte characters: the decoder, too, takes such a token as text
        return token.encode()


def _byte_level_table() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character; this is the way back."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


_BYTE_OF = _byte_level_table()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
