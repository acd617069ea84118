"""From scores of single tokens to what one choice costs on one text.

Shape legend: L layers, N positions, H KV heads, G query heads per KV head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sparsed.core import Choice, Quality
from sparsed.engine.evaluate.locality import LocalityMeter
from sparsed.engine.evaluate.parallel import Scores

NUM_RESAMPLES = 2_000
BLOCK_TOKENS = 64
MIN_BLOCKS = 8  # of a window
CONFIDENCE = 0.95

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowScores:
    """One choice on one window, on the host. ``recall_LNH`` and ``error_LNH`` are of the sparse
    layers and of query heads; empty if there are none."""

    logprobs_N: Floats
    hits_N: npt.NDArray[np.bool_]
    recall_LNH: npt.NDArray[np.float16]
    error_LNH: npt.NDArray[np.float16]
    reads: float  # tokens, the mean over layers and KV heads
    metadata_bytes: float  # per token, all lanes


def to_host(scores: Scores, choice: Choice, *, num_kv_heads: int) -> WindowScores:
    """What is kept of a window."""
    sparse = [layer for i, layer in enumerate(scores.layers) if _is_sparse(choice, i)]
    none = np.zeros((0, len(scores.logprobs_N), 0), dtype=np.float16)
    recall, error = (
        torch.stack([x.flatten(1) for x in each]).half().cpu().numpy() if each else none
        for each in ([x.recall_NHG for x in sparse], [x.error_NHG for x in sparse])
    )
    reads = torch.stack([layer.reads_H.mean() for layer in scores.layers])
    return WindowScores(
        logprobs_N=scores.logprobs_N.float().cpu().numpy(),
        hits_N=scores.hits_N.cpu().numpy(),
        recall_LNH=recall,
        error_LNH=error,
        reads=float(reads.mean()),
        metadata_bytes=scores.metadata_bytes * num_kv_heads,
    )


def measure_quality(
    text: str,
    choice: Choice,
    windows: Sequence[WindowScores],
    dense: Sequence[WindowScores],
    *,
    context_tokens: int,
    locality: LocalityMeter,
) -> Quality:
    """Pool the windows of one text."""
    logprobs, base = (np.concatenate([w.logprobs_N for w in each]) for each in (windows, dense))
    low, high = bootstrap_ratio(
        [b.logprobs_N - w.logprobs_N for b, w in zip(dense, windows, strict=True)]
    )
    recall, error = (
        np.concatenate(each, axis=1).astype(np.float32)
        for each in ([w.recall_LNH for w in windows], [w.error_LNH for w in windows])
    )
    is_sparse = recall.size > 0
    p10, p01 = np.quantile(recall, (0.10, 0.01)).tolist() if is_sparse else (None, None)
    return Quality(
        text=text,
        choice=choice,
        num_tokens=len(logprobs),
        perplexity=math.exp(-logprobs.mean()),
        ratio=math.exp((base - logprobs).mean()),
        ratio_low=low,
        ratio_high=high,
        reads=float(np.mean([w.reads for w in windows])) / context_tokens,
        metadata_bytes=windows[0].metadata_bytes,
        recall_mean=float(recall.mean()) if is_sparse else None,
        recall_p10=p10,
        recall_p01=p01,
        error_mean=float(error.mean()) if is_sparse else None,
        recall_by_head=tuple(tuple(row) for row in recall.mean(1).round(4).tolist()),
        locality=locality.result(),
    )


def bootstrap_ratio(losses: Sequence[Floats]) -> tuple[float, float]:
    """Interval of exp(mean) of what each token loses against dense (nats), a row for each window.

    Neighbours are alike, so whole blocks of them are drawn, of BLOCK_TOKENS or of an eighth of a
    window that is short, inside their window, whose end is followed by its start.
    Source: circular blocks, Politis and Romano, 1992.
    """
    generator = np.random.default_rng(0)
    totals = sum(_resampled_totals(losses_N, generator) for losses_N in losses)
    means = totals / sum(len(losses_N) for losses_N in losses)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.exp(np.quantile(means, (tail, 1 - tail))).tolist()
    return low, high


def _resampled_totals(losses_N: Floats, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Of one window, as many tokens as it has, NUM_RESAMPLES times."""
    count = len(losses_N)
    size = max(1, min(BLOCK_TOKENS, count // MIN_BLOCKS))
    num_blocks = -(-count // size)
    starts = generator.integers(count, size=(NUM_RESAMPLES, num_blocks))
    ends = starts + size
    ends[:, -1] -= num_blocks * size - count
    sums = np.zeros(count + size + 1)  # of all tokens before each
    np.cumsum(np.concatenate((losses_N, losses_N[:size])), dtype=np.float64, out=sums[1:])
    totals: npt.NDArray[np.float64] = (sums[ends] - sums[starts]).sum(1)
    return totals


def _is_sparse(choice: Choice, layer: int) -> bool:
    return choice.method != "dense" and layer >= choice.dense_layers
