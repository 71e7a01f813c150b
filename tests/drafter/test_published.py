"""Published EAGLE-3 checkpoints: read to the bit, refused where we would compute otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafter.checkpoint import load_drafter, save_drafter
from drafter.config import VARIANTS, RopeConfig
from drafter.eagle3 import Drafter
from drafter.errors import UsageError
from drafter.heads.truncated import TruncatedHead
from drafter.interop import LAYOUTS, write_eagle3
from drafter.published import read_eagle3
from drafter.unroll import unroll
from tests.eagle3_reference import Reference
from tests.tiny_drafter import FORMS, VOCAB, form, tiny_drafter, tiny_target

TARGET = tiny_target()
ABOUT = {"name": "org/tiny", "architectures": ["LlamaForCausalLM"]}
CONVENTION = {"vllm": "input", "sglang": "output", "speculators": None}
HEADS: dict[str, dict[str, Any]] = {
    "dense": {"head": "dense"},
    "truncated": {"head": "truncated", "draft_vocab_size": 20},
}


def drafter(**changes: Any) -> Drafter:
    made = tiny_drafter(TARGET, **changes)
    if isinstance(made.lm_head, TruncatedHead):
        made.lm_head.choose(torch.arange(2, VOCAB, 3), TARGET.lm_head.weight)
    return made


def published(folder: Path, layout: str = "vllm", **changes: Any) -> Drafter:
    made = drafter(**({"head": "dense"} | changes))
    write_eagle3(made, folder, layout, "fp32", ABOUT)
    return made


def edit(folder: Path, change: Any) -> None:
    """Change config and tensors of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    config, tensors = change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


ROUNDS = [
    (layout, head, name)
    for layout, engine in LAYOUTS.items()
    for head in HEADS
    for name, variants in FORMS.items()
    if not set(variants) & set(engine.lacks)
]


@pytest.mark.parametrize(("layout", "head", "name"), ROUNDS)
def test_what_was_written_is_read_back_to_the_bit(
    layout: str, head: str, name: str, tmp_path: Path
) -> None:
    made = published(tmp_path, layout, **HEADS[head], **form(name))
    meaning = None if layout == "speculators" or "norm_output" not in FORMS[name] else "fed-back"
    found = read_eagle3(tmp_path, TARGET, CONVENTION[layout], meaning)
    assert found.config.taps == made.config.taps
    assert found.config.head == head
    assert found.config.variants == FORMS[name]
    assert found.config.draft_vocab_size == made.config.draft_vocab_size
    wanted = made.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    for key, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key


def test_other_prefixes_and_an_equal_embedding_are_the_same_drafter(tmp_path: Path) -> None:
    made = published(tmp_path)

    def change(config: Any, tensors: Any) -> Any:
        named = {f"model.{n.replace('midlayer.', 'layers.0.')}": t for n, t in tensors.items()}
        return config, named | {"embed_tokens.weight": TARGET.embed_tokens.weight.clone()}

    edit(tmp_path, change)
    found = read_eagle3(tmp_path, TARGET, "input")
    assert torch.equal(found.fc.weight, made.fc.weight)
    assert torch.equal(found.midlayer.mlp.up_proj.weight, made.midlayer.mlp.up_proj.weight)


