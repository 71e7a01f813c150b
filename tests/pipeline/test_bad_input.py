"""Every mistake a user can make ends in one sentence, an exit code, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from drafter import artifact
from tests.pipeline.command import assert_refused, run_command, run_process
from tests.pipeline.conftest import Built

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def target(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny target that a test may damage."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "target"))


@pytest.fixture
def drafter(tiny_drafter_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny drafter that a test may damage."""
    return Path(shutil.copytree(tiny_drafter_dir, tmp_path / "drafter"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def swap_tokens(path: Path) -> None:
    """Give the ids of two tokens to each other: another vocabulary of the same size."""
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))


def bare_drafter(drafter: Path, **changes: object) -> None:
    """Turn the artifact into a plain checkpoint folder, without hashes, and edit its config."""
    (drafter / "manifest.json").unlink()
    edit_json(drafter / "config.json", **changes)


def truncated_drafter(drafter: Path) -> None:
    bare_drafter(drafter)
    truncate(drafter / "model.safetensors")


Damage = Callable[[Path, Path], object]
EXPORT_MISTAKES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "wrong model family": (
        lambda target, _: edit_json(target / "config.json", model_type="gpt2"),
        ("'gpt2'", "llama"),
    ),
    "unsupported position rule": (
        lambda target, _: edit_json(target / "config.json", rope_parameters={"rope_type": "yarn"}),
        ("'yarn'",),
    ),
    "config that is not JSON": (
        lambda target, _: (target / "config.json").write_text("{"),
        ("config.json", "JSON"),
    ),
    "tokenizer missing": (
        lambda target, _: (target / "tokenizer.json").unlink(),
        ("tokenizer.json",),
    ),
    "truncated target weights": (
        lambda target, _: truncate(target / "model.safetensors"),
        ("model.safetensors", "damaged"),
    ),
    "weights that do not fit the config": (
        lambda target, _: edit_json(target / "config.json", intermediate_size=48),
        ("shape", "48"),
    ),
    "another tokenizer": (
        lambda target, _: swap_tokens(target / "tokenizer.json"),
        ("tokenizer", "sha256"),
    ),
    "another vocabulary": (
        lambda _, drafter: bare_drafter(drafter, vocab_size=300),
        ("vocab_size", "300", "320"),
    ),
    "another depth": (
        lambda _, drafter: bare_drafter(drafter, target_layers=9),
        ("target_layers", "9", "8"),
    ),
    "drafter weights tampered with": (
        lambda _, drafter: flip_last_byte(drafter / "model.safetensors"),
        ("model.safetensors", "sha256"),
    ),
    "drafter manifest tampered with": (
        lambda _, drafter: edit_json(drafter / "manifest.json", kind="engine"),
        ("kind", "'engine'", "'drafter'"),
    ),
    "truncated drafter weights": (
        lambda _, drafter: truncated_drafter(drafter),
        ("model.safetensors", "damaged"),
    ),
    "rank above the hidden size": (
        lambda _, drafter: bare_drafter(drafter, lm_head_rank=33),
        ("33", "32"),
    ),
    "tap out of range": (
        lambda _, drafter: bare_drafter(drafter, taps=[2, 4, 8]),
        ("tap id 8", "8 layers"),
    ),
}


