"""What a trial serves: presets and traces, cut to the model, the machine and the time there is."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from sparsed.core import (
    RECALL_STRIDE,
    AddRequest,
    InputError,
    SamplingParams,
    SparseMode,
    SparseOptions,
    Workload,
    WorkloadRequest,
)

MAX_SHOWN: Final = 60  # characters of a wrong value
MIN_REQUESTS: Final = 2
MIN_INPUT_TOKENS: Final = 32
MIN_OUTPUT_TOKENS: Final = 8
RECALL_SAMPLES: Final = 8  # of attention recall that the longest prompt's answer gives
CHAT: Final = ((900, 180), (400, 250), (2200, 150), (600, 300))
DOCUMENTS: Final = ((12_000, 120), (30_000, 160), (7_000, 100))
PRESET_REPEATS: Final = 8
MIXED: Final = (DOCUMENTS[0], *CHAT[:2], DOCUMENTS[1], *CHAT[2:], DOCUMENTS[2])
PRESETS: Final = {"chat": CHAT, "documents": DOCUMENTS, "mixed": MIXED}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceTimes:
    """What a probe of one request took, to foresee what a workload takes."""

    prompt_tokens_per_s: float
    output_token_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedWorkload:
    """``description`` says what was cut, for the user."""

    workload: Workload
    expected_s: float
    description: str


def load_workload(name: str) -> Workload:
    """A preset, or the JSONL file ``name``: timestamp in ms, input_length, output_length.

    InputError names the preset or the line that is wrong.
    """
    if shapes := PRESETS.get(name):
        sizes = shapes * PRESET_REPEATS
        requests = (
            WorkloadRequest(arrival_s=0.0, input_tokens=num_input, output_tokens=num_output)
            for num_input, num_output in sizes
        )
        return Workload(name=name, requests=tuple(requests))
    path = Path(name)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(PRESETS)
        raise InputError(
            f"workload {name!r} is neither a preset ({known}) nor a readable file: {error}",
            field="workload",
        ) from None
    return Workload(name=path.stem, requests=parse_trace(lines))


def parse_trace(lines: list[str], *, field: str = "workload") -> tuple[WorkloadRequest, ...]:
    """Requests of a trace, by arrival; ``hash_ids`` of a row become its block ids.

    InputError names ``field``, the line, and what is wrong in it.
    """
    requests = []
    for number, line in enumerate(lines, start=1):
        try:
            requests.append(_row(line))
        except InputError as error:
            raise InputError(f"line {number} of the {field}: {error}", field=field) from None
    if not requests:
        raise InputError(f"the {field} has no requests", field=field)
    return tuple(sorted(requests, key=lambda request: request.arrival_s))


def _row(line: str) -> WorkloadRequest:
    """InputError naming the field of the line, and what it must be."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise InputError(
            "it is not a JSON object; write one with timestamp, input_length and output_length, "
            "and perhaps hash_ids"
        )
    return WorkloadRequest(
        arrival_s=_figure(row, "timestamp", least=0.0, what="milliseconds, 0 or more") / 1e3,
        input_tokens=_count(row, "input_length"),
        output_tokens=_count(row, "output_length"),
        block_ids=_block_ids(row.get("hash_ids", [])),
    )


def _count(row: Mapping[str, object], name: str) -> int:
    what = "tokens, a whole number, 1 or more"
    number = _figure(row, name, least=1, what=what)
    if number != int(number):
        raise InputError(f"{name} is {number:g}; give {what}", field=name)
    return int(number)


def _figure(row: Mapping[str, object], name: str, *, least: float, what: str) -> float:
    value = row.get(name)
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):
            number = float(value)
    if not least <= number < math.inf:
        told = f"is {_short(value)}" if name in row else "is missing"
        raise InputError(f"{name} {told}; give {what}", field=name)
    return number


