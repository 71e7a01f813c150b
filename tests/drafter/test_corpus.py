"""Corpora: shards, dialogues, on-policy answers, and what the target is seen to do on them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from drafter.capture import capture, capture_shards, read_captured
from drafter.corpus import document, read_corpus, read_dialogues, write_shards
from drafter.decoder import causal_mask
from drafter.errors import UsageError
from drafter.generate import GenerateConfig, generate_corpus, sample_batch, self_prompts
from tests.tiny_drafter import VOCAB, tiny_documents, tiny_target

TARGET = tiny_target()


@torch.no_grad()
def greedy(prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache: the whole text again for every token."""
    ids = list(prompt)
    for _ in range(count):
        x, positions = torch.tensor([ids]), torch.arange(len(ids))[None]
        past = TARGET.empty_past(1)
        states = TARGET(x, positions, causal_mask(1, len(ids)), past, past).states
        ids.append(int(TARGET.logits(states[:, -1]).argmax()))
        if ids[-1] in TARGET.config.eos_token_ids:
            break
    return ids[len(prompt) :]


def test_shards_give_back_the_documents(tmp_path: Path) -> None:
    documents = tiny_documents(700)
    assert write_shards(tmp_path, documents) == 2
    again = read_corpus(tmp_path)
    assert len(again) == 700
    for a, b in zip(documents, again, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.mask, b.mask)


