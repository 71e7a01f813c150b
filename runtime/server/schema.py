"""What clients may ask: OpenAI's field names, checked strictly.

Fields that only steer OpenAI's platform are ignored. Fields that would change the answer and are
not supported are refused unless they hold the value that means "off". Anything else is unknown and
refused. `null` means "not given", as in OpenAI's API.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from runtime.server.settings import MAX_STOP_CHARACTERS, MAX_STOPS

IGNORED = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "parallel_tool_calls",
    )
)

# Not supported, but these values of them change nothing. (In `completions`, `logprobs: 0` asks for
# the chosen token's, so only `false` is off.)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}

# Keys of an assistant's message that clients send back as they got them.
_MESSAGE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "tool_calls": ([],),
    "function_call": (),
}


def _problem(kind: str, message: str, param: str) -> PydanticCustomError:
    return PydanticCustomError(kind, "{message}", {"message": message, "param": param})


def _is_neutral(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(type(value) is type(item) and value == item for item in allowed)


def _known(
    data: Any, fields: Mapping[str, Any], ignored: frozenset[str], neutral: Mapping[str, Any]
) -> Any:
    """The given fields without nulls and ignored ones; refuses the rest."""
    if not isinstance(data, dict):
        return data  # pydantic says what is wrong with it
    kept: dict[str, Any] = {}
    for name, value in data.items():
        if name in fields:
            if value is not None:
                kept[name] = value
        elif name in neutral:
            if value is not None and not _is_neutral(value, neutral[name]):
                message = f"'{name}' with this value is not supported by this server; leave it out."
                raise _problem("unsupported_parameter", message, name)
        elif name not in ignored:
            message = f"Unknown parameter: {name[:60]!a}."
            raise _problem("unknown_parameter", message, name[:60])
    return kept


def _join_parts(content: Any) -> Any:
    """Text, or a list of text parts joined as they are."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            reason = "'content' must be a text or a list of {'type': 'text', 'text': ...} parts."
            raise _problem("invalid_value", reason, "")
        texts.append(part["text"])
    return "".join(texts)


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _single_prompt(prompt: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """A text or token ids; a batch of one is that one."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            message = f"'prompt' holds {len(prompt)} prompts; this server takes one a request."
            raise _problem("unsupported_parameter", message, "")
        prompt = prompt[0]
    try:
        return check(prompt)
    except ValidationError:
        message = "'prompt' must be a text (valid Unicode) or a list of token ids."
        raise _problem("invalid_value", message, "") from None


def _encodable(text: str) -> str:
    """JSON can write halves of surrogate pairs, which are no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"The text holds {text[error.start]!a}, which is not valid Unicode."
        raise _problem("invalid_value", message, "") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(BaseModel):
    """`include_obfuscation` is accepted: nothing is obfuscated."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerateRequest(BaseModel):
    """What both routes share. `top_k` 0 or -1 and `min_p` 0 are off; `temperature` 0 is greedy."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    raw: ClassVar[bool]  # the prompt is fed as it is, without the chat template

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Stop], BeforeValidator(_as_list)] = Field(
        default_factory=list, max_length=MAX_STOPS
    )
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=64)
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, data: Any) -> Any:
        return _known(data, cls.model_fields, IGNORED, NEUTRAL)

    @model_validator(mode="after")
    def _options_need_stream(self) -> GenerateRequest:
        if self.stream_options is not None and not self.stream:
            message = "'stream_options' is only allowed with 'stream': true."
            raise _problem("invalid_value", message, "stream_options")
        if self.return_token_ids and self.stream:
            message = "'return_token_ids' is only allowed without 'stream': true."
            raise _problem("unsupported_parameter", message, "return_token_ids")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def tokens_wanted(self) -> int | None:
        """The most tokens to generate, None if not given."""
        return self.max_tokens

    def generator_prompt(self) -> str | list[int] | list[dict[str, str]]:
        """The prompt as `Generator` takes it."""
        raise NotImplementedError


class Message(BaseModel):
    """One turn. `name` is ignored; `developer` is OpenAI's newer word for `system`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_join_parts)]

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, data: Any) -> Any:
        return _known(data, cls.model_fields, frozenset({"name"}), _MESSAGE_NEUTRAL)

    def turn(self) -> dict[str, str]:
        """The message as chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


class ChatRequest(GenerateRequest):
    """Body of POST /v1/chat/completions."""

    raw = False

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens):
            message = "Give 'max_completion_tokens' or its older name 'max_tokens', not both."
            raise _problem("invalid_value", message, "max_completion_tokens")
        return self

    @property
    def tokens_wanted(self) -> int | None:
        """See `GenerateRequest`; without a limit an answer may fill the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def generator_prompt(self) -> list[dict[str, str]]:
        """See `GenerateRequest`."""
        return [message.turn() for message in self.messages]


class CompletionRequest(GenerateRequest):
    """Body of POST /v1/completions. Without `max_tokens` 16 are generated, as OpenAI has it."""

    raw = True

    prompt: Annotated[Text | list[TokenId], WrapValidator(_single_prompt)]

    @property
    def tokens_wanted(self) -> int:
        """See `GenerateRequest`."""
        return 16 if self.max_tokens is None else self.max_tokens

    def generator_prompt(self) -> str | list[int]:
        """See `GenerateRequest`."""
        return self.prompt
