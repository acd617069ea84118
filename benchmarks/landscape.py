"""A model of the engine for judging searches: what a configuration gives under a load.

Built from committed measurements: misses of recorded selections (``miss-curves.json``), attention
recall (``quality-*.json``), and step, link and prefill times of one H100 with an 8B shape
(``h100-residency.json``, ``h100-link.json``, ``h100-serve.json``). It serves to compare searches;
no figure of it is a claim about an engine. Everything is computed for all points at once.

Shape legend: N points of a search space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from recorded_curves import Curves, Floats

# The model: an 8B shape in bf16.
WEIGHTS_BYTES: Final = 16.06e9
KV_TOKEN_BYTES: Final = 131072.0
NUM_LANES: Final = 256
SUMMARY_BYTES: Final = 22.0  # of a page of a lane
CHUNK_TOKEN_BYTES: Final = 0.2e6  # activations and one layer's K and V of a chunk
WORKSPACE_BYTES: Final = 1.6e9
DEVICE_BYTES: Final = 84.9e9
DRAM_BYTES: Final = 110e9

# The machine. Four replayed rows of h100-residency.json give the fixed time and the overlap to
# within 5 %: step = fixed + bytes / rate + select + link - overlap * attention.
HBM_RATE: Final = 3.009e12
LINK_RATE: Final = 46.7e9
FIXED_S: Final = 2.05e-3
DENSE_FIXED_S: Final = 1.6e-3
OVERLAP: Final = 0.76 / 0.8  # of what attention reads, at the rate of a copy
SELECT_S: Final = 0.601e-3
SELECT_PAGE_S: Final = 2.21e-8
SELECT_REQUEST_S: Final = 1.34e-5
PREFILL_TOKENS_PER_S: Final = 28_000.0
CHUNK_S: Final = 3e-3

P95: Final = 1.645  # standard deviations
TTFT_SIGMA: Final = 0.5  # of the logarithm, over requests
TPOT_SIGMA: Final = 0.2
OPTIMISM: Final = 1.1
EXPECTED_MISS_FRAC: Final = 0.18  # with slots for one selection; near three replayed rows
EXPECTED_MISS_POWER: Final = 1.4  # of h100-residency.json: 5 % less, 58 % more and 4 % less
EXPECTED_LOSS: Final = 0.005  # of attention, in pages of one token, when all is read
EXPECTED_LOSS_POWER: Final = 0.3
QUEUE_P95: Final = 2.5  # over the mean
PREFILL_P95: Final = 1.1
BISECTIONS: Final = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """More requests arrive than can be served: a place that comes free is taken at once, and who
    finds none is refused. So goodput is what a configuration can serve within the targets."""

    name: str
    input_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float
    default_active_seqs: int  # what it starts from

    @property
    def mean_tokens(self) -> float:
        """Of a request half way through its output."""
        return self.input_tokens + self.output_tokens / 2

    @property
    def most_tokens(self) -> float:
        return float(self.input_tokens + self.output_tokens)


LOADS: Final = (
    Load(
        name="short chats",
        input_tokens=5000,
        output_tokens=300,
        ttft_s=1.5,
        tpot_s=0.045,
        default_active_seqs=8,
    ),
    Load(
        name="32k documents",
        input_tokens=32_000,
        output_tokens=1000,
        ttft_s=8.0,
        tpot_s=0.045,
        default_active_seqs=6,
    ),
    Load(
        name="long outputs",
        input_tokens=4000,
        output_tokens=6000,
        ttft_s=1.0,
        tpot_s=0.025,
        default_active_seqs=16,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Knob values of N points, each (N,)."""

    page_size: Floats
    token_budget: Floats
    hbm_budget: Floats
    max_num_active_seqs: Floats
    prefill_chunk: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """What the engine would give without noise, each (N,)."""

    goodput: Floats  # requests/s within both targets
    ttft_p95_s: Floats
    tpot_p95_s: Floats
    attention_recall: Floats
    hbm_peak_bytes: Floats
    link_busy_frac: Floats


