"""Results: JSON and tables on standard output, JSON into files. Nothing else writes there."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from drafter.disk import disk_full_as_error
from drafter.errors import UsageError
from pipeline.reports import ArtifactReport

_WIDTH = 100  # of tables that do not go to a terminal


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def print_text(text: str) -> None:
    """A line on standard output."""
    sys.stdout.write(text + "\n")


def print_artifact(report: ArtifactReport, as_json: bool) -> None:
    """A stage's artifact: its folder, or all that is known of it as JSON."""
    if as_json:
        print_json(report.to_json())
    else:
        print_text(report.path)


def print_tables(*tables: RenderableType) -> None:
    """Tables on standard output."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    for table in tables:
        console.print(table)


def check_writable(path: Path) -> None:
    """Refuse early what `write_json` could not write later. Raises UsageError."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; a file name is needed for the JSON report.")
    parent = path.resolve().parent
    existing = next(p for p in (parent, *parent.parents) if p.exists())
    if not existing.is_dir():
        raise UsageError(f"{path} cannot be written: {existing} is not a folder.")
    place = path if path.exists() and not path.is_file() else existing  # a device or pipe, as it is
    if not os.access(place, os.W_OK, effective_ids=True):
        raise UsageError(f"{path} cannot be written: you may not write to {place}.")


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file, whole or not at all; a device or pipe is written as it is."""
    _write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_lines(path: Path, values: Sequence[Any]) -> None:
    """The same for JSON Lines."""
    lines = [json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values]
    _write(path, "".join(lines))


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    _write(path, text)


def _write(path: Path, text: str) -> None:
    device = path.exists() and not path.is_file()
    partial = path if device else path.with_name(f".{path.name}.partial")
    with disk_full_as_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            if not device:
                partial.replace(path)
        except BaseException:
            if not device:
                partial.unlink(missing_ok=True)
            raise
