"""The Generator on tiny models: same text with and without speculation, however it ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.errors import UsageError
from runtime.generator import Completion, Generator
from runtime.tree import TreeConfig
from tests.runtime.tiny_engines import Tiny, tiny

EOS = 23
TREE = TreeConfig(depth=4, width=3, budget=10)


class TinyTokenizer:
    """24 tokens: letters, words, pieces of UTF-8 characters, one end-of-text token."""

    eos_ids = frozenset({EOS})
    special_ids = frozenset({EOS})
    table = (
        [bytes([97 + i]) for i in range(10)]
        + [b" the", b" cat", b" sat", b"\n", b".", b"\xe2", b"\x82", b"\xac", b"\xe2\x82", b"\xc3"]
        + [b"\xa9", b"ab", b" \xf0\x9f", b"<end>"]
    )

    def id_bytes(self, token_id: int) -> bytes:
        return self.table[token_id]

    def encode(self, text: str) -> list[int]:
        return [byte % EOS for byte in text.encode()]

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self.encode("".join(f"{m['role']}:{m['content']}" for m in messages) + ">")


def generator_of(model: Tiny) -> Generator:
    return Generator(model.target, model.drafter, TinyTokenizer(), tree=TREE)


def test_requests_that_draw_have_a_tree_of_their_own() -> None:
    model = tiny()
    drawn = TreeConfig(2, 3, 5)
    generator = Generator(model.target, model.drafter, TinyTokenizer(), tree=TREE, drawn_tree=drawn)
    assert (generator.tree(0.0), generator.tree(0.5)) == (TREE, drawn)
    last = generator.generate([1, 2, 3], max_tokens=9, temperature=1.0, seed=0)
    assert len(last.acceptance_by_depth) >= drawn.depth
    assert len(generator.generate([1, 2, 3], max_tokens=9).acceptance_by_depth) >= TREE.depth


GENERATORS = [generator_of(tiny(seed, sharpness=3.0)) for seed in range(3)]


def text_of(token_ids: list[int]) -> str:
    table = TinyTokenizer.table
    return b"".join(table[i] for i in token_ids if i != EOS).decode("utf-8", errors="replace")


class TestGenerate:
    @settings(max_examples=25, deadline=None)
    @given(
        generator=st.sampled_from(GENERATORS),
        prompt=st.text(min_size=1, max_size=12),
        max_tokens=st.integers(1, 40),
        stop=st.lists(st.sampled_from(["a", "t", " the", "cat", "€", "\ufffd", "bab"]), max_size=2),
        stop_token_ids=st.lists(st.integers(0, 22), max_size=1),
    )
    def test_speculation_changes_neither_text_nor_tokens(
        self,
        generator: Generator,
        prompt: str,
        max_tokens: int,
        stop: list[str],
        stop_token_ids: list[int],
    ) -> None:
        plain, fast = (
            generator.generate(
                prompt,
                max_tokens=max_tokens,
                stop=stop,
                stop_token_ids=stop_token_ids,
                speculate=speculate,
                raw=True,
            )
            for speculate in (False, True)
        )
        assert self.outcome(fast) == self.outcome(plain)
        assert not any(string in fast.text for string in stop)
        if fast.finish_reason == "length":
            assert len(fast.token_ids) == max_tokens
            assert fast.text == text_of(fast.token_ids)

    def outcome(self, completion: Completion) -> tuple[str, list[int], str, int]:
        c = completion
        return c.text, c.token_ids, c.finish_reason, c.prompt_tokens

    def test_figures_agree_with_each_other(self) -> None:
        done = GENERATORS[1].generate("hello", max_tokens=40, raw=True)
        assert done.finish_reason == "length"
        assert done.rounds + 1 == done.target_passes
        assert len(done.token_ids) == pytest.approx(1 + done.tau * done.rounds)
        assert done.tau == pytest.approx(1 + sum(done.acceptance_by_depth))
        assert len(done.acceptance_by_depth) == TREE.depth
        assert done.tok_s == pytest.approx(len(done.token_ids) / done.timings.total_s)
        plain = GENERATORS[1].generate("hello", max_tokens=40, raw=True, speculate=False)
        assert (plain.tau, plain.rounds, plain.acceptance_by_depth) == (1.0, 39, [])
        assert plain.timings.draft_s == 0

    def test_stop_string_inside_a_block_is_in_no_figure(self) -> None:
        """Whatever completes the stop string, later tokens of its round count nowhere."""
        free = GENERATORS[0].generate("hello", max_tokens=40, raw=True)
        for start in range(0, len(free.text) - 2, 3):
            stop = free.text[start : start + 2]
            if "\ufffd" in stop:  # may stand for bytes that a later token completes
                continue
            done = GENERATORS[0].generate("hello", max_tokens=40, raw=True, stop=stop)
            assert done.finish_reason == "stop"
            assert done.text == free.text[: free.text.index(stop)]
            assert done.token_ids == free.token_ids[: len(done.token_ids)]
            assert stop in text_of(done.token_ids)
            assert stop not in text_of(done.token_ids[:-1])
            assert len(done.token_ids) == pytest.approx(1 + done.tau * done.rounds)

    def test_end_token_is_the_last_id_and_has_no_text(self) -> None:
        free = GENERATORS[1].generate("hello", max_tokens=20, raw=True)
        end = free.token_ids[4]
        done = GENERATORS[1].generate("hello", max_tokens=20, raw=True, stop_token_ids=[end])
        first = free.token_ids.index(end)
        assert done.token_ids == free.token_ids[: first + 1]
        assert done.text == text_of(done.token_ids[:-1])
        assert done.finish_reason == "stop"

    def test_a_seed_repeats_a_sampled_text(self) -> None:
        texts = [
            GENERATORS[0].generate("hi", max_tokens=30, temperature=1.0, top_p=0.95, seed=seed).text
            for seed in (1, 1, 2)
        ]
        assert texts[0] == texts[1] != texts[2]

    def test_json_has_the_documented_fields(self) -> None:
        done = json.loads(json.dumps(GENERATORS[0].generate("hi", max_tokens=3).to_json()))
        fields = ["text", "token_ids", "prompt_tokens", "rounds", "tau", "finish_reason", "tok_s"]
        assert list(done) == fields


class TestPrompts:
    generator = GENERATORS[0]

    def test_a_text_is_one_user_message_unless_raw(self) -> None:
        tokenizer = TinyTokenizer()
        assert self.generator.prompt_ids("hi") == tokenizer.encode("user:hi>")
        assert self.generator.prompt_ids("hi", raw=True) == tokenizer.encode("hi")
        assert self.generator.prompt_ids([3, 1, 2]) == [3, 1, 2]
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
        assert self.generator.prompt_ids(messages) == tokenizer.encode("system:suser:hi>")

    @pytest.mark.parametrize("empty", ["", [], [{"role": "user", "content": ""}]])
    def test_empty_ones_are_refused(self, empty: Any) -> None:
        with pytest.raises(UsageError, match="the prompt is empty"):
            self.generator.stream(empty)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"prompt": [1] * 96}, "prompt has 96 tokens"),
            ({"prompt": "hi", "max_tokens": 0}, "max_tokens is 0"),
            ({"prompt": "hi", "temperature": -1}, "temperature is -1"),
            ({"prompt": "hi", "stop": ["\ud800"]}, "not valid UTF-8"),
            ({"prompt": "hi", "stop_token_ids": [24]}, "stop token id is 24"),
            ({"prompt": "hi", "tree": TreeConfig(width=17)}, "tree width is 17"),
            ({"prompt": ["hi", 3]}, "a prompt is a text"),
        ],
    )
    def test_bad_arguments_are_refused_before_the_first_piece(
        self, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            self.generator.stream(**arguments)


class TestStream:
    generator = GENERATORS[2]

    def test_pieces_join_to_the_completion(self) -> None:
        pieces = list(self.generator.stream("hello", max_tokens=40, raw=True))
        done = pieces[-1].completion
        assert done is not None
        assert [piece.completion for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert "".join(piece.text for piece in pieces) == done.text
        assert [token for piece in pieces for token in piece.token_ids] == done.token_ids
        assert len(pieces) == done.target_passes > 1

    def test_one_request_at_a_time(self) -> None:
        first = self.generator.stream("hello", max_tokens=40, raw=True)
        next(first)
        with pytest.raises(UsageError, match="serves one at a time"):
            self.generator.generate("hi")
        assert "".join(piece.text for piece in first)
        assert self.generator.generate("hi", max_tokens=2).finish_reason == "length"

    def test_closing_cancels_and_frees_the_generator(self) -> None:
        expected = self.generator.generate("hi", max_tokens=10).text
        for pieces in range(4):
            stream = self.generator.stream("hello", max_tokens=40, raw=True)
            for _ in range(pieces):
                next(stream)
            stream.close()  # type: ignore[attr-defined]
            assert self.generator.generate("hi", max_tokens=10).text == expected

    def test_the_generator_is_free_once_the_last_piece_is_out(self) -> None:
        for piece in self.generator.stream("hello", max_tokens=5, raw=True):
            if piece.completion is not None:
                assert self.generator.generate("hi", max_tokens=1).token_ids
