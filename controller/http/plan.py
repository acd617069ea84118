"""From a checked body and its prompts to the requests that the ledger takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsed.controller.http.context import HttpContext
from sparsed.controller.http.errors import TextTooLongError
from sparsed.controller.http.generation import ChoicePlan, TextRules
from sparsed.controller.http.protocol import ChatBody, GenerationBody, TokenizeBody
from sparsed.controller.http.sampling import (
    OutputLimits,
    check_token_ids,
    for_choice,
    resolve_sampling,
    resolve_sparse,
)
from sparsed.core import AddRequest, InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt in tokens; ``echo``: its text, if the answer is to begin with it."""

    token_ids: tuple[int, ...]
    echo: str | None = None


def plan_choices(
    body: GenerationBody,
    prompts: Sequence[Prompt],
    *,
    limits: OutputLimits,
    reply_id: str,
    context: HttpContext,
) -> list[ChoicePlan]:
    """``n`` choices for each prompt, in order; InputError naming the field that does not fit."""
    _check_count(body, len(prompts), context=context)
    rules = TextRules(
        stops=tuple(body.stop),
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        hide_output=limits.max_tokens == 0,
    )
    sparse = resolve_sparse(body.sparse)
    plans: list[ChoicePlan] = []
    for prompt in prompts:
        sampling = resolve_sampling(
            body, limits=limits, num_prompt_tokens=len(prompt.token_ids), context=context
        )
        for choice in range(body.n):
            index = len(plans)
            request = AddRequest(
                request_id=f"{reply_id}-{index}",
                prompt_tokens=prompt.token_ids,
                sampling=for_choice(sampling, choice=choice),
                sparse=sparse,
            )
            plans.append(ChoicePlan(index=index, request=request, rules=rules, echo=prompt.echo))
    return plans


def _check_count(body: GenerationBody, num_prompts: int, *, context: HttpContext) -> None:
    """InputError for more choices than an idle daemon takes: trying again would not help."""
    most, num_choices = context.ledger.max_unfinished, num_prompts * body.n
    if num_choices <= most:
        return
    field = "n" if num_prompts == 1 else "prompt"
    asked = f"{num_prompts} prompts with n={body.n}" if num_prompts > 1 else f"n={body.n}"
    raise InputError(
        f"{field}: {asked} would be {num_choices} requests at once; at most {most} can run or "
        "wait, send fewer at a time",
        field=field,
    )


def check_length(text: str, *, field: str, context: HttpContext) -> None:
    """TextTooLongError for a text that is too long whatever its tokens: to tokenize it would take
    gigabytes."""
    most = context.max_model_len * context.tokenizer.longest_token_chars
    if len(text) > most:
        raise TextTooLongError(
            f"{field} has {len(text)} characters, which cannot be fewer than the model's "
            f"{context.max_model_len} tokens; shorten it",
            field=field,
        )


def encode_text(
    text: str, *, field: str, add_special_tokens: bool, context: HttpContext
) -> tuple[int, ...]:
    """Token ids of a prompt; InputError if there is none, or one the model does not know, or as
    ``check_length``."""
    check_length(text, field=field, context=context)
    try:
        token_ids = context.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except InputError as error:
        raise InputError(f"{field}: {error}", field=field) from None
    if not token_ids:
        raise InputError(f"{field} is empty; give at least one token", field=field)
    check_token_ids(token_ids, context=context, field=field)
    return tuple(token_ids)


def encode_chat(body: ChatBody | TokenizeBody, *, context: HttpContext) -> tuple[int, ...]:
    """Token ids of a conversation; templates write special tokens, so none is added."""
    text = context.tokenizer.apply_chat_template(
        [message.for_template() for message in body.messages or ()],
        add_generation_prompt=body.add_generation_prompt,
        variables=body.chat_template_kwargs,
    )
    return encode_text(
        text,
        field="messages",
        add_special_tokens=bool(body.add_special_tokens),
        context=context,
    )
