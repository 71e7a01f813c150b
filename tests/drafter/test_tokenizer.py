"""The chat tokenizer: lossless both ways, byte by byte, and templates that cannot do harm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from drafter.errors import UsageError
from drafter.tokenizer import MAX_TEMPLATE_BYTES, ChatTokenizer, vocabulary_sha256

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> ChatTokenizer:
    """The tokenizer of the tiny target."""
    return ChatTokenizer.load(tiny_llama_dir)


@pytest.fixture
def folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny target that a test may change."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "copy"))


def with_template(folder: Path, template: str) -> ChatTokenizer:
    (folder / "chat_template.jinja").write_text(template)
    return ChatTokenizer.load(folder)


class TestText:
    @RELAXED
    @given(TEXTS)
    def test_every_text_comes_back(self, tokenizer: ChatTokenizer, text: str) -> None:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text

    @RELAXED
    @given(TEXTS)
    def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(
        self, tokenizer: ChatTokenizer, text: str
    ) -> None:
        pieces = [tokenizer.id_bytes(i) for i in tokenizer.encode(text)]
        assert b"".join(pieces) == text.encode()

    @RELAXED
    @given(st.lists(st.integers(0, 319), max_size=30))
    def test_decoding_any_ids_is_decoding_their_bytes(
        self, tokenizer: ChatTokenizer, ids: list[int]
    ) -> None:
        expected = b"".join(tokenizer.id_bytes(i) for i in ids if i not in tokenizer.special_ids)
        assert tokenizer.decode(ids, skip_special=True) == expected.decode(errors="replace")

    def test_every_byte_has_a_token(self, tokenizer: ChatTokenizer) -> None:
        singles = {tokenizer.id_bytes(i) for i in range(tokenizer.vocab_size)}
        assert {bytes([byte]) for byte in range(256)} <= singles

    def test_special_tokens_are_recognised_shown_and_skipped(
        self, tokenizer: ChatTokenizer
    ) -> None:
        ids = tokenizer.encode("<|im_start|>hi<|im_end|>")
        assert (ids[0], ids[-1]) == (1, 2)
        assert tokenizer.special_ids == {0, 1, 2}
        assert tokenizer.id_bytes(2) == b"<|im_end|>"
        assert tokenizer.decode(ids) == "<|im_start|>hi<|im_end|>"
        assert tokenizer.decode(ids, skip_special=True) == "hi"

    def test_ids_beyond_the_tokenizer_add_nothing(self, tokenizer: ChatTokenizer) -> None:
        assert tokenizer.id_bytes(tokenizer.vocab_size) == b""

    def test_half_a_surrogate_is_refused(self, tokenizer: ChatTokenizer) -> None:
        with pytest.raises(UsageError, match=r"text is not valid Unicode: .* at character 2"):
            tokenizer.encode("ab\ud800")

    def test_byte_fallback_tokens_are_bytes_too(self, folder: Path) -> None:
        vocabulary = {"<unk>": 0, "\u2581the": 1, "<0xC3>": 2, "<0xA9>": 3}
        tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        tokenizer.save(str(folder / "tokenizer.json"))
        loaded = ChatTokenizer.load(folder)
        assert b"".join(loaded.id_bytes(i) for i in (1, 2, 3)) == " the\u00e9".encode()

    def test_other_kinds_of_tokenizer_are_refused(self, folder: Path) -> None:
        tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(folder / "tokenizer.json"))
        with pytest.raises(UsageError, match="decoder is none, needed: byte-level BPE"):
            ChatTokenizer.load(folder)


class TestFolder:
    def test_padding_and_truncation_of_the_file_are_ignored(self, folder: Path) -> None:
        file = Tokenizer.from_file(str(folder / "tokenizer.json"))
        file.enable_truncation(4)
        file.enable_padding(length=64)
        file.save(str(folder / "tokenizer.json"))
        assert ChatTokenizer.load(folder).decode(ChatTokenizer.load(folder).encode("a" * 9)) == (
            "a" * 9
        )

    def test_end_ids_come_from_generation_config_then_config_then_the_token(
        self, folder: Path
    ) -> None:
        (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
        assert ChatTokenizer.load(folder).eos_ids == {0, 2}
        (folder / "generation_config.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
        assert ChatTokenizer.load(folder).eos_ids == {1}
        (folder / "config.json").unlink()
        assert ChatTokenizer.load(folder).eos_ids == {2}

    def test_older_folders_keep_the_template_in_the_settings(self, folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        path = folder / "tokenizer_config.json"
        named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
        for template, expected in (("plain", "plain"), (named, "d")):
            content: dict[str, Any] = {"chat_template": template, "bos_token": {"content": "B"}}
            path.write_text(json.dumps(content))
            assert ChatTokenizer.load(folder).render(HELLO) == expected
        path.write_text(json.dumps(content | {"chat_template": "{{ bos_token }}"}))
        assert ChatTokenizer.load(folder).render(HELLO) == "B"

    def test_a_missing_or_broken_tokenizer_is_named(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text('{"version": "1.0"')
        with pytest.raises(UsageError, match=r"tokenizer.json is not a readable tokenizer"):
            ChatTokenizer.load(folder)
        (folder / "tokenizer.json").unlink()
        with pytest.raises(UsageError, match=r"has no tokenizer.json"):
            ChatTokenizer.load(folder)


class TestChat:
    def test_the_template_is_filled_up_to_the_answer(self, tokenizer: ChatTokenizer) -> None:
        text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.render(HELLO) == text
        assert tokenizer.apply_chat_template(HELLO) == tokenizer.encode(text)

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], "messages is empty"),
            (["hi"], r"messages\[0\] is 'hi', an object is needed"),
            ([{"content": "hi"}], r"messages\[0\].role is None, needed: system"),
            ([*HELLO, {"role": "wizard", "content": ""}], r"messages\[1\].role is 'wizard'"),
            ([{"role": "user", "content": None}], r"messages\[0\].content is None, a text"),
            ([{"role": "user", "content": "\udc80"}], r"messages\[0\].content is not valid Uni"),
        ],
    )
    def test_bad_messages_are_refused(
        self, tokenizer: ChatTokenizer, messages: list[Any], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            tokenizer.render(messages)

    def test_a_target_without_template_says_so(self, folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        with pytest.raises(UsageError, match="has no chat template; give a plain prompt"):
            ChatTokenizer.load(folder).render(HELLO)

    def test_what_templates_in_the_wild_use_is_there(self, folder: Path) -> None:
        template = (
            "{%- for m in messages %}\n    {%- if loop.index > 1 %}{% break %}{% endif %}\n"
            "{{- m | tojson }} {{ strftime_now('%Y') | length }}\n{%- endfor %}"
            "{% if tools %}tools{% endif %}{{ eos_token }}"
        )
        rendered = with_template(folder, template).render([*HELLO, *HELLO])
        assert rendered == '{"role": "user", "content": "hello"} 4<|im_end|>'

    def test_a_template_may_refuse_messages(self, folder: Path) -> None:
        loaded = with_template(folder, "{{ raise_exception('user must come first') }}")
        with pytest.raises(UsageError, match="refuses these messages: user must come first"):
            loaded.render(HELLO)

    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
            "{{ raise_exception.__globals__['json'] }}",
            "{% for i in range(10**9) %}x{% endfor %}",
            "{{ 1 / 0 }}",
        ],
    )
    def test_a_template_cannot_reach_out_of_its_box(self, folder: Path, template: str) -> None:
        with pytest.raises(UsageError, match="refuses these messages"):
            with_template(folder, template).render(HELLO)

    def test_templates_that_are_broken_or_huge_are_refused(self, folder: Path) -> None:
        with pytest.raises(UsageError, match="the chat template is not valid"):
            with_template(folder, "{% for m in messages %}")
        with pytest.raises(UsageError, match=f"has more than {MAX_TEMPLATE_BYTES} bytes"):
            with_template(folder, "x" * (MAX_TEMPLATE_BYTES + 1))
        (folder / "chat_template.jinja").write_bytes(b"caf\xe9")
        with pytest.raises(UsageError, match=r"chat_template\.jinja is not UTF-8 text"):
            ChatTokenizer.load(folder)


@pytest.mark.real
class TestDefaultTarget:
    def test_the_chat_prompt_is_that_of_the_model(self, real_target_dir: Path) -> None:
        tokenizer = ChatTokenizer.load(real_target_dir)
        assert tokenizer.vocab_size == 49152
        assert tokenizer.eos_ids == {0, 2}
        # fmt: off
        assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi 2024 🙂"}]) == [
            1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411,
            407, 19712, 8182, 2, 198, 1, 4093, 198, 26843, 216, 34, 32, 34, 36, 47526, 2, 198, 1,
            520, 9531, 198,
        ]
        # fmt: on

    def test_numbers_are_split_into_digits_before_line_breaks_are_merged(
        self, real_target_dir: Path
    ) -> None:
        tokenizer = ChatTokenizer.load(real_target_dir)
        pieces = [tokenizer.id_bytes(i) for i in tokenizer.encode("Steps:\n\n10. \u00bd")]
        assert pieces == [b"Steps", b":", b"\n\n", b"1", b"0", b".", b" ", b"\xc2\xbd"]


def test_the_vocabulary_hash_ignores_how_the_file_is_written(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    raw = json.loads((tiny_llama_dir / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "same.json").write_text(json.dumps(raw, indent=3), encoding="utf-8")
    raw["added_tokens"][0]["content"] = "<|other|>"
    (tmp_path / "other.json").write_text(json.dumps(raw), encoding="utf-8")
    wanted = vocabulary_sha256(tiny_llama_dir / "tokenizer.json")
    assert vocabulary_sha256(tmp_path / "same.json") == wanted
    assert vocabulary_sha256(tmp_path / "other.json") != wanted