def _block_ids(value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [None]
    if any(not isinstance(item, int) or isinstance(item, bool) for item in ids):
        raise InputError(
            "hash_ids is no list of whole numbers; give one, or leave it out",
            field="hash_ids",
        )
    return tuple(ids)


def _short(value: object) -> str:
    """A wrong value in the words of a trace; of a list or an object, that it is one."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def fit_workload(
    workload: Workload, *, max_tokens: int, window_s: float, times: ServiceTimes
) -> FittedWorkload:
    """Cut ``workload`` so that serving it takes about ``window_s``.

    Prompts that do not fit ``max_tokens`` (with their output) are cut, then requests are left
    out, then all lengths are scaled. Long prompts are kept as long as possible: short ones never
    meet the sparse path.
    """
    requests = [_scaled(item, 1.0, max_tokens=max_tokens) for item in workload.requests]
    kept = requests[:1]
    for item in requests[1:]:
        over = expected_s((*kept, item), times=times) > window_s
        if over and len(kept) >= MIN_REQUESTS:
            break
        kept.append(item)
    frac = min(1.0, window_s / expected_s(tuple(kept), times=times))
    kept = _squeezed(
        [_scaled(item, frac, max_tokens=max_tokens) for item in kept], window_s=window_s
    )
    longest = max(item.input_tokens for item in kept)
    return FittedWorkload(
        workload=replace(workload, requests=tuple(kept)),
        expected_s=expected_s(tuple(kept), times=times),
        description=f"{len(kept)} of {len(requests)} requests, lengths x {frac:.2g}, "
        f"longest prompt {longest} tokens",
    )


def expected_s(requests: tuple[WorkloadRequest, ...], *, times: ServiceTimes) -> float:
    """Prompts one after the other, then the longest answer; decoding together costs extra."""
    prompt_s = sum(item.input_tokens for item in requests) / times.prompt_tokens_per_s
    outputs = sorted(item.output_tokens for item in requests)
    together = outputs[-1] + 0.5 * sum(outputs[:-1])
    return prompt_s + together * times.output_token_s


def describe_workload(workload: Workload) -> str:
    """Its name and sizes, in words."""
    requests = workload.requests
    num_input = sum(item.input_tokens for item in requests)
    num_output = sum(item.output_tokens for item in requests)
    longest = max(item.input_tokens for item in requests)
    return (
        f"{workload.name}: {len(requests)} requests, {num_input} tokens in, {num_output} out, "
        f"longest prompt {longest} tokens"
    )


def reordered(workload: Workload, *, order: int, seed: int) -> Workload:
    """The same requests in another order, at the same times of arrival. Order 0 is as given; the
    others are drawn, each the same whenever it is asked for."""
    if order == 0:
        return workload
    shuffled = list(workload.requests)
    random.Random(f"{seed} {order}").shuffle(shuffled)
    arrivals = (request.arrival_s for request in workload.requests)
    requests = (replace(item, arrival_s=at) for item, at in zip(shuffled, arrivals, strict=True))
    return replace(workload, requests=tuple(requests))


def recall_stride(workload: Workload) -> int:
    """Steps between two measurements of attention recall, so that every window holds some.

    Where any request is sparse, the one with the longest prompt is so from its first step on.
    """
    longest = max(workload.requests, key=lambda item: item.input_tokens)
    return min(max(1, (longest.output_tokens - 1) // RECALL_SAMPLES), RECALL_STRIDE)


def to_messages(
    workload: Workload, *, prompts: Sequence[tuple[int, ...]], prefix: str
) -> tuple[AddRequest, ...]:
    """The requests with their prompts in tokens, each of exactly its output length."""
    pairs = zip(workload.requests, prompts, strict=True)
    return tuple(
        AddRequest(
            request_id=f"{prefix}-{number}",
            prompt_tokens=prompt,
            sampling=SamplingParams(
                max_tokens=item.output_tokens, temperature=0.0, ignore_eos=True
            ),
            sparse=SparseOptions(mode=SparseMode.AUTO),
        )
        for number, (item, prompt) in enumerate(pairs)
    )


def _scaled(request: WorkloadRequest, frac: float, *, max_tokens: int) -> WorkloadRequest:
    """Cut to ``max_tokens``, then times ``frac``, but not below the least worth serving.

    Blocks of a prompt have no meaning for a scaled one and go.
    """
    least_output = min(MIN_OUTPUT_TOKENS, request.output_tokens)
    least_input = min(MIN_INPUT_TOKENS, request.input_tokens)
    output_tokens = max(least_output, int(min(request.output_tokens, max_tokens // 2) * frac))
    room = max_tokens - min(request.output_tokens, max_tokens // 2)
    input_tokens = max(least_input, int(min(request.input_tokens, room) * frac))
    return replace(request, input_tokens=input_tokens, output_tokens=output_tokens, block_ids=())


def _squeezed(requests: list[WorkloadRequest], *, window_s: float) -> list[WorkloadRequest]:
    """Arrivals spread over the first half of the window, in their own rhythm."""
    first, last = requests[0].arrival_s, requests[-1].arrival_s
    frac = min(1.0, 0.5 * window_s / (last - first)) if last > first else 0.0
    return [replace(item, arrival_s=(item.arrival_s - first) * frac) for item in requests]
