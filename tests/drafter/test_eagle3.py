"""The drafter: its two entry points, its unroll, its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafter.checkpoint import load_drafter, save_drafter
from drafter.config import VARIANTS, DrafterConfig, default_rank, drafter_config_for
from drafter.decoder import causal_mask
from drafter.eagle3 import Drafter
from drafter.errors import UsageError
from drafter.start import start_drafter
from drafter.unroll import unroll
from tests.eagle3_reference import Reference
from tests.tiny_drafter import FORMS, VOCAB, form, tiny_drafter, tiny_target

TARGET = tiny_target()


def chain_states(
    drafter: Drafter, ids: torch.Tensor, taps: torch.Tensor, slot: int, steps: int
) -> Any:
    """Decode as the runtime does: extend over slots 0..slot, then steps on later tokens."""
    kv = drafter.config.kv_size
    none = torch.zeros(1, 0, kv)
    positions = torch.arange(slot + 1)[None]
    out = drafter.extend(
        ids[:, 1 : slot + 2], taps[:, : slot + 1], positions, causal_mask(1, slot + 1), none, none
    )
    keys, values, state = out.new_key, out.new_value, out.state[:, -1:]
    yield state
    for k in range(1, steps):
        token, position = ids[:, slot + 1 + k : slot + 2 + k], torch.tensor([[slot + k]])
        mask = torch.ones(1, 1, 1, keys.shape[1] + 1, dtype=torch.bool)
        out = drafter.step(token, state, position, mask, keys, values)
        keys, values = torch.cat((keys, out.new_key), 1), torch.cat((values, out.new_value), 1)
        state = out.state
        yield state


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_the_training_unroll_is_what_decoding_does(name: str) -> None:
    """Every slot, every step: the unrolled state equals extend followed by steps."""
    drafter = tiny_drafter(TARGET, **form(name))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (1, 14), generator=generator)
    taps = torch.randn(1, 14, 3 * 32, generator=generator)
    states = unroll(drafter, ids, taps, 4)
    for slot in range(9):
        for k, state in enumerate(chain_states(drafter, ids, taps, slot, 4)):
            torch.testing.assert_close(states[k][:, slot], state[:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_every_form_is_its_formulas(name: str) -> None:
    """Four steps of `unroll`, head included, against the formulas written down again."""
    drafter = tiny_drafter(TARGET, head="dense", **form(name))
    ids, taps = torch.randint(0, VOCAB, (13,)), torch.randn(9, 3 * 32)
    reference = Reference(drafter.state_dict(), TARGET.embed_tokens.weight, variants=FORMS[name])
    wanted = reference.scores(ids[1:], taps, steps=4)
    # The last slots of `unroll` lack their later tokens: give it a longer document.
    more = torch.cat((taps, torch.zeros(4, 3 * 32)))
    for k, state in enumerate(unroll(drafter, ids[None], more[None], 4)):
        scores = drafter.lm_head.scores(drafter.head_input(state[0, :9]))  # type: ignore[operator]
        torch.testing.assert_close(scores, wanted[k], atol=1e-4, rtol=1e-4)


def test_a_variant_that_is_off_leaves_config_files_as_they_were(tmp_path: Path) -> None:
    """Files, and runs that know their drafter by its config, from before there were variants."""
    for name, folder in (("original", tmp_path / "a"), ("fc_norm", tmp_path / "b")):
        folder.mkdir()
        save_drafter(tiny_drafter(TARGET, **form(name)), folder)
        written = json.loads((folder / "config.json").read_text())
        assert tuple(key for key in VARIANTS if key in written) == FORMS[name]
        assert load_drafter(folder, TARGET).config.variants == FORMS[name]


def test_a_layer_is_taken_over_from_a_drafter_of_the_same_variants_only() -> None:
    """Two of them have no weights: shapes alone would not tell."""
    body = tiny_drafter(TARGET, norm_output=True)
    config = tiny_drafter(TARGET, head="target", norm_output=True).config
    taken = start_drafter(config, TARGET, body=body)
    assert torch.equal(taken.fc.weight, body.fc.weight)
    for other in ({}, {"norm_before_residual": True}):
        config = tiny_drafter(TARGET, head="target", **other).config
        with pytest.raises(UsageError, match=r"has the variants \['norm_output'\]"):
            start_drafter(config, TARGET, body=body)


@torch.no_grad()
def test_step_differs_from_extend_even_when_the_widths_agree() -> None:
    """With one tap, taps and state have the same width; only `extend` may pass through `fc`."""
    drafter = tiny_drafter(TARGET, taps=(2,))
    args = (torch.zeros(1, 1, dtype=torch.int64), torch.randn(1, 1, 32), torch.zeros(1, 1).long())
    none = torch.zeros(1, 0, drafter.config.kv_size)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    extended, stepped = (
        drafter.extend(*args, mask, none, none),
        drafter.step(*args, mask, none, none),
    )
    assert not torch.allclose(extended.state, stepped.state)


@pytest.mark.parametrize(
    ("size", "rank"), [(576, 72), (4096, 512), (2880, 360), (2048, 256), (32, 8)]
)
def test_the_default_rank_is_an_eighth_in_multiples_of_eight(size: int, rank: int) -> None:
    assert default_rank(size) == rank


@pytest.mark.parametrize("head", ["low_rank", "dense", "target"])
def test_a_checkpoint_comes_back_and_holds_no_target_weight(head: str, tmp_path: Path) -> None:
    drafter = tiny_drafter(TARGET, head=head)
    save_drafter(drafter, tmp_path, torch.float32)
    again = load_drafter(tmp_path, TARGET)
    assert again.config == drafter.config
    assert again.target_embedding[0].data_ptr() == TARGET.embed_tokens.weight.data_ptr()
    stored = load_file(tmp_path / "model.safetensors")
    heads = {k: list(v.shape) for k, v in stored.items() if k.startswith("lm_head")}
    assert (
        heads
        == {
            "low_rank": {"lm_head.down.weight": [8, 32], "lm_head.up.weight": [VOCAB, 8]},
            "dense": {"lm_head.weight": [VOCAB, 32]},
            "target": {},
        }[head]
    )
    for name, value in again.state_dict().items():
        assert torch.equal(value, drafter.state_dict()[name])


@torch.no_grad()
def test_weights_too_large_for_the_file_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    drafter = tiny_drafter(TARGET)
    drafter.fc.weight[0, 0] = -70_000.0
    with pytest.raises(UsageError, match=r"largest value of fc\.weight is 70000, but float16"):
        save_drafter(drafter, tmp_path)
    assert not list(tmp_path.iterdir())
    save_drafter(drafter, tmp_path, torch.float32)
    assert load_drafter(tmp_path, TARGET).fc.weight[0, 0] == -70_000.0


def test_missing_and_unexpected_keys_are_errors(tmp_path: Path) -> None:
    save_drafter(tiny_drafter(TARGET), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"extra": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="unexpected: extra"):
        load_drafter(tmp_path, TARGET)
    del tensors["lm_head.up.weight"]
    save_file(tensors, path)
    with pytest.raises(UsageError, match=r"Missing: lm_head\.up\.weight"):
        load_drafter(tmp_path, TARGET)


def test_a_wrongly_shaped_key_is_an_error(tmp_path: Path) -> None:
    save_drafter(tiny_drafter(TARGET), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.down.weight"] = tensors["lm_head.down.weight"][:4].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"has shape \[4, 32\], the config needs \[8, 32\]"):
        load_drafter(tmp_path, TARGET)


def test_a_drafter_of_another_target_is_refused(tmp_path: Path) -> None:
    save_drafter(tiny_drafter(TARGET), tmp_path)
    with pytest.raises(UsageError, match=f"vocab_size is {VOCAB}, the target's is 99"):
        load_drafter(tmp_path, tiny_target(vocab_size=99))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lm_head_rank": 33}, "lm_head_rank 33 must be between 1 and the hidden size 32"),
        ({"taps": (1, 8)}, "tap id 8 is out of range"),
        ({"head_dim": -3}, "head_dim is -3: Input should be a multiple"),
        ({"head_dim": -8}, "head_dim is -8: Input should be greater than 0"),
        ({"head_dim": 7}, "head_dim is 7: Input should be a multiple of 2"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": 5}, "num_heads 5 must be a multiple of num_kv_heads 2"),
        ({"taps": ()}, "taps is .*at least 1 item"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": VOCAB + 1}, "top_k 62 exceeds the vocabulary"),
        ({"max_positions": 0}, "max_positions is 0"),
        ({"rms_norm_eps": -1.0}, r"rms_norm_eps is -1\.0"),
        ({"rope": {"theta": 0.0}}, r"rope\.theta is 0\.0"),
        ({"head": "dense", "rescore": 40}, "rescore 40 does not go with head 'dense'"),
        ({"head": "target", "lm_head_rank": 8}, "lm_head_rank 8 does not go with head 'target'"),
        ({"rescore": 3}, "rescore 3 must be 0"),
        ({"rescore": 1000}, "rescore 1000 exceeds the vocabulary"),
        ({"fc_norm": True, "norm_before_fc": True}, "fc_norm and norm_before_fc exclude each"),
    ],
)
def test_impossible_shapes_are_refused_in_one_sentence(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        drafter_config_for(TARGET.config, **({"top_k": 6} | changes))


def test_an_unknown_key_in_the_config_is_refused(tmp_path: Path) -> None:
    save_drafter(tiny_drafter(TARGET), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rnak": 3}))
    with pytest.raises(UsageError, match="rnak"):
        load_drafter(tmp_path, TARGET)


def test_starting_from_the_target_passes_the_highest_tap_through() -> None:
    config: DrafterConfig = drafter_config_for(TARGET.config, top_k=6, head="target")
    drafter = start_drafter(config, TARGET)
    taps = torch.randn(1, 5, 96)
    gap = (drafter.fc(taps) - taps[..., -32:]).norm() / taps[..., -32:].norm()
    assert gap < 0.2
    assert torch.equal(drafter.midlayer.mlp.up_proj.weight, TARGET.layers[-1].mlp.up_proj.weight)  # type: ignore[union-attr]
