"""Building and opening engine folders: made once, checked, and refused when they do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from drafter.artifact import fingerprint, read_artifact
from drafter.errors import CheckFailed, UsageError
from engines import BACKENDS, build_engines, open_engines
from engines.backends import Backend
from engines.base import DEFAULT_DRAWN_TREE, DEFAULT_TREE, KIND
from engines.cases import make_cases
from engines.onnxruntime_build import build_graphs
from export.files import KIND as EXPORT_KIND
from tests.engines.conftest import Source
from tests.engines.damage import edit_manifest, scale_weight, sign_again


@pytest.fixture
def own_engine(engine_dir: Path, tmp_path: Path) -> Path:
    """A copy of the engine folder that a test may damage."""
    return shutil.copytree(engine_dir, tmp_path / "engine")


def refused(folder: Path, **options: bool) -> str:
    """The message with which this folder is refused."""
    with pytest.raises(UsageError) as error:
        open_engines(folder, threads=1, **options)
    return str(error.value)


def test_an_engine_says_what_the_runtime_must_know(source: Source, engine_dir: Path) -> None:
    manifest = open_engines(engine_dir, threads=1).manifest
    assert (manifest.target, manifest.drafter) == source.configs
    assert manifest.taps == source.target.taps
    assert (manifest.backend, manifest.precision) == ("onnxruntime", "fp32")
    assert (manifest.top_k, manifest.vocab_size, manifest.max_context) == (24, 320, 128)
    assert manifest.folder == engine_dir.resolve()
    assert manifest.tree == DEFAULT_TREE
    assert manifest.drawn_tree == DEFAULT_DRAWN_TREE


def test_an_engine_is_an_artifact_of_its_export(source: Source, engine_dir: Path) -> None:
    manifest = read_artifact(engine_dir, KIND)
    assert manifest.inputs == {"export": fingerprint(read_artifact(source.export, EXPORT_KIND))}
    assert set(manifest.files) == {
        *("target.onnx", "drafter_extend.onnx", "drafter_step.onnx", "weights.bin"),
        *("tokenizer.json", "chat_template.jinja"),
    }


def test_an_unchanged_engine_is_not_built_again(source: Source, own_engine: Path) -> None:
    before = (own_engine / "weights.bin").stat().st_ino
    told: list[str] = []
    build_engines(source.export, own_engine, threads=1, progress=lambda what, _: told.append(what))
    assert told[-1] == "up to date"
    assert (own_engine / "weights.bin").stat().st_ino == before


@pytest.mark.parametrize("change", ["tree", "version"])
def test_an_engine_is_built_again_when_it_would_differ(
    source: Source, own_engine: Path, change: str
) -> None:
    tree = {"budget": 7} if change == "tree" else None
    if change == "version":
        edit_manifest(own_engine, **{"versions.onnxruntime": "0.1"})
    before = (own_engine / "weights.bin").stat().st_ino
    manifest = build_engines(source.export, own_engine, threads=1, tree=tree)
    expected = 7 if change == "tree" else DEFAULT_TREE["budget"]
    assert (own_engine / "weights.bin").stat().st_ino != before
    for kind in ("tree", "drawn_tree"):
        assert manifest.data[kind]["budget"] == expected  # type: ignore[index, call-overload]
    assert manifest.versions["onnxruntime"] != "0.1"


def test_the_torch_backend_answers_as_onnxruntime_does(
    source: Source, engine_dir: Path, tmp_path: Path
) -> None:
    build_engines(source.export, tmp_path / "torch", backend="torch")
    reference = open_engines(tmp_path / "torch", threads=1)
    other = open_engines(engine_dir, threads=1)
    assert reference.manifest.backend == "torch"
    for case in make_cases(reference.engines, *source.configs, batches=(1,), prefixes=(4,)):
        expected = reference.engines[case.graph].run(case.feeds)
        found = other.engines[case.graph].run(case.feeds)
        assert set(expected) == set(found)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=5e-4, rtol=5e-4)


def test_an_unknown_backend_or_precision_is_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Backend 'abacus' is unknown; known: onnxruntime, torch"):
        build_engines(source.export, tmp_path / "out", backend="abacus")
    with pytest.raises(UsageError, match="'int3' is unknown to backend onnxruntime; use fp32 or"):
        build_engines(source.export, tmp_path / "out", precision="int3")
    with pytest.raises(UsageError, match="'int8' is unknown to backend torch; use fp32"):
        build_engines(source.export, tmp_path / "out", backend="torch", precision="int8")


def test_a_tampered_export_is_not_built(source: Source, tmp_path: Path) -> None:
    export = shutil.copytree(source.export, tmp_path / "export")
    scale_weight(export, "target", "layers.0.mlp.up_proj.weight", 2.0)
    with pytest.raises(UsageError, match=r"weights\.bin has sha256 .* run `pipeline export`"):
        build_engines(export, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_backend_that_builds_a_wrong_engine_leaves_nothing(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_wrong(export: Path, out: Path, precision: str) -> None:
        build_graphs(export, out, precision)
        scale_weight(out, "target", "layers.1.self_attn.v_proj+k_proj+q_proj.weight", 1.01)

    right = BACKENDS["onnxruntime"]
    wrong = Backend(("fp32",), right.package, build_wrong, right.open)
    monkeypatch.setitem(BACKENDS, "wrong", wrong)
    with pytest.raises(CheckFailed, match=r"target, prefill, .*: new_key_1 is the first tensor"):
        build_engines(source.export, tmp_path / "out", backend="wrong", threads=1)
    assert not list(tmp_path.iterdir())


def test_a_truncated_engine_is_refused_at_once(own_engine: Path) -> None:
    path = own_engine / "weights.bin"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    assert "weights.bin has" in (message := refused(own_engine))
    assert "run `pipeline build-engine`" in message


def test_a_tampered_engine_is_refused_when_hashes_are_compared(own_engine: Path) -> None:
    scale_weight(own_engine, "target", "layers.0.mlp.gate_proj+up_proj.weight", 2.0)
    assert "weights.bin has sha256" in refused(own_engine, verify=True)


def test_a_damaged_graph_is_refused(own_engine: Path) -> None:
    graph = own_engine / "drafter_step.onnx"
    graph.write_bytes(graph.read_bytes()[:200])
    sign_again(own_engine)
    assert "drafter_step.onnx cannot be opened by ONNX Runtime" in refused(own_engine)


def test_a_graph_under_another_name_is_refused(own_engine: Path) -> None:
    shutil.copy(own_engine / "drafter_step.onnx", own_engine / "drafter_extend.onnx")
    sign_again(own_engine)
    assert "slimspec.graph is 'drafter_step', 'drafter_extend' is needed" in refused(own_engine)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("versions.onnxruntime", "1.0.0", "was built with onnxruntime 1.0.0, installed is"),
        ("arguments.contract", 0, "was built for graph contract 0, this version needs 1"),
        ("data.top_k", "many", r"data.top_k: .*integer"),
        ("data.backend", "abacus", "Backend 'abacus' is unknown"),
        ("kind", "export", "field 'kind' is 'export', 'engine' is needed"),
    ],
)
def test_an_engine_of_another_making_is_refused(
    own_engine: Path, field: str, value: object, message: str
) -> None:
    edit_manifest(own_engine, **{field: value})
    with pytest.raises(UsageError, match=message):
        open_engines(own_engine, threads=1)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "has no manifest.json" in refused(tmp_path)


def test_threads_below_one_are_refused(engine_dir: Path) -> None:
    with pytest.raises(UsageError, match="threads is 0; it must be at least 1"):
        open_engines(engine_dir, threads=0)