@pytest.mark.parametrize("mistake", EXPORT_MISTAKES)
def test_a_bad_target_or_drafter_is_not_exported(
    mistake: str, cache: Path, target: Path, drafter: Path, tmp_path: Path
) -> None:
    damage, words = EXPORT_MISTAKES[mistake]
    damage(target, drafter)
    out = tmp_path / "out" / "export"
    result = run_command("export", f"--target={target}", f"--drafter={drafter}", f"--out={out}")
    assert_refused(result, 2, *words)
    assert not out.exists()
    assert not out.parent.exists() or not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("weights.bin", truncate),
        ("weights.bin", flip_last_byte),
        ("target.onnx", flip_last_byte),
        ("drafter_step.onnx", truncate),
        ("manifest.json", truncate),
    ],
)
def test_a_damaged_export_is_not_built(
    built_cache: Path, tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    export = Path(shutil.copytree(next(built_cache.glob("workspace/*/export")), tmp_path / "x"))
    damage(export / file)
    out = tmp_path / "out" / "engine"
    result = run_command("build-engine", f"--export={export}", f"--out={out}")
    assert_refused(result, 2, file, "pipeline export")
    assert not out.exists()


@pytest.mark.parametrize("damage", [truncate, flip_last_byte])
def test_building_again_mends_a_damaged_engine(
    built: Built, cache: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Also where only a hash differs: the command that an error names must help."""
    (workspace,) = (path.parent for path in built.cache.glob("workspace/*/export"))
    engine = Path(shutil.copytree(next(workspace.glob("engine-*")), tmp_path / "engine"))
    damage(engine / "weights.bin")
    build = ("build-engine", f"--export={workspace / 'export'}", f"--out={engine}", "--json")
    mended = run_command(*build)
    assert mended.code == 0, mended.err
    assert mended.json["up_to_date"] is False
    assert "made anew" in mended.err
    assert run_command("generate", f"--engine={engine}", "--prompt=Hi", "--max-tokens=2").code == 0


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("weights.bin", truncate, ("weights.bin", "bytes")),
        ("weights.bin", flip_last_byte, ("weights.bin", "sha256")),
        ("target.onnx", truncate, ("target.onnx",)),
        ("manifest.json", truncate, ("manifest.json",)),
        ("tokenizer.json", Path.unlink, ("tokenizer.json", "missing")),
    ],
)
def test_a_damaged_engine_does_not_generate(
    built_cache: Path,
    tmp_path: Path,
    file: str,
    damage: Callable[[Path], None],
    words: tuple[str, ...],
) -> None:
    engine = Path(shutil.copytree(next(built_cache.glob("workspace/*/engine-*")), tmp_path / "e"))
    damage(engine / file)
    result = run_command("generate", f"--engine={engine}", "--prompt=Hello")
    assert_refused(result, 2, *words, "pipeline build-engine")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt="], ("prompt is empty",)),
        (["--prompt= \n"], ("prompt is empty",)),
        ([], ("no prompt",)),
        (["--prompt=Hi", "--budget=0"], ("budget", "0")),
        (["--prompt=Hi", "--depth=-1"], ("depth", "-1")),
        (["--prompt=Hi", "--width=17"], ("width", "17", "16")),
        (["--prompt=Hi", "--max-tokens=0"], ("max-tokens", "0")),
        (["--prompt=Hi", "--temperature=-1"], ("temperature", "-1")),
        (["--prompt=Hi", "--top-p=0"], ("--top-p", "0")),
        (["--prompt=Hi", "--stop="], ("stop string",)),
        (["--prompt=Hi", "--threads=0"], ("threads", "0")),
        (["--prompt=" + "x y " * 600], ("tokens", "512")),
        (["--prompt=Hi", "--raw", "--system=Be brief"], ("--system", "--raw")),
        (["--prompt=Hi", "--engine=/nowhere"], ("/nowhere", "does not exist")),
    ],
)
def test_generate_refuses(built_cache: Path, arguments: list[str], words: tuple[str, ...]) -> None:
    assert_refused(run_command("generate", *arguments), 2, *words)


@pytest.mark.parametrize(
    ("option", "words"),
    [(b"--stop=\xff", ("stop string", "UTF-8")), (b"--prompt=\xff", ("Unicode",))],
)
def test_arguments_that_are_not_utf8_are_refused(
    built_cache: Path, option: bytes, words: tuple[str, ...]
) -> None:
    """As Python decodes such arguments, with surrogates."""
    arguments = ["--prompt=Hi", os.fsdecode(option)]
    assert_refused(run_command("generate", *arguments), 2, *words)


def test_standard_input_that_is_not_utf8_is_refused(built_cache: Path) -> None:
    result = run_process("generate", "--prompt=-", input=b"caf\xe9")
    assert_refused(result, 2, "standard input", "UTF-8")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", "--prompt=Hi"], 3, ("pipeline run",)),
        (["evaluate"], 3, ("pipeline run",)),
        (["serve"], 3, ("pipeline run",)),
        (["check"], 3, ("pipeline run",)),
        (["build-engine"], 3, ("pipeline export",)),
        (["build-engine", "--budget=0"], 2, ("budget",)),
        (["build-engine", "--export=/nowhere"], 2, ("/nowhere",)),
        (["run", "--budget=0"], 2, ("budget",)),
        (["run", "--prompts=0"], 2, ("prompts",)),
        (["run", "--prompts=81"], 2, ("81", "80")),
        (["run", "--smoke"], 3, ("smollm2-135m", "network")),
        (["run", "--json=/"], 2, ("folder",)),
        (["fetch", "--target=no-such-thing"], 2, ("no-such-thing",)),
        (["fetch", "--target=org/model"], 3, ("org/model",)),
        (["fetch"], 3, ("network",)),
        (["train", "--epochs=0"], 2, ("--epochs", "0")),
        (["train", "--loss=mse"], 2, ("--loss", "mse")),
        (["train", "--taps=1,x"], 2, ("--taps", "1,x")),
        (["corpus", "--temperatures=hot"], 2, ("--temperatures", "hot")),
        (["serve", "--port=99999"], 2, ("--port is 99999", "65535")),
        (["serve", "--request-timeout=0"], 2, ("--request-timeout is 0", "greater than 0")),
        (["serve", "--threads=0"], 2, ("--threads is 0",)),
        (["serve", "--api-key=two words"], 2, ("--api-key is wrong", "visible ASCII")),
        (["generate", "--prompt=Hi", "--top-p=0"], 2, ("--top-p is 0", "greater than 0")),
        (["generate", "--prompt=Hi", "--top-p=nan"], 2, ("--top-p is nan",)),
        (["generate", "--prompt=Hi", "--min-p=1.5"], 2, ("--min-p is 1.5", "1")),
        (["generate", "--prompt=Hi", "--top-k=-1"], 2, ("--top-k is -1", "0")),
        (["generate", "--prompt=Hi", "--threads=0"], 2, ("--threads is 0",)),
        (["fetch", "--offline", "--target=a--b/c"], 2, ("a--b/c", "Hugging Face id")),
        (["fetch", f"--target={'x' * 300}"], 2, ("is not known",)),
        (["fetch", f"--target={'x' * 300}.gguf"], 2, ("does not exist",)),
        (["corpus", "--temperatures=0,nan"], 2, ("--temperatures", "nan", "finite")),
        (["corpus", "--temperatures=-1"], 2, ("--temperatures", "-1", "0")),
        (["run", "--prompts=+-5"], 2, ("+-5",)),
    ],
)
def test_commands_refuse(
    cache: Path, arguments: list[str], code: int, words: tuple[str, ...]
) -> None:
    assert_refused(run_command(*arguments), code, *words)
    assert not list(cache.rglob("*.json"))


def test_more_prompts_than_there_are_are_refused_before_the_target_is_fetched(
    cache: Path,
) -> None:
    result = run_command("run", "--prompts=81")
    assert_refused(result, 2, "81", "80")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank=33"], ("33", "32")),
        (["--taps=2,4,8"], ("tap id 8",)),
        (["--rescore=3"], ("rescore", "3")),
        (["--head=fancy"], ("'fancy'",)),
        (["--variant=fancy"], ("'fancy'", "fc_norm")),
        (["--variant=fc_norm,norm_before_fc"], ("exclude each other",)),
        (["--head=dense", "--rank=8"], ("--rank", "dense")),
        (["--head-init=magic"], ("'magic'",)),
        (["--corpus=a", "--dialogues=b"], ("--corpus", "--dialogues")),
        ([], ("pipeline corpus",)),
        (["--dialogues=/nowhere.jsonl"], ("/nowhere.jsonl",)),
    ],
)
def test_train_refuses(
    cache: Path, tiny_llama_dir: Path, tmp_path: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    dialogues = tmp_path / "d.jsonl"
    dialogues.write_text('{"prompt_ids": [5, 6, 7, 8], "response_ids": [9, 10, 11, 12, 13]}\n' * 9)
    given = " ".join(arguments)
    if "--corpus" not in given and "--dialogues" not in given and arguments:
        arguments = [*arguments, f"--dialogues={dialogues}"]
    out = tmp_path / "out"
    result = run_command("train", f"--target={tiny_llama_dir}", f"--out={out}", *arguments)
    assert_refused(result, 2, *words)
    assert not out.exists()


def test_a_target_without_a_drafter_says_how_to_get_one(
    cache: Path, tiny_llama_dir: Path, prompt_file: Path
) -> None:
    result = run_command("run", f"--target={tiny_llama_dir}", f"--prompts={prompt_file}")
    assert_refused(result, 3, "pipeline train --target", str(tiny_llama_dir))


def test_a_full_disk_leaves_nothing_behind(
    cache: Path,
    tiny_llama_dir: Path,
    tiny_drafter_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda _: Usage(10, 10, 0))
    out = tmp_path / "out"
    result = run_command(
        "export", f"--target={tiny_llama_dir}", f"--drafter={tiny_drafter_dir}", f"--out={out}"
    )
    assert_refused(result, 3, "disk is full", str(tmp_path))
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_a_folder_of_somebody_else_is_never_replaced(
    cache: Path, tiny_llama_dir: Path, tiny_drafter_dir: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("words")
    result = run_command(
        "export", f"--target={tiny_llama_dir}", f"--drafter={tiny_drafter_dir}", f"--out={precious}"
    )
    assert_refused(result, 2, str(precious))
    assert (precious / "thesis.txt").read_text() == "words"
