"""Artifacts: written whole or not at all, and refused when anything about them is wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from drafter import artifact
from drafter.artifact import MANIFEST, fingerprint, is_up_to_date, read_artifact, write_artifact
from drafter.disk import atomic_write_json
from drafter.errors import MissingError, UsageError

INPUTS = {"target": "a" * 64}
ARGUMENTS = {"opset": 23, "taps": (2, 4, 5)}


def write(folder: Path, text: str = "weights", **changes: Any) -> None:
    given: dict[str, Any] = {"kind": "graphs", "inputs": INPUTS, "arguments": ARGUMENTS} | changes
    with write_artifact(
        folder, given["kind"], "tiny", given["inputs"], given["arguments"], {"layers": 8}
    ) as temporary:
        (temporary / "model.bin").write_text(text)
        (temporary / "sub").mkdir()
        (temporary / "sub" / "empty.json").write_text("")


def test_what_was_written_can_be_read_by_others(tmp_path: Path) -> None:
    """Some libraries write files that only their owner may read."""
    with write_artifact(tmp_path / "out", "graphs", "tiny", {}, {}, {}) as temporary:
        (temporary / "sub").mkdir(mode=0o700)
        (temporary / "sub" / "model.bin").touch(mode=0o600)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes == {MANIFEST: 0o644, "sub": 0o755, "model.bin": 0o644}


def edit_manifest(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / MANIFEST).read_text()) | changes
    (folder / MANIFEST).write_text(json.dumps(content))


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "out")
    manifest = read_artifact(tmp_path / "out", "graphs")
    assert (manifest.kind, manifest.name, manifest.schema_version) == ("graphs", "tiny", 1)
    assert manifest.inputs == INPUTS
    assert manifest.arguments == {"opset": 23, "taps": [2, 4, 5]}
    assert manifest.data == {"layers": 8}
    assert {name: record.bytes for name, record in manifest.files.items()} == {
        "model.bin": 7,
        "sub/empty.json": 0,
    }
    assert manifest.versions["torch"]
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["schema"] == 1
    assert os.listdir(tmp_path) == ["out"]


def test_up_to_date_means_same_inputs_arguments_and_intact_files(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert not is_up_to_date(folder, "graphs", INPUTS, ARGUMENTS)
    write(folder)
    assert is_up_to_date(folder, "graphs", INPUTS, ARGUMENTS)
    assert not is_up_to_date(folder, "graphs", {"target": "b" * 64}, ARGUMENTS)
    assert not is_up_to_date(folder, "graphs", INPUTS, ARGUMENTS | {"opset": 24})
    assert not is_up_to_date(folder, "engine", INPUTS, ARGUMENTS)
    (folder / "model.bin").write_text("WEIGHTS")
    assert not is_up_to_date(folder, "graphs", INPUTS, ARGUMENTS)
    assert is_up_to_date(folder, "graphs", INPUTS, ARGUMENTS, verify="size")


def test_fingerprint_depends_on_contents_and_not_on_time_or_place(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    write(tmp_path / "c", "other weights")
    write(tmp_path / "d", arguments={"opset": 24})
    a, b, c, d = (fingerprint(read_artifact(tmp_path / name, "graphs")) for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


def test_a_rewrite_replaces_the_old_artifact(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / "stray.txt").write_text("from another day")
    write(tmp_path / "out", "new weights")
    assert (tmp_path / "out" / "model.bin").read_text() == "new weights"
    assert not (tmp_path / "out" / "stray.txt").exists()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("stop", [ValueError("bug"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_artifact_and_nothing_else(
    tmp_path: Path, stop: BaseException
) -> None:
    write(tmp_path / "out", "old")

    def interrupted() -> None:
        with write_artifact(tmp_path / "out", "graphs", "tiny", {}, {}, {}) as temporary:
            (temporary / "model.bin").write_text("half")
            raise stop

    with pytest.raises(type(stop)):
        interrupted()
    assert os.listdir(tmp_path) == ["out"]
    read_artifact(tmp_path / "out", "graphs")
    assert (tmp_path / "out" / "model.bin").read_text() == "old"


KILLED_WRITER = """
    import os, signal, sys
    from drafter import artifact
    if sys.argv[2] == "between renames":
        flush = artifact.Path.rename
        def rename(self, target):
            if ".new-" in self.name:
                os.kill(os.getpid(), signal.SIGKILL)
            return flush(self, target)
        artifact.Path.rename = rename
    with artifact.write_artifact(sys.argv[1], "graphs", "tiny", {}, {}, {}) as temporary:
        (temporary / "model.bin").write_text("half")
        if sys.argv[2] == "while writing":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["while writing", "between renames"])
def test_leftovers_of_a_killed_run_go_with_the_next_write(tmp_path: Path, moment: str) -> None:
    write(tmp_path / "out", "old")
    program = textwrap.dedent(KILLED_WRITER)
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out"), moment],
        check=False,
        cwd=Path(artifact.__file__).parent.parent,
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    with (
        pytest.raises(ValueError, match="stopped again"),
        write_artifact(tmp_path / "out", "graphs", "tiny", {}, {}, {}),
    ):
        raise ValueError("stopped again")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.bin").read_text() == "old"