@pytest.mark.parametrize("layout", ["vllm", "speculators"])
@torch.no_grad()
def test_an_embedding_of_its_own_stays_its_own(layout: str, tmp_path: Path) -> None:
    """Another table than the target's is read to the bit, kept in our own format, and used."""
    published(tmp_path, layout)
    table = torch.randn(VOCAB, 32)
    edit(tmp_path, lambda c, t: (c, t | {"embed_tokens.weight": table}))
    found = read_eagle3(tmp_path, TARGET, CONVENTION[layout])
    assert found.config.own_embedding
    assert torch.equal(found.embedding, table)
    ids, taps = torch.randint(0, VOCAB, (10,)), torch.randn(9, 3 * 32)
    reference = Reference(load_file(tmp_path / "model.safetensors"), table, LAYOUTS[layout].layer)
    (state,) = unroll(found, ids[None], torch.cat((taps, torch.zeros(1, 3 * 32)))[None], 1)
    got = found.lm_head.scores(found.head_input(state[0, :9]))  # type: ignore[operator]
    torch.testing.assert_close(got, reference.scores(ids[1:], taps)[0], atol=1e-4, rtol=1e-4)
    for name in ("native", "again"):
        (tmp_path / name).mkdir()
    save_drafter(found, tmp_path / "native", torch.float32)
    loaded = load_drafter(tmp_path / "native", TARGET)
    write_eagle3(loaded, tmp_path / "again", layout, "fp32", ABOUT)
    first, second = (load_file(p / "model.safetensors") for p in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_leaves_an_embedding_of_its_own_alone() -> None:
    """It is frozen, as the target's is."""
    made = drafter(own_embedding=True)
    assert "embed_tokens.weight" in made.state_dict()
    assert not [name for name, _ in made.named_parameters() if "embed" in name]


def test_an_engine_that_would_not_use_an_embedding_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="own_embedding, which sglang does not compute"):
        published(tmp_path, "sglang", own_embedding=True)


def test_without_a_head_it_is_the_targets(tmp_path: Path) -> None:
    published(tmp_path)
    edit(tmp_path, lambda c, t: (c, {n: x for n, x in t.items() if n != "lm_head.weight"}))
    assert read_eagle3(tmp_path, TARGET, "input").config.head == "target"


def test_without_layer_ids_the_taps_are_the_default_ones(tmp_path: Path) -> None:
    published(tmp_path)
    edit(tmp_path, lambda c, t: ({k: v for k, v in c.items() if k != "eagle_config"}, t))
    assert read_eagle3(tmp_path, TARGET, None).config.taps == TARGET.config.default_taps


def test_rope_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    published(tmp_path, rope=RopeConfig(theta=5e5, kind="llama3", factor=8.0))
    rope = read_eagle3(tmp_path, TARGET, "input").config.rope
    assert (rope.theta, rope.kind, rope.factor) == (5e5, "llama3", 8.0)


@pytest.mark.parametrize("prefix", ["midlayer.", "layers.0.", "model.midlayer.", "model.layers.0."])
@pytest.mark.parametrize("embedding", ["in the file", "left out"])
@pytest.mark.parametrize("head", ["in the file", "left out"])
@pytest.mark.parametrize("maps", ["none", "identity"])
def test_one_drafter_under_all_its_names(
    prefix: str, embedding: str, head: str, maps: str, tmp_path: Path
) -> None:
    """Its embedding and head may lie in the file or be the target's; maps may say nothing new."""
    made = published(tmp_path)

    def change(config: Any, tensors: Any) -> Any:
        outer = "model." if prefix.startswith("model.") else ""
        own = {
            name: tensor
            for name, tensor in tensors.items()
            if name != "lm_head.weight" or head == "in the file"
        }
        named = {
            prefix + n.removeprefix("midlayer.") if n.startswith("midlayer.") else outer + n: t
            for n, t in own.items()
        }
        if embedding == "in the file":
            named[f"{outer}embed_tokens.weight"] = TARGET.embed_tokens.weight.clone()
        if maps == "identity":
            named["d2t"] = torch.zeros(VOCAB, dtype=torch.int64)
            named["t2d"] = torch.ones(VOCAB, dtype=torch.bool)
        return config, named

    edit(tmp_path, change)
    found = read_eagle3(tmp_path, TARGET, "input")
    assert found.config.head == ("dense" if head == "in the file" else "target")
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, made.state_dict()[name]), name


