"""Reports on standard output and in files."""

from __future__ import annotations

import io
import json
import os
import tempfile
import threading
from pathlib import Path

import pytest

from drafter.errors import MissingError, UsageError
from pipeline.output import check_writable, write_json, write_lines
from pipeline.reports import CheckRow, ParityReport


def test_a_parity_error_that_is_no_number_is_null(tmp_path: Path) -> None:
    row = CheckRow(
        graph="target",
        tensor="logits",
        max_abs=float("nan"),
        max_rel=float("inf"),
        topk_agreement=0.5,
        ok=False,
        case="tree",
        against="engine",
    )
    report = ParityReport(engine="e", ok=False, first_divergence="logits", parity=[row])
    write_json(tmp_path / "report.json", report.to_json())
    (found,) = json.loads((tmp_path / "report.json").read_text())["parity"]
    assert (found["max_abs"], found["max_rel"], found["topk_agreement"]) == (None, None, 0.5)


def test_a_folder_without_write_permission_is_refused_early() -> None:
    """As another user where this one is root, whom no permission stops."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        user = os.geteuid()
        os.seteuid(65534 if user == 0 else user)
        try:
            with pytest.raises(UsageError, match="you may not write to"):
                check_writable(folder / "new" / "report.json")
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


def test_a_file_is_written_whole_into_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_json(path, {"text": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "é"}
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"ratio": float("nan")})
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_full_device_is_a_missing_error() -> None:
    with pytest.raises(MissingError, match="disk is full"):
        write_lines(Path("/dev/full"), [{"prompt": "x"}])


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = io.StringIO()
    reader = threading.Thread(target=lambda: read.write(pipe.read_text()))
    reader.start()
    write_json(pipe, [1, 2])
    reader.join(10)
    assert json.loads(read.getvalue()) == [1, 2]
    assert pipe.is_fifo()


@pytest.mark.parametrize("name", ["", "file/report.json"])
def test_a_place_that_cannot_be_written_is_refused_early(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        check_writable(tmp_path / name)