def evaluate(settings: Settings, load: Load, curves: Curves) -> Truth:
    """The truth of every point: a machine with all its places taken, in balance."""
    places = num_places(settings, load)
    step = decode_step(settings, load, curves)
    rate = _balance(settings, load, places=places, step=step)
    held = _hold(rate, settings, load, step=step)
    ttft_s = QUEUE_P95 * held.queue_s + PREFILL_P95 * held.prefill_s
    tpot_s = held.tpot_s + P95 * held.stall_s
    good = _within(load.ttft_s, ttft_s, TTFT_SIGMA) * _within(load.tpot_s, tpot_s, TPOT_SIGMA)
    share = np.minimum(1.0, settings.token_budget / load.mean_tokens)
    return Truth(
        goodput=rate * good,
        ttft_p95_s=ttft_s,
        tpot_p95_s=tpot_s,
        attention_recall=np.where(step.is_dense, 1.0, curves.recall(settings.page_size, share)),
        hbm_peak_bytes=hbm_peak_bytes(settings, load),
        link_busy_frac=np.minimum(1.0, held.steps_per_s * held.decoding * step.link_s),
    )


def num_places(settings: Settings, load: Load) -> Floats:
    """Requests that run at once: all their pages fit the DRAM tier."""
    fitting = DRAM_BYTES // (load.most_tokens * KV_TOKEN_BYTES)
    return np.minimum(settings.max_num_active_seqs, fitting)


def hbm_peak_bytes(settings: Settings, load: Load) -> Floats:
    """Weights, workspace, hot pages and summaries of every active request, and a chunk."""
    places = num_places(settings, load)
    hot_tokens = np.minimum(settings.hbm_budget, load.most_tokens)
    pages = load.most_tokens / settings.page_size * NUM_LANES
    request_bytes = hot_tokens * KV_TOKEN_BYTES + pages * SUMMARY_BYTES
    chunk_bytes = np.minimum(settings.prefill_chunk, load.input_tokens * places)
    variable = places * request_bytes + chunk_bytes * CHUNK_TOKEN_BYTES
    return WEIGHTS_BYTES + WORKSPACE_BYTES + variable


