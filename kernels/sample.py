"""Tokens drawn from logits, on the device: no sort, no word from the host.

The tokens kept are the best ones, so that two numbers name them: the lowest logit, and the last id
among those that have it. Both are found by bisection; the token is found in the order of ids.

Shape legend: B rows, V vocabulary, W tokens of a tile, K tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference

_TILE = 4096
_NUM_WARPS = 16
_LOG2_E = tl.constexpr(1.4426950408889634)
_SMALLEST = tl.constexpr(2.0**-126)  # of float32: what is less probable than that has no weight
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32; -inf is never kept


class DrawPlan(NamedTuple):
    """How each row is drawn, on the device of the logits.

    ``key_4B``: int32 words of the 128-bit key of Philox, the lowest first. ``index_B``: int32,
    which of the numbers of that key. float32: ``temperature_B`` (0: the most likely token, whatever
    the rest says), ``top_p_B`` (1: all), ``min_p_B`` (0: all). ``top_k_B``: int32 (0: all).
    """

    key_4B: Tensor
    index_B: Tensor
    temperature_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    top_k_B: Tensor


def draw_tokens(logits_BV: Tensor, *, plan: DrawPlan) -> Tensor:
    """One token a row.

    The tokens in falling order of logit, ties by rising id, are cut by min-p, then top-k, then
    top-p (the fewest whose share of what is left reaches it). The token is the first of those
    kept, by rising id, whose cumulated probability exceeds u times that of all of them; u in
    [0, 1) is the number ``index`` of the key, as numpy's ``Philox`` has it, bit for bit.

    Shapes: logits (B, V) float32, contiguous; returns (B,) int64. A row's token depends on its own
    logits and plan alone. A logit of -inf or NaN is never drawn; a row of nothing else gives 0.
    Precision: probabilities are float32 on CUDA, so a token whose boundary is within rounding of
    u, or of a cut, may differ from the twin's, which has float64.
    Errors: AssertionError on other shapes or dtypes.
    Source: inverse transform sampling; Philox4x64-10, Salmon et al., SC 2011; the bisection is ours.
    """
    num_rows = len(logits_BV)
    assert logits_BV.dtype == torch.float32 and logits_BV.is_contiguous()
    assert plan.key_4B.shape == (4, num_rows) and plan.key_4B.dtype == torch.int32
    assert num_rows < 2 or plan.key_4B.stride(1) == 1
    dtypes = (torch.int32, torch.float32, torch.float32, torch.float32, torch.int32)
    for column_B, dtype in zip(plan[1:], dtypes, strict=True):
        assert column_B.shape == (num_rows,) and column_B.dtype == dtype
        assert column_B.is_contiguous()
    run = _launch if logits_BV.is_cuda else reference.draw_tokens
    return run(logits_BV, plan)


def _launch(logits_BV: Tensor, plan: DrawPlan, tile: int = _TILE) -> Tensor:
    num_rows, vocab = logits_BV.shape
    tokens_B = torch.empty(num_rows, dtype=torch.int64, device=logits_BV.device)
    if num_rows:
        _draw_kernel[(num_rows,)](
            logits_BV,
            *plan,
            tokens_B,
            plan.key_4B.stride(0),
            VOCAB=vocab,
            TILE=tile,
            NUM_TILES=triton.next_power_of_2(triton.cdiv(vocab, tile)),
            num_warps=_NUM_WARPS,
            enable_fp_fusion=True,
        )
    return tokens_B


# Their addresses depend on the batch, and no variant is to be compiled while requests wait.
_PLAN = ["key_4B", "index_B", "temperature_B", "top_p_B", "min_p_B", "top_k_B", "key_stride"]


@triton.jit(do_not_specialize=[*_PLAN, "tokens_B"])
def _draw_kernel(
    logits_BV: tl.tensor,
    key_4B: tl.tensor,
    index_B: tl.tensor,
    temperature_B: tl.tensor,
    top_p_B: tl.tensor,
    min_p_B: tl.tensor,
    top_k_B: tl.tensor,
    tokens_B: tl.tensor,
    key_stride: tl.int32,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
) -> None:
    b = tl.program_id(0)
    row_V = logits_BV + b.to(tl.int64) * VOCAB
    temperature = tl.load(temperature_B + b)
    peak, token = _best(row_V, VOCAB, TILE)
    if (temperature > 0.0) & (peak > float("-inf")):
        scale = _LOG2_E / temperature
        floor, last = _cut(
            row_V,
            peak,
            scale,
            tl.load(top_p_B + b),
            tl.load(min_p_B + b),
            tl.load(top_k_B + b),
            VOCAB,
            TILE,
            NUM_TILES,
        )
        number = _uniform(key_4B + b, key_stride, tl.load(index_B + b))
        mass_K = _mass(row_V, floor, last, peak, scale, VOCAB, TILE, NUM_TILES)
        target = (number * tl.sum(mass_K).to(tl.float64)).to(tl.float32)
        token = _find(row_V, mass_K, target, floor, last, peak, scale, VOCAB, TILE)
    tl.store(tokens_B + b, token.to(tl.int64))


@triton.jit
def _uniform(key_4: tl.tensor, key_stride: tl.int32, index: tl.tensor) -> tl.tensor:
    """numpy.random.Generator(Philox(key=key, counter=index)).random(), which counts up first."""
    low, high = _word(key_4, key_stride), _word(key_4 + 2 * key_stride, key_stride)
    counter = (index + 1).to(tl.uint64)
    nothing = counter & 0
    bits, _, _, _ = tl.random.philox_impl(counter, nothing, nothing, nothing, low, high)
    return (bits >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2 ** -53


@triton.jit
def _word(words: tl.tensor, stride: tl.int32) -> tl.tensor:
    low = tl.load(words).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(words + stride).to(tl.uint32, bitcast=True).to(tl.uint64)
    return (high << 32) | low


@triton.jit
def _load(row_V: tl.tensor, ids_W: tl.tensor, VOCAB: tl.constexpr) -> tl.tensor:
    """Logits without -0.0, which is 0.0 as a number and another one as an integer."""
    return tl.load(row_V + ids_W, mask=ids_W < VOCAB, other=float("-inf")) + 0.0


@triton.jit
def _best(row_V: tl.tensor, VOCAB: tl.constexpr, TILE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The highest logit and the first id that has it."""
    best_W = tl.full([TILE], float("-inf"), tl.float32)
    first_W = tl.arange(0, TILE)
    for start in range(0, VOCAB, TILE):
        ids_W = start + tl.arange(0, TILE)
        logits_W = _load(row_V, ids_W, VOCAB)
        first_W = tl.where(logits_W > best_W, ids_W, first_W)
        best_W = tl.where(logits_W > best_W, logits_W, best_W)
    peak = tl.max(best_W, axis=0)
    return peak, tl.min(tl.where(best_W == peak, first_W, VOCAB - 1), axis=0)