def test_older_names_of_the_norms_are_the_same_variant(tmp_path: Path) -> None:
    """An older SGLang says use_aux_norm and aux_norm_low, _mid, _high."""
    made = published(tmp_path, **form("fc_norm"))

    def change(config: Any, tensors: Any) -> Any:
        for i, old in enumerate(("low", "mid", "high")):
            tensors[f"aux_norm_{old}.weight"] = tensors.pop(f"fc_norm.{i}.weight")
        del config["fc_norm"]
        return config | {"use_aux_norm": True}, tensors

    edit(tmp_path, change)
    found = read_eagle3(tmp_path, TARGET, "input")
    assert found.config.variants == ("fc_norm",)
    assert made.fc_norm is not None
    assert found.fc_norm is not None
    for mine, its in zip(made.fc_norm.parameters(), found.fc_norm.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_what_norm_output_means_is_asked_where_projects_disagree(tmp_path: Path) -> None:
    """SpecForge norms the head's input with it, as everybody does anyway; engines feed it back."""
    published(tmp_path, **form("norm_output"))
    with pytest.raises(UsageError, match="sets norm_output; projects disagree"):
        read_eagle3(tmp_path, TARGET, "input")
    assert read_eagle3(tmp_path, TARGET, "input", "fed-back").config.variants == ("norm_output",)
    assert read_eagle3(tmp_path, TARGET, "input", "head").config.variants == ()
    edit(tmp_path, lambda c, t: (c | {"norm_output": False}, t))
    assert read_eagle3(tmp_path, TARGET, "input").config.variants == ()
    with pytest.raises(UsageError, match="a head without a norm"):
        read_eagle3(tmp_path, TARGET, "input", "head")


@pytest.mark.parametrize("layout", ["vllm", "speculators"])
def test_a_variant_that_a_config_does_not_name_is_off(layout: str, tmp_path: Path) -> None:
    """As in the project whose config it is; vLLM alone reads speculators' otherwise."""
    published(tmp_path, layout)
    edit(tmp_path, lambda c, t: ({k: v for k, v in c.items() if k not in VARIANTS}, t))
    assert read_eagle3(tmp_path, TARGET, CONVENTION["vllm"]).config.variants == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eagle_config": ["x"]}, "eagle_config is no object"),
        ({"transformer_layer_config": "llama"}, "transformer_layer_config is no object"),
        ({"eagle_aux_hidden_state_layer_ids": 3}, "is 3, a list of layers"),
        ({"eagle_aux_hidden_state_layer_ids": ["a"]}, "a list of layers"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, a whole number above 0"),
        ({"head_dim": -8}, "head_dim is -8, a whole number above 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0, a whole number above 0"),
        ({"draft_vocab_size": 60}, "draft_vocab_size is 60, but its head has 61 rows"),
        ({"draft_vocab_size": "all"}, "draft_vocab_size is 'all', but its head has 61 rows"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_act": "gelu"}, "hidden_act to 'gelu', silu is needed"),
        ({"eagle_config": {"eh_proj_before_attn": True}}, "sets eh_proj_before_attn, a form"),
        ({"fc_norm": "yes"}, "fc_norm is 'yes', not true or false"),
        ({"fc_norm": True, "norm_before_fc": True, "eagle_config": {}}, "exclude each other"),
        ({"norm_before_fc": True, "eagle_config": {}}, r"Missing: input_norm\.weight"),
        ({"vocab_size": 99}, "another target: its vocab_size is 99, the target's is 61"),
        ({"target_hidden_size": 64}, "another target: its target_hidden_size is 64"),
        ({"model_type": "slimspec"}, "a drafter of ours already; use it with --drafter"),
    ],
)
def test_a_config_that_cannot_be_is_one_sentence(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    published(tmp_path)
    edit(tmp_path, lambda c, t: (c | change, t))
    with pytest.raises(UsageError, match=words):
        read_eagle3(tmp_path, TARGET, "input")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("fc.weight", torch.zeros(32, 96, dtype=torch.int8), "fc.weight is torch.int8"),
        ("fc.weight", torch.zeros(32, 96).to(torch.float8_e5m2), "fc.weight is torch.float8_e5m2"),
        (
            "fc.weight",
            torch.full((32, 96), torch.inf),
            r"fc\.weight holds values that are not finite",
        ),
        (
            "lm_head.weight",
            torch.full((61, 32), torch.nan),
            r"lm_head\.weight holds values that are",
        ),
        ("d2t", torch.zeros(4, 4, dtype=torch.int64), "d2t is torch.int64"),
        ("d2t", torch.zeros(20), "d2t is torch.float32"),
        ("fc.weight", torch.zeros(32, 128), r"\[32, 128\], but 3 taps of this target are 96 wide"),
        ("lm_head.weight", torch.zeros(60, 32), "draft_vocab_size is 61, but its head has 60 rows"),
        ("lm_head.weight", torch.zeros(61, 30), r"\[61, 30\], the config needs \[61, 32\]"),
        (
            "d2t",
            torch.zeros(20, dtype=torch.int64),
            "d2t names 20 tokens, but the head has 61 rows",
        ),
        ("t2d", torch.arange(61) < 20, "t2d marks 20 of 61 tokens, not those 61 of 61"),
    ],
)
def test_tensors_that_cannot_be_are_one_sentence(
    name: str, value: torch.Tensor, words: str, tmp_path: Path
) -> None:
    published(tmp_path)
    edit(tmp_path, lambda c, t: (c, t | {name: value}))
    with pytest.raises(UsageError, match=words):
        read_eagle3(tmp_path, TARGET, "input")


