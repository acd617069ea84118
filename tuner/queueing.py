"""From the time of a step and of a prompt to what requests see. Pure.

Prompts run one after the other, in chunks; every step takes one chunk, if there is one, and a token
of each request that decodes. So a chunk delays all who decode, and they delay it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A request like all others. ``prompt_s``: its prompt with nothing beside it, in ``chunks``
    steps, below 1 where several prompts share one; ``output_tokens``: the first comes with the
    prompt."""

    prompt_s: float
    chunks: float
    output_tokens: int

    @property
    def decode_steps(self) -> int:
        return max(1, self.output_tokens - 1)

    def wait_s(self, prompts: float) -> float:
        """What a token waits for the prompts that others have while this request decodes: a chunk
        a step at most."""
        return min(prompts * self.prompt_s / self.decode_steps, self.prompt_s / self.chunks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """Means over requests. ``requests``: decoding at once; ``prompt_frac``: share of the time that
    prompts take."""

    requests: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft_s: float
    tpot_s: float
    prompt_frac: float


def full_batch(job: Job, *, requests: int, step_s: float) -> Service:
    """``requests`` at all times: each that ends is followed by another one at once.

    In a round each of them has its prompt and ``decode_steps`` steps, or as many as all chunks
    need, for a step takes one at most. A token waits for the chunks of the others; the time to the
    first token is that of the prompt beside the others' steps.
    """
    num_steps = max(float(job.decode_steps), requests * job.chunks)
    round_s = requests * job.prompt_s + num_steps * step_s
    return Service(
        requests=requests,
        requests_per_s=requests / round_s,
        output_tokens_per_s=requests * job.output_tokens / round_s,
        ttft_s=job.prompt_s + max(1.0, job.chunks) * step_s,
        tpot_s=step_s + job.wait_s(requests - 1),
        prompt_frac=requests * job.prompt_s / round_s,
    )


def at_rate(
    job: Job, *, rate_per_s: float, most: int, step_s: Callable[[int], float]
) -> Service | None:
    """Poisson arrivals of that many requests a second; None if ``most`` at once cannot keep up.

    Of each second prompts take ``rate * prompt_s``, steps share the rest: TPOT is a step over that
    share. As many decode as arrive while one does (Little). Prompts, each with the steps beside its
    chunks, are the service of a queue of one server, M/D/1: the wait for it and the service are the
    time to the first token.
    """
    busy = rate_per_s * job.prompt_s
    if busy >= 1.0:
        return None
    for requests in range(1, most + 1):
        tpot_s = step_s(requests) / (1.0 - busy)
        if rate_per_s * job.decode_steps * tpot_s <= requests:
            break
    else:
        return None
    service_s = job.prompt_s + max(1.0, job.chunks) * step_s(requests)
    load = rate_per_s * service_s
    if load >= 1.0:
        return None
    return Service(
        requests=requests,
        requests_per_s=rate_per_s,
        output_tokens_per_s=rate_per_s * job.output_tokens,
        ttft_s=service_s + load * service_s / (2.0 * (1.0 - load)),
        tpot_s=tpot_s,
        prompt_frac=busy,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Burst:
    total_s: float
    mean_ttft_s: float
    mean_tpot_s: float


def all_at_once(job: Job, *, count: int, at_once: int, step_s: float) -> Burst:
    """``count`` requests that arrive together, of which ``at_once`` fit.

    The prompts of the first ``at_once`` follow each other, those of one chunk end together; a later
    one begins when an earlier request ends. A request decodes while the next ``at_once - 1`` have
    their prompts, as far as there are any.
    """
    at_once = min(at_once, count)
    waves = math.ceil(count / at_once)
    together = min(at_once, max(1, round(1 / job.chunks)))
    wave_s = at_once * job.prompt_s + job.decode_steps * step_s
    turns = at_once / together
    ttft_s = (waves - 1) / 2 * wave_s + (turns + 1) / 2 * together * job.prompt_s
    beside = (at_once - 1) * (1 - at_once / (2 * count))
    return Burst(
        total_s=count * job.prompt_s + waves * job.decode_steps * step_s,
        mean_ttft_s=ttft_s,
        mean_tpot_s=step_s + job.wait_s(beside),
    )
