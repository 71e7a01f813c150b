"""The export stage: an artifact that is made once, and pairs that do not fit refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from drafter.artifact import read_artifact
from drafter.errors import UsageError
from export.files import KIND, copy_tokenizer, folder_fingerprint
from export.model import export_model
from tests.export.conftest import Exported
from tests.tiny_families import Pair, write_drafter, write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A target and its drafter; read only."""
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def own_pair(pair: Pair, tmp_path: Path) -> Pair:
    """A copy of the pair that a test may damage."""
    return Pair(
        *(shutil.copytree(path, tmp_path / name) for path, name in zip(pair, "td", strict=True))
    )


def edit_json(path: Path, **changes: object) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(pair: Pair, out: Path) -> str:
    """The message with which this pair is refused; nothing may be left behind."""
    with pytest.raises(UsageError) as error:
        export_model(pair.target, pair.drafter, out)
    assert not list(out.parent.glob("*export*"))
    return str(error.value)


def test_an_export_is_a_complete_artifact(exported: Exported) -> None:
    assert exported.manifest == read_artifact(exported.folder, KIND)
    assert set(exported.manifest.files) == {
        *("target.onnx", "drafter_extend.onnx", "drafter_step.onnx", "weights.bin"),
        *("tokenizer.json", "chat_template.jinja"),
    }
    assert exported.manifest.name == "tiny"
    assert exported.manifest.inputs == {
        "target": folder_fingerprint(exported.pair.target),
        "drafter": folder_fingerprint(exported.pair.drafter),
    }
    shares = [share for _, share in exported.told]
    assert shares == sorted(shares)
    assert exported.told[-1] == ("exported", 1.0)


def test_an_unchanged_export_is_not_made_again(exported: Exported) -> None:
    before = (exported.folder / "weights.bin").stat().st_mtime_ns
    told: list[str] = []
    again = export_model(
        *exported.pair, exported.folder, name="tiny", progress=lambda what, _: told.append(what)
    )
    assert again == exported.manifest
    assert told[-1] == "up to date"
    assert (exported.folder / "weights.bin").stat().st_mtime_ns == before


def test_changed_weights_change_the_fingerprint(own_pair: Pair) -> None:
    before = folder_fingerprint(own_pair.drafter)
    weights = own_pair.drafter / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert folder_fingerprint(own_pair.drafter) != before


def test_a_drafter_of_another_vocabulary_is_refused(own_pair: Pair, tmp_path: Path) -> None:
    edit_json(own_pair.drafter / "config.json", vocab_size=999)
    message = refused(own_pair, tmp_path / "export")
    assert "vocab_size is 999" in message
    assert "pipeline train" in message


def test_a_drafter_of_another_tokenizer_is_refused(pair: Pair, tmp_path: Path) -> None:
    other = write_drafter(tmp_path / "other", pair.target, tokenizer_sha256="0" * 64)
    message = refused(Pair(pair.target, other), tmp_path / "export")
    assert "another tokenizer" in message
    assert "000000000000" in message


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(own_pair: Pair, tmp_path: Path) -> None:
    for path in own_pair:
        edit_json(path / "config.json", vocab_size=300)
    message = refused(own_pair, tmp_path / "export")
    assert "the target's vocabulary only 300" in message


def test_a_missing_or_damaged_tokenizer_is_refused(own_pair: Pair, tmp_path: Path) -> None:
    edit_json(own_pair.drafter / "config.json", tokenizer_sha256=None)
    path = own_pair.target / "tokenizer.json"
    path.write_text("{}")
    assert "not a readable tokenizer" in refused(own_pair, tmp_path / "export")
    path.unlink()
    assert "has no tokenizer.json" in refused(own_pair, tmp_path / "export")


def test_a_tap_out_of_range_is_refused(own_pair: Pair, tmp_path: Path) -> None:
    edit_json(own_pair.drafter / "config.json", taps=[0, 1, 5])
    assert "tap id 5 is out of range" in refused(own_pair, tmp_path / "export")


@pytest.mark.parametrize("part", [0, 1])
def test_truncated_weights_are_refused(own_pair: Pair, tmp_path: Path, part: int) -> None:
    path = own_pair[part] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(own_pair, tmp_path / "export")
    assert "model.safetensors cannot be read as safetensors" in message


def test_only_tokenizer_files_that_exist_are_copied(tmp_path: Path) -> None:
    source, destination = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    destination.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "config.json").write_text("{}")
    copy_tokenizer(source, destination)
    assert [path.name for path in destination.iterdir()] == ["tokenizer.json"]
