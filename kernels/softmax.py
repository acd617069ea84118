"""The running softmax that attention kernels share."""

import triton
import triton.language as tl


@triton.jit
def nothing(QUERIES: tl.constexpr, DIMS: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Peaks of logits in powers of two, sums of weights, and weighted values, of no token."""
    peak_X = tl.full([QUERIES], float("-inf"), tl.float32)
    sum_X = tl.zeros([QUERIES], tl.float32)
    return peak_X, sum_X, tl.zeros([QUERIES, DIMS], tl.float32)


@triton.jit
def absorb(
    logits_XW: tl.tensor, v_WD: tl.tensor, peak_X: tl.tensor, sum_X: tl.tensor, o_XD: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Peak, sum of weights and weighted values after one more tile of tokens.

    Logits are in powers of two, -inf for a token that is not attended to; the values of such
    tokens must be finite. Shapes: X queries, W tokens of the tile, D head dim.
    Source: FlashAttention, arXiv 2205.14135.
    """
    new_peak_X = tl.maximum(peak_X, tl.max(logits_XW, axis=1))
    # A query that has seen nothing yet has a peak of -inf, and -inf - -inf is not a number.
    base_X = tl.where(new_peak_X == float("-inf"), 0.0, new_peak_X)
    weight_XW = tl.exp2(logits_XW - base_X[:, None])
    keep_X = tl.exp2(peak_X - base_X)
    sum_X = sum_X * keep_X + tl.sum(weight_XW, axis=1)
    weight_XW = weight_XW.to(v_WD.dtype)
    o_XD = tl.dot(weight_XW, v_WD, o_XD * keep_X[:, None], input_precision="ieee")
    return new_peak_X, sum_X, o_XD


@triton.jit
def join(one: tl.tuple, other: tl.tuple) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """What two of them have attended to together."""
    peak_X, sum_X, o_XD = one
    other_peak_X, other_sum_X, other_o_XD = other
    new_peak_X = tl.maximum(peak_X, other_peak_X)
    base_X = tl.where(new_peak_X == float("-inf"), 0.0, new_peak_X)
    keep_X, gain_X = tl.exp2(peak_X - base_X), tl.exp2(other_peak_X - base_X)
    o_XD = o_XD * keep_X[:, None] + other_o_XD * gain_X[:, None]
    return new_peak_X, sum_X * keep_X + other_sum_X * gain_X, o_XD