def test_a_live_writer_is_not_a_leftover(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "out", "graphs", "tiny", {}, {}, {}) as temporary:
        write(tmp_path / "out", "the faster one")
        assert temporary.is_dir()
        (temporary / "model.bin").write_text("the slower one")
    assert (tmp_path / "out" / "model.bin").read_text() == "the slower one"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="holds no artifact"):
        write(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    write(tmp_path / "out", kind="engine")
    with pytest.raises(UsageError, match="kind 'engine', not one of kind 'graphs'"):
        write(tmp_path / "out")
    read_artifact(tmp_path / "out", "engine")


def kinds() -> list[str]:
    """Every kind of artifact that the project's modules name."""
    root = Path(artifact.__file__).parents[1]
    floors = ("drafter", "export", "engines", "runtime", "pipeline")
    sources = [path.read_text() for floor in floors for path in (root / floor).rglob("*.py")]
    named = re.compile(r'^(?:[A-Z]+_)?KIND = "(.+)"$', re.MULTILINE)
    return sorted({kind for source in sources for kind in named.findall(source)})


def test_the_kinds_are_found() -> None:
    assert {"corpus", "drafter", "eagle3", "engine", "export", "target"} <= {*kinds()}


@pytest.mark.parametrize("kind", kinds())
def test_a_damaged_artifact_of_ours_is_mended_by_writing_it_again(
    tmp_path: Path, kind: str
) -> None:
    write(tmp_path / "out", kind=kind)
    written = (tmp_path / "out" / MANIFEST).read_text()
    (tmp_path / "out" / MANIFEST).write_text(written[: len(written) // 2])
    write(tmp_path / "out", kind=kind)
    read_artifact(tmp_path / "out", kind)


@pytest.mark.parametrize(
    "manifest",
    [
        b"{ // of a web page\n}",
        b'{"name": "My site", "icons": [],}',
        b"\xff\xfe",
        b"",
        b'{"kind": "graphs"}',
        b'{"schema": 1, "kind": "engine", ',
    ],
)
def test_a_manifest_of_somebody_else_is_not_taken_for_a_damaged_one(
    tmp_path: Path, manifest: bytes
) -> None:
    (tmp_path / MANIFEST).write_bytes(manifest)
    (tmp_path / "index.html").write_text("my site")
    with pytest.raises(UsageError, match="remove it or choose another --out"):
        write(tmp_path)
    assert (tmp_path / "index.html").read_text() == "my site"


TAMPERINGS = {
    "folder": (lambda f: f.rename(f.with_name("elsewhere")), "out does not exist"),
    "manifest": (lambda f: (f / MANIFEST).unlink(), "has no manifest.json"),
    "truncated": (lambda f: (f / MANIFEST).write_text('{"schema"'), "not readable JSON"),
    "list": (lambda f: (f / MANIFEST).write_text("[]"), "holds list, a JSON object is needed"),
    "bytes": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "not readable JSON"),
    "schema": (lambda f: edit_manifest(f, schema=2), "field 'schema' is 2, 1 is needed"),
    "kind": (lambda f: edit_manifest(f, kind="e"), "field 'kind' is 'e', 'graphs' is needed"),
    "unknown key": (lambda f: edit_manifest(f, colour="red"), "field 'colour' is 'red'"),
    "wrong type": (lambda f: edit_manifest(f, inputs=[1]), "field 'inputs' is"),
    "outside": (
        lambda f: edit_manifest(f, files={"../x": {"sha256": "0", "bytes": 0}}),
        "'../x', which lies outside",
    ),
    "file gone": (lambda f: (f / "model.bin").unlink(), "model.bin is missing"),
    "size": (lambda f: (f / "model.bin").write_text("w"), "has 1 bytes, but .* says 7"),
    "content": (lambda f: (f / "model.bin").write_text("WEIGHTS"), "has sha256 .* says"),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_a_wrong_artifact_is_refused_with_the_command_that_mends_it(
    tmp_path: Path, what: str
) -> None:
    write(tmp_path / "out")
    tamper, message = TAMPERINGS[what]
    tamper(tmp_path / "out")
    with pytest.raises(UsageError, match=message) as caught:
        read_artifact(tmp_path / "out", "graphs", mend="pipeline export")
    assert str(caught.value).endswith("run `pipeline export`")
    assert caught.value.exit_code == 2


def test_verify_size_skips_only_the_hashes(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / "model.bin").write_text("WEIGHTS")
    read_artifact(tmp_path / "out", "graphs", verify="size")
    (tmp_path / "out" / "model.bin").write_text("w")
    with pytest.raises(UsageError, match="has 1 bytes"):
        read_artifact(tmp_path / "out", "graphs", verify="size")
    read_artifact(tmp_path / "out", "graphs", verify=False)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_clear_sentence(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(artifact, "flush", full)
    with pytest.raises(MissingError, match=r"the disk is full: cannot write .*out.* MB are free"):
        write(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_space_known_to_be_needed_is_checked_first(tmp_path: Path) -> None:
    with (
        pytest.raises(MissingError, match=r"1000000000000000.0 MB are needed") as caught,
        write_artifact(tmp_path / "out", "graphs", "tiny", {}, {}, {}, needed_bytes=10**21),
    ):
        pytest.fail("the body must not run")
    assert caught.value.exit_code == 3
    assert os.listdir(tmp_path) == []


def test_json_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "report.json"
    atomic_write_json(path, {"text": "naïve"})
    assert json.loads(path.read_text()) == {"text": "naïve"}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MissingError, match="the disk is full"):
        atomic_write_json(path, {"text": "new"})
    assert json.loads(path.read_text()) == {"text": "naïve"}
    assert os.listdir(path.parent) == ["report.json"]


def test_json_refuses_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        atomic_write_json(tmp_path / "report.json", {"speedup": float("nan")})
    assert os.listdir(tmp_path) == []