def test_dialogues_are_read_plain_or_compressed(tmp_path: Path) -> None:
    line = json.dumps({"prompt_ids": [1, 2], "response_ids": [3], "finished": True}) + "\n"
    (tmp_path / "a.jsonl").write_text(line)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        (found,) = read_dialogues(tmp_path / name, VOCAB)
        assert found.ids.tolist() == [1, 2, 3]
        assert found.mask.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2: not a dialogue"),
        ('{"prompt_ids": [1]}', "line 2: not a dialogue"),
        (
            '{"prompt_ids": [], "response_ids": [1]}',
            "line 2: prompt_ids and response_ids must both",
        ),
        ('{"prompt_ids": [1], "response_ids": [99]}', "line 2: token id 99 is outside"),
    ],
)
def test_a_bad_dialogue_is_named_by_its_line(line: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt_ids": [1], "response_ids": [2]}\n' + line + "\n")
    with pytest.raises(UsageError, match=sentence):
        list(read_dialogues(tmp_path / "a.jsonl", VOCAB))


def test_a_file_that_is_cut_off_or_no_text_is_one_sentence(tmp_path: Path) -> None:
    line = json.dumps({"prompt_ids": [1, 2], "response_ids": [3]}) + "\n"
    packed = gzip.compress(line.encode() * 1000)
    for name, content in (
        ("cut.jsonl.gz", packed[:-9]),
        ("plain.jsonl.gz", line.encode()),
        ("latin.jsonl", line.encode() + b'{"caf\xe9": 1}'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"{name} cannot be read after line .* get the file"):
            list(read_dialogues(tmp_path / name, VOCAB))


def test_an_empty_corpus_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no corpus shards"):
        read_corpus(tmp_path)


def test_padded_batches_answer_as_each_prompt_alone() -> None:
    """Greedy answers do not depend on the company: left padding is invisible."""
    prompts = [[5, 6, 7], [9] * 8, [30, 31, 32, 33, 34]]
    together = sample_batch(TARGET, prompts, [0.0] * 3, 12, torch.Generator())
    assert together == [greedy(p, 12) for p in prompts]


def test_warm_answers_follow_the_seed_and_end_at_the_end_token() -> None:
    prompts = [[5, 6, 7]] * 32

    def draw(seed: int) -> list[list[int]]:
        return sample_batch(TARGET, prompts, [1.0] * 32, 40, torch.Generator().manual_seed(seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    ended = [a for a in draw(1) if 2 in a]
    assert ended
    assert all(a.index(2) == len(a) - 1 for a in ended)


def test_a_corpus_goes_on_with_its_missing_shards(tmp_path: Path) -> None:
    prompts = [[5 + i, 6, 7] for i in range(7)]
    config = GenerateConfig(max_new_tokens=6, batch=2, shard_documents=3)
    assert generate_corpus(TARGET, prompts, tmp_path / "whole", config) == 3
    generate_corpus(TARGET, prompts, tmp_path / "parts", config)
    (tmp_path / "parts" / "shard-00001.safetensors").unlink()
    seen: list[int] = []
    generate_corpus(TARGET, prompts, tmp_path / "parts", config, lambda done, _: seen.append(done))
    assert seen == [4, 5, 6]
    for a, b in zip(read_corpus(tmp_path / "whole"), read_corpus(tmp_path / "parts"), strict=True):
        assert torch.equal(a.ids, b.ids)
    first = read_corpus(tmp_path / "whole")[0]
    assert first.ids[first.mask].tolist() == greedy([5, 6, 7], 6)


def test_no_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompts"):
        generate_corpus(TARGET, [], tmp_path, GenerateConfig())


def test_prompts_and_answers_stay_within_the_context(tmp_path: Path) -> None:
    context = TARGET.config.max_positions
    config = GenerateConfig(max_new_tokens=20, temperatures=(1.0,))
    generate_corpus(TARGET, [[5] * (context - 3)] * 8, tmp_path / "fits", config)
    lengths = [len(d.ids) for d in read_corpus(tmp_path / "fits")]
    assert max(lengths) == context
    with pytest.raises(UsageError, match=f"Prompt 2 has {context} tokens"):
        generate_corpus(TARGET, [[5], [5] * context], tmp_path / "not", config)


def test_a_template_that_does_not_hold_the_turn_once_is_refused() -> None:
    class Twice(Template):
        def render(self, messages: list[dict[str, str]]) -> str:
            return messages[0]["content"] * 2

    with pytest.raises(UsageError, match="writes a user turn 2 times"):
        self_prompts(TARGET, Twice(), 5, GenerateConfig())


class Template:
    """A template of two markers around the user's turn, and one more for `loud`."""

    def render(self, messages: list[dict[str, str]], loud: bool = False) -> str:
        return f"<{messages[0]['content']}>{'!' if loud else ''}"

    def encode(self, text: str) -> list[int]:
        return [{"<": 10, ">": 11, "!": 12}[c] for c in text]


def test_the_model_writes_its_own_prompts() -> None:
    prompts = self_prompts(TARGET, Template(), 5, GenerateConfig(batch=16), longest=60)
    assert len({tuple(p) for p in prompts}) == 5
    assert all(p[0] == 10 and p[-1] == 11 and 2 not in p for p in prompts)
    (loud,) = self_prompts(TARGET, Template(), 1, GenerateConfig(batch=16), options={"loud": True})
    assert loud[-2:] == [11, 12]


@torch.no_grad()
def test_capture_keeps_the_taps_and_states_of_each_document_alone(tmp_path: Path) -> None:
    documents = tiny_documents(5)
    for d, captured in zip(documents, capture(TARGET, documents, batch=2), strict=True):
        n = len(d.ids)
        past = TARGET.empty_past(1)
        alone = TARGET(d.ids[None], torch.arange(n)[None], causal_mask(1, n), past, past)
        torch.testing.assert_close(captured.taps.float(), alone.taps[0], atol=0.05, rtol=0.02)
        torch.testing.assert_close(captured.states.float(), alone.states[0], atol=0.05, rtol=0.02)
        assert torch.equal(
            captured.likeliest[:, 0].long(), TARGET.logits(alone.states[0]).argmax(-1)
        )


def test_a_captured_shard_is_not_captured_again(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    write_shards(tmp_path / "corpus", tiny_documents(4))
    capture_shards(TARGET, tmp_path / "corpus", tmp_path / "captured")
    path = tmp_path / "captured" / "shard-00000.safetensors"
    stamp = path.stat().st_mtime_ns
    capture_shards(TARGET, tmp_path / "corpus", tmp_path / "captured")
    assert path.stat().st_mtime_ns == stamp
    assert len(read_captured(tmp_path / "captured")) == 4


def test_a_document_marks_its_response() -> None:
    assert document([1, 2], [3, 4]).mask.tolist() == [False, False, True, True]
