"""Typed options of the commands: the one place of their defaults.

A value comes from the command line, else from `--config FILE` (JSON or TOML), else from here.
Unknown keys are refused, and a bad value is one sentence naming the option.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from drafter.errors import UsageError

TreeKind = Literal["default", "chain", "adaptive"]
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
    """What `build-engine` needs besides an export. `threads` None: the physical cores. `tree`: the
    mode of the engine's own trees (None: what suits the precision); `calibrate`: whether its costs
    are measured once it is built.
    """

    tree: Literal["fixed", "adaptive"] | None = None
    calibrate: bool = True
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


class ShapeOptions(TreeOptions):
    """The tree of one way of decoding: the engine's (`default`), a chain, or one that follows the
    measured costs (`adaptive`), with the values given overruling it.
    """

    tree: TreeKind = "default"


class CompareOptions(TreeOptions):
    """What drafters are compared in: `tree`s, whose values the tree options overrule; whether
    `plain` decoding is measured too; how many `seeds` a prompt has where tokens are drawn.
    """

    tree: tuple[TreeKind, ...] = Field(("default",), min_length=1)
    plain: bool = True
    seeds: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)


class BenchOptions(TreeOptions):
    """What `pipeline bench` measures: every combination of `temperature`, `max_tokens` and `batch`,
    each answer `repeats` times. `peers`: names of `pipeline.peers.registry`.
    """

    tree: tuple[TreeKind, ...] = Field(("default",), min_length=1)
    temperature: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = (0.0,)
    max_tokens: tuple[Annotated[int, Field(ge=1)], ...] = (128,)
    batch: tuple[Annotated[int, Field(ge=1)], ...] = (1,)
    repeats: int = Field(3, ge=1)
    seed: int = Field(0, ge=0)
    threads: int | None = Field(None, ge=1)
    peers: tuple[str, ...] = ()
    peer_python: str | None = None


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


def _size_or_auto(value: object) -> object:
    """A vocabulary size from the command line or a file."""
    if value is None or value == "auto":
        return value
    if isinstance(value, int | str) and str(value).isdecimal() and int(value) > 0:
        return int(value)
    raise PydanticCustomError("size", "Input should be a whole number above 0, or auto")


class DrafterOptions(_Options):
    """Shape and start of the drafter that `pipeline train` makes.

    `rank` None is d/8; `taps` None are the target's default ones; `variant` names some of
    `drafter.config.VARIANTS`. `draft_vocab` None is a quarter of the vocabulary, for a truncated
    head; "auto" is searched for, of at least `min_coverage`, by `coverage_weight`
    (`drafter.vocabulary_size`). `vocab_drafter` None is the target's own. With
    `start`, a drafter to train on, shape and weights are that drafter's; `body` is one whose layer
    gets a fresh head.
    """

    start: str | None = None
    body: str | None = None
    head: str = "low_rank"
    rank: int | None = Field(None, ge=1)
    rescore: int = Field(128, ge=0)
    draft_vocab: Annotated[int | Literal["auto"] | None, BeforeValidator(_size_or_auto)] = None
    draft_vocab_from: Literal["corpus", "answers", "drafted"] = "answers"
    vocab_drafter: str | None = None
    min_coverage: float = Field(0.98, gt=0, le=1)
    coverage_weight: float = Field(0.5, ge=0, le=1)
    vocab_latency: Literal["flops", "measured"] = "flops"
    head_init: Literal["activation-pca", "random", "svd"] = "activation-pca"
    from_target: bool = True
    taps: tuple[int, ...] | None = None
    variant: tuple[str, ...] = ()

    @property
    def starts_from_target(self) -> bool:
        """Whether the layer starts as the target's last one."""
        return self.from_target and self.start is None and self.body is None


class CaptureOptions(_Options):
    """How the target looks at a corpus: stored in the run's folder first, or on line, batch by
    batch as it is trained on. `shard_megabytes` bounds the stored files.
    """

    capture: Literal["stored", "online"] = "stored"
    capture_batch: int = Field(8, ge=1)
    device: str = "cpu"
    shard_megabytes: float = Field(512.0, gt=0, allow_inf_nan=False)


class TrainOptions(DrafterOptions, CaptureOptions):
    """What `pipeline train` needs; `training`: the fields of `drafter.train_config.TrainConfig`.

    `shard` (FSDP) and `tensorboard` (a folder) are not among the arguments of the result: the run
    is the same with and without them.
    """

    target: str = DEFAULT_TARGET
    corpus: Path | None = None
    dialogues: Path | None = None
    run: Path | None = None
    out: Path | None = None
    holdout: float = Field(0.05, gt=0, lt=1)
    shard: bool = False
    tensorboard: Path | None = None
    training: dict[str, Any] = {}


class ServerOptions(_Options):
    """OpenAI-compatible servers that answer in the target's place: base URLs with commas between
    them. `api_key_env` names the environment variable that holds the key.
    """

    server: str | None = None
    model: str | None = None
    api_key_env: str | None = None
    concurrency: int = Field(16, ge=1)
    attempts: int = Field(6, ge=1)
    request_timeout: float = Field(600.0, gt=0, allow_inf_nan=False)
    max_failures: float = Field(0.01, ge=0, le=1)


class CorpusOptions(ServerOptions):
    """What `pipeline corpus` needs. Without a prompt file the target writes the user turns.

    `thinking` on or off sets the chat template's `enable_thinking`; "template" leaves it alone.
    """

    target: str = DEFAULT_TARGET
    prompts: Path | None = None
    count: int = Field(2000, ge=1)
    max_tokens: int = Field(240, ge=1)
    temperatures: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(
        (0.0, 0.6, 1.0), min_length=1
    )
    thinking: Literal["on", "off", "template"] = "template"
    batch: int = Field(64, ge=1)
    precision: Literal["fp32", "bf16"] = "bf16"
    keep_states: bool = False
    shard_documents: int = Field(512, ge=1)
    shard_megabytes: float = Field(512.0, gt=0, allow_inf_nan=False)
    seed: int = Field(0, ge=0, le=2**40)
    out: Path | None = None


T = TypeVar("T", bound=BaseModel)


def options(model: type[T], config: Path | None = None, /, **given: Any) -> T:
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
