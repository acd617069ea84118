"""From a checked body and the model's defaults to the values the engine takes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from sparsed.controller.http.context import HttpContext
from sparsed.controller.http.errors import ModelNotFoundError
from sparsed.controller.http.protocol import MAX_SEED, GenerationBody, SparseBody
from sparsed.core import (
    KNOBS_BY_NAME,
    InputError,
    RefusalReason,
    SamplingParams,
    SparseMode,
    SparseOptions,
)

_TOKEN_ID = re.compile(r"[0-9]{1,10}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputLimits:
    """What the endpoints name differently, and by what names. ``max_tokens`` None: all that fits."""

    max_tokens: int | None
    max_tokens_field: str = "max_tokens"
    prompt_field: str = "prompt"
    logprobs: int | None = None
    prompt_logprobs: int | None = None


def check_model(model: str | None, *, context: HttpContext) -> str:
    """The served name a body means; ModelNotFoundError if there is none of that name."""
    if model is None:
        return context.model_ids[0]
    if model not in context.model_ids:
        served = ", ".join(context.model_ids)
        raise ModelNotFoundError(f"model {model!r} is not served; served: {served}", field="model")
    return model


def check_token_ids(token_ids: list[int], *, context: HttpContext, field: str) -> None:
    """InputError if an id is outside of the model's vocabulary."""
    vocab_size = context.model.vocab_size
    wrong = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise InputError(
            f"{field}: token id {wrong} is outside of the vocabulary, 0 to {vocab_size - 1}",
            field=field,
        )


def resolve_sampling(
    body: GenerationBody, *, limits: OutputLimits, num_prompt_tokens: int, context: HttpContext
) -> SamplingParams:
    """The body's values, else those of generation_config.json, else neutral ones.

    Errors: InputError naming the field whose value does not fit the model.
    """
    defaults = context.model.generation
    stop_token_ids = list(body.stop_token_ids or [])
    check_token_ids(stop_token_ids, context=context, field="stop_token_ids")
    if not body.ignore_eos:
        stop_token_ids += [*context.model.eos_token_ids, *context.tokenizer.eos_token_ids]
    return SamplingParams(
        max_tokens=_max_tokens(limits, num_prompt_tokens=num_prompt_tokens, context=context),
        temperature=_first(body.temperature, defaults.temperature, neutral=1.0),
        top_p=_first(body.top_p, defaults.top_p, neutral=1.0),
        top_k=max(int(_first(body.top_k, defaults.top_k, neutral=0)), 0),
        min_p=_first(body.min_p, defaults.min_p, neutral=0.0),
        seed=body.seed,
        repetition_penalty=_first(
            body.repetition_penalty, defaults.repetition_penalty, neutral=1.0
        ),
        presence_penalty=_first(body.presence_penalty, neutral=0.0),
        frequency_penalty=_first(body.frequency_penalty, neutral=0.0),
        logit_bias=_logit_bias(body, context=context),
        stop_token_ids=tuple(dict.fromkeys(stop_token_ids)),
        ignore_eos=body.ignore_eos,
        logprobs=limits.logprobs,
        prompt_logprobs=limits.prompt_logprobs,
    )


def for_choice(sampling: SamplingParams, *, choice: int) -> SamplingParams:
    """The values of the n-th answer to one prompt: each has a seed of its own."""
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + choice) % (MAX_SEED + 1))


def resolve_sparse(body: SparseBody | None) -> SparseOptions:
    """The request's choice of sparsity; InputError if the budget is outside of its range."""
    if body is None:
        return SparseOptions()
    if body.token_budget is not None:
        try:
            KNOBS_BY_NAME["token_budget"].check(body.token_budget)
        except InputError as error:
            raise InputError(f"sparse.{error}", field="sparse.token_budget") from None
    return SparseOptions(mode=SparseMode(body.mode), token_budget=body.token_budget)


def _first(*values: float | None, neutral: float) -> float:
    return next((value for value in values if value is not None), neutral)


def _max_tokens(limits: OutputLimits, *, num_prompt_tokens: int, context: HttpContext) -> int:
    """Tokens to generate, at least one: a scored prompt takes one as well, which is not shown."""
    room = context.max_model_len - num_prompt_tokens
    if max(limits.max_tokens or 0, 1) > room:
        context.ledger.refuse(RefusalReason.TOO_LONG)
    if room < 1:
        raise InputError(
            f"the prompt has {num_prompt_tokens} tokens, the model takes "
            f"{context.max_model_len} including at least one of output; shorten the prompt",
            field=limits.prompt_field,
        )
    if limits.max_tokens is None:
        return min(room, context.model.generation.max_new_tokens or room)
    if limits.max_tokens > room:
        raise InputError(
            f"{limits.max_tokens_field}={limits.max_tokens} and a prompt of {num_prompt_tokens} tokens exceed "
            f"the model's {context.max_model_len} tokens; at most {room} are left",
            field=limits.max_tokens_field,
        )
    return max(limits.max_tokens, 1)


def _logit_bias(body: GenerationBody, *, context: HttpContext) -> tuple[tuple[int, float], ...]:
    bias = body.logit_bias or {}
    wrong = next((key for key in bias if not _TOKEN_ID.fullmatch(key)), None)
    if wrong is not None:
        raise InputError(f"logit_bias: {wrong[:20]!r} is not a token id", field="logit_bias")
    pairs = tuple((int(key), value) for key, value in bias.items())
    check_token_ids([token for token, _ in pairs], context=context, field="logit_bias")
    return pairs
