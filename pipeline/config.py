"""Typed options of the commands: the one place of their defaults.

A value comes from the command line, else from `--config FILE` (JSON or TOML), else from here.
Unknown keys are refused, and a bad value is one sentence naming the option.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from drafter.errors import UsageError

DEFAULT_TARGET = "smollm2-135m"
SMOKE_TOKENS = 32


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TreeOptions(_Options):
    """Shape of the draft tree; None leaves what the engine was built with."""

    depth: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)
    budget: int | None = Field(None, ge=1)
    min_prob: float | None = Field(None, ge=0, lt=1)
    lookup: int | None = Field(None, ge=0)
    min_level: float | None = Field(None, ge=0, lt=1)

    def chosen(self) -> dict[str, Any]:
        """The values that were given."""
        given = {name: getattr(self, name) for name in TreeOptions.model_fields}
        return {name: value for name, value in given.items() if value is not None}


class BuildOptions(TreeOptions):
    """What `build-engine` needs besides an export. `threads` None: the physical cores."""

    backend: str = "onnxruntime"
    precision: str = "fp32"
    threads: int | None = Field(None, ge=1)


class DecodeOptions(_Options):
    """How a measurement decodes. `temperature` 0 is greedy."""

    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    seed: int = Field(0, ge=0)


class GenerateOptions(DecodeOptions):
    """How `pipeline generate` chooses tokens: `top_k` 0, `top_p` 1 and `min_p` 0 are off."""

    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    threads: int | None = Field(None, ge=1)


class CompareOptions(TreeOptions):
    """What drafters are compared in: `tree`s, whose values the tree options overrule; whether
    `plain` decoding is measured too; how many `seeds` a prompt has where tokens are drawn.
    """

    tree: tuple[Literal["default", "chain"], ...] = Field(("default",), min_length=1)
    plain: bool = True
    seeds: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)


class RunOptions(BuildOptions, DecodeOptions):
    """What `pipeline run` needs. `prompts` counts those of `prompt_set`, by default MT-Bench, or a
    few of our own for a smoke run; `prompt_file` replaces them.
    """

    target: str = DEFAULT_TARGET
    drafter: str | None = None
    out: Path | None = None
    prompts: int = Field(40, ge=1)
    prompt_set: str | None = None
    prompt_file: Path | None = None
    smoke: bool = False


class DrafterOptions(_Options):
    """Shape and start of the drafter that `pipeline train` makes.

    `rank` None is d/8; `taps` None are the target's default ones; `draft_vocab` None is a quarter
    of the vocabulary, for a truncated head; `variant` names some of `drafter.config.VARIANTS`. With
    `start`, a drafter to train on, shape and weights are that drafter's.
    """

    start: str | None = None
    head: str = "low_rank"
    rank: int | None = Field(None, ge=1)
    rescore: int = Field(128, ge=0)
    draft_vocab: int | None = Field(None, ge=1)
    draft_vocab_from: Literal["corpus", "answers"] = "answers"
    head_init: Literal["activation-pca", "random", "svd"] = "activation-pca"
    from_target: bool = True
    taps: tuple[int, ...] | None = None
    variant: tuple[str, ...] = ()


class TrainOptions(DrafterOptions):
    """What `pipeline train` needs; `training`: the fields of `drafter.training.TrainConfig`."""

    target: str = DEFAULT_TARGET
    corpus: Path | None = None
    dialogues: Path | None = None
    run: Path | None = None
    out: Path | None = None
    holdout: float = Field(0.05, gt=0, lt=1)
    training: dict[str, Any] = {}


class CorpusOptions(_Options):
    """What `pipeline corpus` needs. Without a prompt file the target writes the user turns."""

    target: str = DEFAULT_TARGET
    prompts: Path | None = None
    count: int = Field(2000, ge=1)
    max_tokens: int = Field(240, ge=1)
    temperatures: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(
        (0.0, 0.6, 1.0), min_length=1
    )
    batch: int = Field(64, ge=1)
    precision: Literal["fp32", "bf16"] = "bf16"
    keep_states: bool = False
    seed: int = Field(0, ge=0, le=2**40)
    out: Path | None = None


T = TypeVar("T", bound=BaseModel)


def options(model: type[T], config: Path | None = None, **given: Any) -> T:
    """The options of a command: those given (not None), else those of the file, else defaults.

    Raises UsageError naming the option.
    """
    values = {} if config is None else _read(config)
    values |= {name: value for name, value in given.items() if value is not None}
    try:
        return model(**values)
    except ValidationError as error:
        raise UsageError(_sentence(error, config, given)) from None


def default(model: type[BaseModel], name: str) -> str:
    """The default of an option, as its help shows it."""
    value = model.model_fields[name].default
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except FileNotFoundError:
        raise UsageError(f"the config file {path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"the config file {path} cannot be read ({error}).") from None
    if not isinstance(found, dict):
        raise UsageError(
            f"the config file {path} holds {type(found).__name__}, an object is needed."
        )
    return found


def _sentence(error: ValidationError, config: Path | None, given: dict[str, Any]) -> str:
    first = error.errors()[0]
    from_command = given.get(str(first["loc"][0])) is not None
    name = ".".join(str(part) for part in first["loc"][: 1 if from_command else None])
    where = f"--{name.replace('_', '-')}" if from_command else f"{config}: {name}"
    if first["type"] == "extra_forbidden":
        return f"{where} is not an option; see --help for those there are."
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{where} is {first['input']!r}: it {reason[:1].lower()}{reason[1:]}."
