"""Options that were given but would do nothing are refused, not passed over in silence."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import BaseModel

from drafter.errors import UsageError


def refuse_given(options: BaseModel, names: Collection[str], needs: str) -> None:
    """Raises UsageError for an option of `names` that was given: `--NAME {needs}; drop one.`"""
    if lost := options.model_fields_set & set(names):
        raise UsageError(f"--{option_name(options, min(lost))} {needs}; drop one.")


def option_name(options: BaseModel, field: str) -> str:
    """A field as the command line has it."""
    if field == "from_target" and not getattr(options, field):
        return "from-random"
    return field.replace("_", "-")
