"""The running softmax that attention kernels share."""

import triton
import triton.language as tl


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