@triton.jit
def _cut(
    row_V: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    top_k: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The lowest logit that is kept, and the last id that is kept with that logit."""
    floor = tl.maximum(peak + tl.log2(tl.maximum(min_p, _SMALLEST)) / scale, _LOWEST)
    last = tl.full([], VOCAB, tl.int32)
    if (top_k > 0) & (top_k < VOCAB):
        count_K = _mass(row_V, floor, last, peak, 0.0, VOCAB, TILE, NUM_TILES)
        if tl.sum(count_K) > top_k:
            wanted = top_k.to(tl.float32)
            floor, last = _keep(row_V, floor, last, peak, 0.0, wanted, VOCAB, TILE, NUM_TILES)
    if top_p < 1.0:
        mass_K = _mass(row_V, floor, last, peak, scale, VOCAB, TILE, NUM_TILES)
        wanted = top_p * tl.sum(mass_K)
        floor, last = _keep(row_V, floor, last, peak, scale, wanted, VOCAB, TILE, NUM_TILES)
    return floor, last


@triton.jit
def _keep(
    row_V: tl.tensor,
    floor: tl.tensor,
    last: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    wanted: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Floor and last id of the fewest best tokens whose weights reach ``wanted``."""
    lowest, above = _bisect(row_V, floor, peak, scale, wanted, VOCAB, TILE)
    ties = tl.ceil((wanted - above) / tl.exp2((lowest - peak) * scale))
    ties_K = _mass(row_V, lowest, VOCAB, lowest, 0.0, VOCAB, TILE, NUM_TILES)
    tie = _find(row_V, ties_K, ties - 1.0, lowest, VOCAB, lowest, 0.0, VOCAB, TILE)
    return lowest, tl.where(lowest > floor, tie, tl.minimum(tie, last))


@triton.jit
def _bisect(
    row_V: tl.tensor,
    floor: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    wanted: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The highest logit such that the weights from there on reach ``wanted``, as those from
    ``floor`` on do; and the weight of all above it."""
    low, high = _key(floor), _key(peak)
    above = tl.full([], 0.0, tl.float32)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        mass, next_above, next_below = _split(row_V, _logit(middle), peak, scale, VOCAB, TILE)
        enough = mass >= wanted
        low = tl.where(enough, tl.maximum(_key(next_above), middle), low)
        high = tl.where(enough, high, tl.minimum(_key(next_below), middle - 1))
        above = tl.where(enough, above, mass)
    return _logit(tl.maximum(low, high)), above  # if not even those from floor on do: floor


@triton.jit
def _key(logit: tl.tensor) -> tl.tensor:
    """An integer in the order of the logits."""
    bits = logit.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _logit(key: tl.tensor) -> tl.tensor:
    """The logit of a key."""
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _split(
    row_V: tl.tensor,
    middle: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The weight from ``middle`` on, the lowest logit there, and the highest one below."""
    mass_W = tl.zeros([TILE], tl.float32)
    above_W = tl.full([TILE], float("inf"), tl.float32)
    below_W = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, VOCAB, TILE):
        logits_W = _load(row_V, start + tl.arange(0, TILE), VOCAB)
        high_W = logits_W >= middle
        mass_W += tl.where(high_W, tl.exp2((logits_W - peak) * scale), 0.0)
        above_W = tl.minimum(above_W, tl.where(high_W, logits_W, float("inf")))
        below_W = tl.maximum(below_W, tl.where(logits_W < middle, logits_W, float("-inf")))
    return tl.sum(mass_W, axis=0), tl.min(above_W, axis=0), tl.max(below_W, axis=0)


@triton.jit
def _weights(
    row_V: tl.tensor,
    ids_W: tl.tensor,
    floor: tl.tensor,
    last: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    VOCAB: tl.constexpr,
) -> tl.tensor:
    """Probabilities as multiples of that of ``peak``, 1 where ``scale`` is 0; 0 where not kept:
    below ``floor``, at ``floor`` but after ``last``, or above ``peak``."""
    logits_W = _load(row_V, ids_W, VOCAB)
    kept_W = (logits_W > floor) | ((logits_W == floor) & (ids_W <= last))
    return tl.where(kept_W & (logits_W <= peak), tl.exp2((logits_W - peak) * scale), 0.0)


@triton.jit
def _mass(
    row_V: tl.tensor,
    floor: tl.tensor,
    last: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
) -> tl.tensor:
    """The weights of each tile together."""
    mass_K = tl.zeros([NUM_TILES], tl.float32)
    for start in range(0, VOCAB, TILE):
        ids_W = start + tl.arange(0, TILE)
        weight_W = _weights(row_V, ids_W, floor, last, peak, scale, VOCAB)
        here_K = tl.arange(0, NUM_TILES) == start // TILE
        mass_K = tl.where(here_K, tl.sum(weight_W, axis=0), mass_K)
    return mass_K


@triton.jit
def _find(
    row_V: tl.tensor,
    mass_K: tl.tensor,
    target: tl.tensor,
    floor: tl.tensor,
    last: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The first kept id up to which the weights exceed ``target``, else the last kept one.

    Sums that are rounded differently may disagree on the last bit: hence "else", and hence no id
    of weight 0 is ever taken."""
    tiles_K = tl.arange(0, mass_K.shape[0])
    tile = _first(mass_K, target, tiles_K, mass_K.shape[0])
    before = tl.sum(tl.where(tiles_K < tile, mass_K, 0.0), axis=0)
    ids_W = tile * TILE + tl.arange(0, TILE)
    weight_W = _weights(row_V, ids_W, floor, last, peak, scale, VOCAB)
    return _first(weight_W, target - before, ids_W, VOCAB)


@triton.jit
def _first(weight_X: tl.tensor, target: tl.tensor, id_X: tl.tensor, END: tl.constexpr) -> tl.tensor:
    reached_X = (tl.cumsum(weight_X, axis=0) > target) & (weight_X > 0.0)
    first = tl.min(tl.where(reached_X, id_X, END), axis=0)
    return tl.where(first < END, first, tl.max(tl.where(weight_X > 0.0, id_X, 0), axis=0))
