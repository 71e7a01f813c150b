"""Run the command line, in this process or in its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

from pipeline.cli import main


class Result(NamedTuple):
    """Exit code and what was printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON value."""
        return json.loads(self.out)

    @property
    def last_line(self) -> str:
        """The last line of standard error."""
        lines = self.err.splitlines()
        return lines[-1] if lines else ""


def run_command(*args: object) -> Result:
    """`pipeline ARGS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(arg) for arg in args])
    return Result(code, out.getvalue(), err.getvalue())


def command_line(*args: object) -> list[str]:
    """`pipeline ARGS` as a process of its own."""
    return [sys.executable, "-m", "pipeline", *map(str, args)]


def run_process(*args: object, **more: Any) -> Result:
    """`pipeline ARGS` in a process of its own, with this process's environment."""
    stdout = more.pop("stdout", subprocess.PIPE)
    done = subprocess.run(
        command_line(*args), stdout=stdout, stderr=subprocess.PIPE, check=False, **more
    )
    shown = (done.stdout or b"").decode("utf-8")
    return Result(done.returncode, shown, done.stderr.decode("utf-8"))


def assert_refused(result: Result, code: int, *words: str) -> None:
    """One sentence on standard error that holds all `words`, this exit code, no result."""
    assert result.code == code, result.err
    assert result.out == ""
    assert result.last_line.startswith("error: "), result.err
    assert result.err.count("error: ") == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.last_line, result.last_line


def environment(**more: str) -> dict[str, str]:
    """This process's environment with changes."""
    return {**os.environ, **more}