def test_layer_ids_without_a_convention_are_refused(tmp_path: Path) -> None:
    published(tmp_path)
    with pytest.raises(UsageError, match="say --tap-ids input"):
        read_eagle3(tmp_path, TARGET, None)


def test_what_belongs_to_another_target_or_is_incomplete_is_refused(tmp_path: Path) -> None:
    published(tmp_path)
    edit(tmp_path, lambda c, t: (c, t | {"embed_tokens.weight": torch.randn(VOCAB, 24)}))
    with pytest.raises(UsageError, match=r"embed_tokens\.weight has shape \[61, 24\].*\[61, 32\]"):
        read_eagle3(tmp_path, TARGET, "input")
    edit(
        tmp_path,
        lambda c, t: (c, {n: x for n, x in t.items() if "embed" not in n and n != "fc.weight"}),
    )
    with pytest.raises(UsageError, match=r"Missing: fc\.weight"):
        read_eagle3(tmp_path, TARGET, "input")
    edit(tmp_path, lambda c, t: ({k: v for k, v in c.items() if k != "hidden_size"}, t))
    with pytest.raises(UsageError, match="hidden_size is None, a whole number"):
        read_eagle3(tmp_path, TARGET, "input")


def test_a_vocabulary_without_the_end_of_a_text_is_refused(tmp_path: Path) -> None:
    published(tmp_path, head="truncated", draft_vocab_size=20)
    # 2 becomes 3
    edit(tmp_path, lambda c, t: (c, t | {"d2t": t["d2t"] + 1, "t2d": t["t2d"].roll(1)}))
    with pytest.raises(UsageError, match="lacks token 2, which ends a text"):
        read_eagle3(tmp_path, TARGET, "input")


def without_head(config: Any, tensors: Any) -> Any:
    return config, {name: t for name, t in tensors.items() if name != "lm_head.weight"}


def test_a_reduced_vocabulary_without_its_head_is_not_a_full_one(tmp_path: Path) -> None:
    published(tmp_path, head="truncated", draft_vocab_size=20)
    edit(tmp_path, without_head)
    with pytest.raises(
        UsageError, match="draft_vocab_size is 20, but the target's head, for there"
    ):
        read_eagle3(tmp_path, TARGET, "input")
    edit(tmp_path, lambda c, t: (c | {"draft_vocab_size": None}, t))
    with pytest.raises(UsageError, match=r"d2t names 20 tokens, .* its lm_head\.weight is missing"):
        read_eagle3(tmp_path, TARGET, "input")


def test_a_reordered_vocabulary_without_its_head_is_refused(tmp_path: Path) -> None:
    published(tmp_path)
    edit(tmp_path, without_head)
    swapped = torch.zeros(VOCAB, dtype=torch.int64)
    swapped[0], swapped[1] = 1, -1
    edit(tmp_path, lambda c, t: (c, t | {"d2t": swapped}))
    with pytest.raises(
        UsageError, match="d2t reorders the tokens of a head that is not in the file"
    ):
        read_eagle3(tmp_path, TARGET, "input")


def test_maps_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    published(tmp_path, head="truncated", draft_vocab_size=20)
    edit(tmp_path, lambda c, t: (c, t | {"t2d": t["t2d"].roll(1)}))
    with pytest.raises(UsageError, match="t2d marks 20 of 61 tokens, not those 20 of 61 that d2t"):
        read_eagle3(tmp_path, TARGET, "input")