def expect(settings: Settings, load: Load) -> Truth:
    """What a roofline says beforehand: bytes over rates that are a tenth too good, misses by one
    power law for all budgets and pages, and rules of thumb for quality. It leaves out the time of
    ranking and of small kernels, what overlaps, and the spread over requests."""
    tokens = load.mean_tokens
    read = np.minimum(settings.token_budget, tokens)
    residency = np.maximum(1.0, settings.hbm_budget / settings.token_budget)
    is_hot = settings.hbm_budget >= load.most_tokens
    missed = np.where(is_hot, 0.0, EXPECTED_MISS_FRAC * residency**-EXPECTED_MISS_POWER)
    link_s = missed * read * KV_TOKEN_BYTES / (LINK_RATE * OPTIMISM)
    attend_s = read * KV_TOKEN_BYTES / (HBM_RATE * OPTIMISM)
    step = DecodeStep(
        fixed_s=np.full_like(read, WEIGHTS_BYTES / (HBM_RATE * OPTIMISM)),
        request_s=attend_s + link_s,
        link_s=link_s,
        is_dense=is_hot & (read >= tokens),
    )
    rate = _balance(settings, load, places=num_places(settings, load), step=step)
    held = _hold(rate, settings, load, step=step)
    loss = EXPECTED_LOSS * (tokens / read) * settings.page_size**EXPECTED_LOSS_POWER
    return Truth(
        goodput=rate,
        ttft_p95_s=held.queue_s + held.prefill_s,
        tpot_p95_s=held.tpot_s,
        attention_recall=1.0 - np.minimum(loss, 0.9),
        hbm_peak_bytes=hbm_peak_bytes(settings, load),
        link_busy_frac=np.minimum(1.0, held.steps_per_s * held.decoding * step.link_s),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeStep:
    """Seconds of a decode step: ``fixed_s`` + b * ``request_s`` with b requests in it."""

    fixed_s: Floats
    request_s: Floats
    link_s: Floats  # of one request
    is_dense: npt.NDArray[np.bool_]


def decode_step(settings: Settings, load: Load, curves: Curves) -> DecodeStep:
    """The faster of attention in place and of a selection, where all is hot."""
    tokens = load.mean_tokens
    read = np.minimum(settings.token_budget, tokens)
    is_hot = settings.hbm_budget >= load.most_tokens
    residency = np.maximum(1.0, settings.hbm_budget / settings.token_budget)
    missed = np.where(is_hot, 0.0, curves.miss_frac(settings.page_size, read / tokens, residency))
    link_s = missed * read * KV_TOKEN_BYTES / LINK_RATE
    pages = tokens / settings.page_size
    summaries_s = pages * NUM_LANES * SUMMARY_BYTES / HBM_RATE
    attend_s = read * KV_TOKEN_BYTES / HBM_RATE
    select_s = pages * SELECT_PAGE_S + SELECT_REQUEST_S + summaries_s
    sparse_s = attend_s + select_s + np.maximum(0.0, link_s - OVERLAP * attend_s)
    dense_s = np.full_like(sparse_s, tokens * KV_TOKEN_BYTES / HBM_RATE)
    weights_s = WEIGHTS_BYTES / HBM_RATE
    is_dense = is_hot & (dense_s < sparse_s)
    return DecodeStep(
        fixed_s=weights_s + np.where(is_dense, DENSE_FIXED_S, FIXED_S + SELECT_S),
        request_s=np.where(is_dense, dense_s, sparse_s),
        link_s=np.where(is_dense, 0.0, link_s),
        is_dense=is_dense,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """How long a request holds its place at a given rate of requests, each (N,)."""

    place_s: Floats
    queue_s: Floats  # for the prompts before it
    prefill_s: Floats
    tpot_s: Floats
    stall_s: Floats  # standard deviation of a request's TPOT, by the chunks it meets
    steps_per_s: Floats
    decoding: Floats  # requests in a decode step


def _balance(settings: Settings, load: Load, *, places: Floats, step: DecodeStep) -> Floats:
    """Requests/s at which all places are taken, by bisection."""
    low = np.full_like(places, 1e-6)
    high = np.full_like(places, 1e3)
    for _ in range(BISECTIONS):
        rate = np.sqrt(low * high)
        place_s = _hold(rate, settings, load, step=step).place_s
        possible = places / place_s
        low, high = np.where(possible > rate, rate, low), np.where(possible > rate, high, rate)
    return low


def _hold(rate: Floats, settings: Settings, load: Load, *, step: DecodeStep) -> _Held:
    """Chunks take their share of the time; decode steps fill the rest. Infinite beyond it."""
    chunks = np.ceil(load.input_tokens / settings.prefill_chunk)
    chunk_tokens = load.input_tokens / chunks
    chunk_s = chunk_tokens / PREFILL_TOKENS_PER_S + CHUNK_S
    free = 1.0 - rate * chunks * chunk_s
    # Requests in a step follow from the length of a step, which follows from them.
    load_s = rate * load.output_tokens / np.maximum(free, 1e-9)
    spare = 1.0 - load_s * step.request_s
    is_possible = (free > 0) & (spare > 0)
    step_s = np.where(is_possible, step.fixed_s / np.maximum(spare, 1e-9), np.inf)
    tpot_s = step_s / np.maximum(free, 1e-9)
    prefill_s = chunks * (chunk_s + step_s)
    busy = np.where(is_possible, rate * prefill_s, 1.0)
    is_possible &= busy < 1.0
    queue_s = np.where(is_possible, busy * prefill_s / (2 * np.maximum(1e-9, 1 - busy)), np.inf)
    met = rate * chunks * load.output_tokens * tpot_s
    place_s = queue_s + prefill_s + load.output_tokens * tpot_s
    return _Held(
        place_s=np.where(is_possible, place_s, np.inf),
        queue_s=queue_s,
        prefill_s=prefill_s,
        tpot_s=tpot_s,
        stall_s=np.sqrt(met) * chunk_s / load.output_tokens,
        steps_per_s=1.0 / tpot_s,
        decoding=rate * load.output_tokens * tpot_s,
    )


def _within(limit_s: float, p95_s: Floats, sigma: float) -> Floats:
    """Share of requests within a limit whose 95th percentile is known: 0.95 where they meet."""
    z = P95 + np.log(limit_s / p95_s) / sigma
    share: Floats = 1.0 / (1.0 + np.exp(-1.702 * z))  # of a normal distribution, nearly
    return share
