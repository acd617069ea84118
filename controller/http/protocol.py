"""The bodies of requests. Strict: a field is obeyed, listed here as harmless, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    model_validator,
)

from sparsed.core import InputError

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_SEED = 2**63 - 1


def _refused(*neutral: object, remedy: str) -> AfterValidator:
    """A field that cannot be obeyed; its ``neutral`` values ask for nothing and may be sent."""

    def check(value: object) -> object:
        if value is not None and value not in neutral:
            raise ValueError(f"not supported; {remedy}")
        return value

    return AfterValidator(check)


def _check_stops(stops: list[str]) -> list[str]:
    if len(stops) > MAX_STOPS:
        raise ValueError(f"{len(stops)} stop strings; at most {MAX_STOPS} are allowed")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"each stop string must have 1 to {MAX_STOP_CHARS} characters")
    if not all(_is_unicode(stop) for stop in stops):
        raise ValueError("a stop string is not valid Unicode; remove the surrogate")
    return stops


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_list(value: object) -> list[object]:
    """Stop strings, which may be one string or none, as a list."""
    if isinstance(value, list):
        return value
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    raise ValueError("must be a string or a list of strings")


def _is_token_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _parse_prompts(value: object) -> list[str | list[int]]:
    """The four forms of ``prompt`` as a list of texts and token lists."""
    prompts = [value] if isinstance(value, str) or _is_token_list(value) else value
    if not isinstance(prompts, list) or not prompts:
        forms = "a string, a list of token ids, or a list of either"
        raise ValueError(
            f"the list is empty; give {forms}" if prompts == [] else f"must be {forms}"
        )
    for prompt in prompts:
        if not isinstance(prompt, str) and not _is_token_list(prompt):
            raise ValueError("each prompt must be a string or a non-empty list of token ids")
    return prompts


def _join_parts(content: object) -> str:
    """The text of a message; its content is that text, or a list of text parts."""
    if isinstance(content, list):
        return "\n".join(_text_parts(content))
    if isinstance(content, str):
        return content
    raise ValueError('must be a string or a list of {"type": "text", "text": "..."}')


def _text_parts(content: list[object]) -> list[str]:
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            raise ValueError('each part must be {"type": "text", "text": "..."}')
        texts.append(part["text"])
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("the text of a part must be a string")
    return texts


Prompts = Annotated[list[str | list[int]], PlainValidator(_parse_prompts)]
Stops = Annotated[list[str], BeforeValidator(_as_list), AfterValidator(_check_stops)]
TokenId = Annotated[int, Field(ge=0)]
NumTokens = Annotated[int, Field(ge=1)]


class Body(BaseModel):
    """No unknown field, no conversion between types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class SparseBody(Body):
    """Sparse attention of this request; ``token_budget`` None follows the daemon's knob."""

    mode: Literal["auto", "off"] = "auto"
    token_budget: int | None = None

    @model_validator(mode="after")
    def _no_budget_without_sparsity(self) -> SparseBody:
        if self.mode == "off" and self.token_budget is not None:
            raise InputError(
                "token_budget has no effect with mode 'off'; leave one of them out",
                field="token_budget",
            )
        return self


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # usage in every chunk
    include_obfuscation: bool | None = None  # harmless: padding against traffic analysis


class GenerationBody(Body):
    """What both generating endpoints take. None: the model's default, else the neutral value."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0: no limit
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None  # less overflows
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None

    stop: Stops = []
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    sparse: SparseBody | None = None

    # Harmless: nothing that these fields may say can change an answer of this daemon.
    user: str | None = None  # end user's label, for abuse reports
    safety_identifier: str | None = None  # its successor
    metadata: Mapping[str, str] | None = None  # labels of stored answers; none is stored
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None  # there is one tier
    prompt_cache_key: str | None = None  # routes to a cache, of which there is one

    # Refused, with a remedy, unless the value asks for nothing.
    response_format: Annotated[
        object, _refused({"type": "text"}, remedy='only {"type": "text"} is, ask in the prompt')
    ] = None
    min_tokens: Annotated[
        object, _refused(0, remedy="use ignore_eos with max_tokens for a fixed length")
    ] = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_usage_always(self) -> bool:
        return self.wants_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )


class CompletionBody(GenerationBody):
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0: only score the prompt
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool = True
    best_of: int | None = None  # harmless if it is n: benchmark clients send 1
    suffix: Annotated[object, _refused("", remedy="no model here fills in the middle")] = None

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.n:
            raise InputError(
                f"best_of={self.best_of} is not supported; leave it out, or set it to n={self.n}",
                field="best_of",
            )
        return self


_NO_TOOLS = "describe the tools in the prompt"


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]
    name: str | None = None

    # Harmless: an answer's message sent back, or an evaluation client's mark.
    type: Literal["text"] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[object, _refused([], remedy="leave them out")] = None
    tool_calls: Annotated[object, _refused([], remedy=_NO_TOOLS)] = None

    def for_template(self) -> dict[str, str]:
        """As templates know it; 'developer' is a newer name of 'system'."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        return message if self.name is None else message | {"name": self.name}


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False  # templates write them
    chat_template_kwargs: dict[str, object] | None = None

    parallel_tool_calls: bool | None = None  # harmless: no tool is called
    tools: Annotated[object, _refused([], remedy=_NO_TOOLS)] = None
    tool_choice: Annotated[object, _refused("none", "auto", remedy=_NO_TOOLS)] = None
    functions: Annotated[object, _refused([], remedy=_NO_TOOLS)] = None
    function_call: Annotated[object, _refused("none", "auto", remedy=_NO_TOOLS)] = None
    modalities: Annotated[object, _refused(["text"], remedy="answers are text")] = None

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise InputError("top_logprobs needs logprobs: true", field="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InputError(
                "max_tokens and max_completion_tokens differ; give one of them", field="max_tokens"
            )
        return self


class TokenizeBody(Body):
    """Either ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = None  # None: as the generating endpoints do
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, object] | None = None

    @model_validator(mode="after")
    def _check_one_source(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise InputError("give either prompt or messages", field="prompt")
        return self


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[TokenId]
