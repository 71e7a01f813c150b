"""`doctor` and `version`: what this machine has."""

from __future__ import annotations

from pipeline.commands import options as o
from pipeline.output import print_json, print_tables, print_text


def doctor(as_json: o.Json = False) -> None:
    """Say which backends this machine can use and what is missing. Exit code 3 if none works.

    \b
    Examples:
      pipeline doctor
      pipeline doctor --json
    """
    from pipeline.doctor import examine, require_usable
    from pipeline.tables import doctor_tables

    report = examine()
    if as_json:
        print_json(report.to_json())
    else:
        print_tables(*doctor_tables(report))
        for problem in report.problems:
            print_text(f"problem: {problem}")
    require_usable(report)


def version(as_json: o.Json = False) -> None:
    """Print the version.

    \b
    Example:
      pipeline version --json
    """
    from drafter import __version__
    from pipeline.machine import versions

    if as_json:
        print_json(versions())
    else:
        print_text(f"slimspec {__version__}")
