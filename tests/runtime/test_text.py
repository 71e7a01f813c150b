"""Text as it comes equals the text of everything at once, cut before the first stop string."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.errors import UsageError
from runtime.text import TextStream, check_stops

SPECIAL = 0


class Bytes:
    """A tokenizer whose ids are given bytes; id 0 is special."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.special_ids = frozenset({SPECIAL})
        self._tokens = [b"<special>", *tokens]

    def id_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id]


def stream(tokens: list[bytes], stops: list[str] | None = None) -> tuple[list[str], TextStream]:
    """The pieces for `tokens` in order (b"" stands for a special token), then the rest."""
    text = TextStream(Bytes(tokens), stops or [])
    pieces = [text.push(i if token else SPECIAL) for i, token in enumerate(tokens, start=1)]
    return [*pieces, text.finish()], text


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the stop complete first ends the text; of two, the one that begins first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def at_once(tokens: list[bytes]) -> str:
    return b"".join(tokens).decode("utf-8", errors="replace")


@st.composite
def divided(draw: st.DrawFn, data: st.SearchStrategy[bytes]) -> list[bytes]:
    """Bytes divided anywhere, with special tokens (b"") in between."""
    whole = draw(data)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    edges = [0, *cuts, len(whole)]
    return [whole[a:b] for a, b in pairwise(edges)]


def unhex(code: bytes) -> bytes:
    return code if code == b"a" else bytes.fromhex(code.decode())


texts = st.text(alphabet="aé€😀\u0301z", max_size=12).map(str.encode)
# Overlong forms, surrogates, lone continuation bytes, truncated sequences.
mangled = st.lists(
    st.sampled_from(b"a c3 a9 e282 ac f09f 9880 ed a080 c0af ff f490".split()).map(unhex),
    max_size=10,
).map(b"".join)
few = st.text(alphabet="ab\u20ac", max_size=14).map(str.encode)
stops = st.lists(st.text(alphabet="ab\u20ac", min_size=1, max_size=4), max_size=3)


class TestCharacters:
    @settings(max_examples=200, deadline=None)
    @given(tokens=divided(texts | mangled | st.binary(max_size=12)))
    def test_pieces_join_to_the_text_of_all_bytes_at_once(self, tokens: list[bytes]) -> None:
        pieces, _ = stream(tokens)
        assert "".join(pieces) == at_once(tokens)

    @given(tokens=divided(texts))
    def test_no_piece_holds_half_a_character(self, tokens: list[bytes]) -> None:
        pieces, _ = stream(tokens)
        assert all("\ufffd" not in piece for piece in pieces)

    def test_holds_back_only_what_is_unfinished(self) -> None:
        pieces, _ = stream([b"a\xe2", b"\x82", b"\xacb", b"\xf0\x9f"])
        assert pieces == ["a", "", "€b", "", "\ufffd"]

    def test_special_tokens_have_no_text(self) -> None:
        pieces, _ = stream([b"a", b"", b"b"])
        assert "".join(pieces) == "ab"


class TestStopStrings:
    @settings(max_examples=250, deadline=None)
    @given(tokens=divided(few), stop=stops)
    def test_text_ends_before_the_one_complete_first(
        self, tokens: list[bytes], stop: list[str]
    ) -> None:
        pieces, text = stream(tokens, stop)
        assert ("".join(pieces), text.stopped) == cut(at_once(tokens), stop)

    @settings(max_examples=150, deadline=None)
    @given(tokens=divided(few), stop=stops)
    def test_shows_all_that_no_stop_string_can_still_claim(
        self, tokens: list[bytes], stop: list[str]
    ) -> None:
        text = TextStream(Bytes(tokens), stop)
        shown = ""
        for count, token in enumerate(tokens, start=1):
            shown += text.push(count if token else SPECIAL)
            whole = b"".join(tokens[:count]).decode("utf-8", errors="ignore")
            expected, stopped = cut(whole, stop)
            assert text.stopped == stopped
            if stopped:
                assert shown == expected
                return
            claims = [
                size
                for size in range(1, len(whole) + 1)
                if any(s.startswith(whole[-size:]) for s in stop)
            ]
            assert shown == whole[: len(whole) - max(claims, default=0)]

    def test_nothing_comes_after_a_stop(self) -> None:
        pieces, text = stream([b"one ST", b"OP two", b" three"], ["STOP"])
        assert (pieces, text.stopped) == (["one ", "", "", ""], True)

    def test_a_false_alarm_is_released(self) -> None:
        pieces, text = stream([b"a\n", b"\nb\n"], ["\n\n\n"])
        assert (pieces, text.stopped) == (["a", "\n\nb", "\n"], False)

    @settings(max_examples=150, deadline=None)
    @given(tokens=divided(few | texts | mangled), stop=stops, at=st.integers(0, 9))
    def test_tokens_at_once_give_what_they_give_one_after_the_other(
        self, tokens: list[bytes], stop: list[str], at: int
    ) -> None:
        ids = [i if token else SPECIAL for i, token in enumerate(tokens, start=1)]
        one, all_ = (TextStream(Bytes(tokens), stop) for _ in range(2))
        for block in (ids[:at], ids[at:]):
            pieces = []
            while len(pieces) < len(block) and not one.stopped:
                pieces.append(one.push(block[len(pieces)]))
            assert all_.push_all(block) == ("".join(pieces), len(pieces))
            assert all_.stopped == one.stopped
            if one.stopped:
                return
        assert all_.finish() == one.finish()


class TestCheckStops:
    def test_accepts_one_or_several(self) -> None:
        assert check_stops("END") == ("END",)
        assert check_stops(["a", "b"]) == ("a", "b")
        assert check_stops(()) == ()

    @pytest.mark.parametrize("bad", ["", [""], ["a", ""], [b"bytes"], [3]])
    def test_refuses_what_is_not_text(self, bad: object) -> None:
        with pytest.raises(UsageError, match="a stop string is"):
            check_stops(bad)  # type: ignore[arg-type]

    def test_refuses_text_that_utf8_cannot_hold(self) -> None:
        with pytest.raises(UsageError, match=r"stop string 'a\\udcff' is not valid UTF-8"):
            check_stops(["a\udcff"])
