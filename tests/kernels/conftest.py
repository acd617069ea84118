"""Inputs for the kernels, and what they must give: loops in float64, on the CPU."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference_mean_keys, sample
from sparsed.kernels.resident import BLOCK_TOKENS, ResidentPlan
from sparsed.kernels.resolve import Resolved
from sparsed.kernels.sample import DrawPlan
from sparsed.kernels.seal import Sealed
from sparsed.kernels.selected import Selected, make_partials
from sparsed.kernels.tables import FREE_STEP, PageTables

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_slots(num_slots: int, *shape: int, absent_frac: float, seed: int = 0) -> Tensor:
    """Distinct slots, some of them absent (-1)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(num_slots, generator=generator)[: math.prod(shape)].view(shape)
    absent = torch.rand(shape, generator=generator) < absent_frac
    return chosen.masked_fill(absent, -1).int()


def attend_case(
    *,
    requests: int = 2,
    heads: int = 2,
    group: int = 3,
    dim: int = 64,
    columns: int = 5,
    page_size: int = 8,
    dtype: torch.dtype = torch.float32,
    absent_frac: float = 0.2,
    seed: int = 0,
) -> dict[str, object]:
    """Arguments of ``attend_pages``; room that must not be read holds NaN."""
    num_slots = requests * heads * columns + 3
    slots_BHK = random_slots(
        num_slots, requests, heads, columns, absent_frac=absent_frac, seed=seed
    )
    tail_tokens_B = (torch.arange(requests, dtype=torch.int32) * 5 + seed) % page_size + 1
    arena_NTCD = torch.full((num_slots, page_size, 2, dim), math.nan, dtype=dtype)
    values_NTCD = random(*arena_NTCD.shape, dtype=dtype, seed=seed + 1)
    for request in range(requests):
        for slot in slots_BHK[request, :, :-1].flatten().tolist():
            if slot >= 0:
                arena_NTCD[slot] = values_NTCD[slot]
        for slot in slots_BHK[request, :, -1].tolist():
            if slot >= 0:
                valid = int(tail_tokens_B[request])
                arena_NTCD[slot, :valid] = values_NTCD[slot, :valid]
    return {
        "q_BHGD": random(requests, heads, group, dim, dtype=dtype, seed=seed + 2),
        "arena_NTCD": arena_NTCD,
        "slots_BHK": slots_BHK,
        "tail_tokens_B": tail_tokens_B,
        "scale": dim**-0.5,
    }


def naive_attend(
    q_BHGD: Tensor, arena_NTCD: Tensor, *, slots_BHK: Tensor, tail_tokens_B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    q_BHGD, arena_NTCD = q_BHGD.cpu().double(), arena_NTCD.cpu().double()
    o_BHGD = torch.zeros_like(q_BHGD)
    lse_BHG = torch.full(q_BHGD.shape[:3], -math.inf, dtype=torch.float64)
    for request, lanes in enumerate(slots_BHK.tolist()):
        tail = int(tail_tokens_B[request])
        for head, slots in enumerate(lanes):
            pages = [arena_NTCD[slot] for slot in slots[:-1] if slot >= 0]
            if slots[-1] >= 0:
                pages.append(arena_NTCD[slots[-1], :tail])
            if not pages or not sum(len(page) for page in pages):
                continue
            k_WD, v_WD = torch.cat(pages).unbind(1)
            logits_GW = q_BHGD[request, head] @ k_WD.T * scale
            lse_BHG[request, head] = logits_GW.logsumexp(1)
            o_BHGD[request, head] = logits_GW.softmax(1) @ v_WD
    return o_BHGD, lse_BHG


def attended_by(
    attend_hits: Callable[..., None],
    attend_rest: Callable[..., None],
    case: dict[str, object],
    *,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Attention to the pages of a case of ``attend_pages``, some of them hits, in two parts; the
    last request does not take part, and what it has stays 7."""
    q_BHGD, slots_BHE = case["q_BHGD"], case["slots_BHK"]
    generator = torch.Generator().manual_seed(seed)
    num_selected = slots_BHE.shape[2] - 1
    hits_BH = torch.randint(0, num_selected + 1, slots_BHE.shape[:2], generator=generator)
    hits_BH[0, 0] = num_selected
    count_B = torch.full((len(q_BHGD),), num_selected, dtype=torch.int32)
    count_B[-1] = 0
    selected = Selected(
        slots_BHK=slots_BHE[..., :-1].contiguous(),
        num_hits_BH=hits_BH.int().to(q_BHGD.device),
        count_B=count_B.to(q_BHGD.device),
        tail_slots_BH=slots_BHE[..., -1].contiguous(),
        tail_tokens_B=case["tail_tokens_B"],
    )
    page_size = case["arena_NTCD"].shape[1]
    partials = make_partials(selected, q_BHGD, page_size=page_size)
    for part in partials:
        part.fill_(math.nan)  # what nothing was written to must not count
    out_BHGD, lse_BHG = torch.full_like(q_BHGD, 7), q_BHGD.new_full(q_BHGD.shape[:3], 7).float()
    given = q_BHGD, case["arena_NTCD"], selected, partials, case["scale"]
    attend_hits(*given)
    attend_rest(*given, out_BHGD, lse_BHG)
    assert (out_BHGD[-1] == 7).all() and (lse_BHG[-1] == 7).all()
    return out_BHGD[:-1], lse_BHG[:-1]


def naive_copy(dst_RX: Tensor, src_RX: Tensor, *, dst_rows_M: Tensor, src_rows_M: Tensor) -> Tensor:
    expected_RX = dst_RX.clone()
    for dst_row, src_row in zip(dst_rows_M.tolist(), src_rows_M.tolist(), strict=True):
        if src_row >= 0:
            expected_RX[dst_row] = src_RX[src_row]
    return expected_RX


def naive_store(
    arena_NTCD: Tensor, *, slots_BH: Tensor, offsets_B: Tensor, k_BHD: Tensor, v_BHD: Tensor
) -> Tensor:
    expected_NTCD = arena_NTCD.clone()
    for request, slots in enumerate(slots_BH.tolist()):
        for head, slot in enumerate(slots):
            if slot >= 0:
                token_CD = expected_NTCD[slot, int(offsets_B[request])]
                token_CD[0], token_CD[1] = k_BHD[request, head], v_BHD[request, head]
    return expected_NTCD


def naive_bounds(pages_MTCD: Tensor, *, minmax: bool) -> Tensor:
    keys_MTD = pages_MTCD.cpu().double()[:, :, 0]
    bounds_M2D = torch.empty(len(keys_MTD), 2, keys_MTD.shape[2], dtype=torch.float64)
    for page, keys_TD in enumerate(keys_MTD):
        upper_D, lower_D = keys_TD.amax(0), keys_TD.amin(0)
        if not minmax:
            center_D = (upper_D + lower_D) / 2
            radius_D = sum((key_D - center_D).abs() for key_D in keys_TD) / len(keys_TD)
            upper_D, lower_D = center_D + radius_D, center_D - radius_D
        bounds_M2D[page, 0], bounds_M2D[page, 1] = upper_D, lower_D
    return bounds_M2D


def naive_score(query_BHE: Tensor, summaries_FXE: Tensor, *, rows_BHF: Tensor) -> Tensor:
    dim = query_BHE.shape[2] // 2
    query_BHD = query_BHE.cpu().double().unflatten(2, (2, dim)).sum(2)
    bounds_FX2D = summaries_FXE.cpu().double().unflatten(2, (2, dim))
    scores_BHFX = torch.full((*rows_BHF.shape, summaries_FXE.shape[1]), -math.inf).double()
    for request, lanes in enumerate(rows_BHF.tolist()):
        for head, rows in enumerate(lanes):
            for frame, row in enumerate(rows):
                if row >= 0:
                    corners = query_BHD[request, head] * bounds_FX2D[row]
                    scores_BHFX[request, head, frame] = corners.amax(1).sum(1)
    return scores_BHFX.flatten(2)


def int8_bounds(
    rows: int, frame_pages: int, dim: int, *, dtype: torch.dtype, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Summaries in 8 bits, upper not below lower, and the scales of their pages in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(-127, 128, (2, rows, frame_pages, dim), generator=generator)
    bounds = torch.cat((corners.amax(0), corners.amin(0)), dim=-1).to(torch.int8)
    return bounds, torch.rand(rows, frame_pages, generator=generator).add(0.1).div(99).to(dtype)


def resident_plan(
    rows: Sequence[int], lengths: Sequence[int], *, split_tokens: int = 256, max_items: int = 32
) -> ResidentPlan:
    """Items of ``split_tokens``; the room for more of them would lead a reader out of memory."""
    items = [
        (b, start, min(start + split_tokens, length))
        for b, length in enumerate(lengths)
        for start in range(0, length, split_tokens)
    ]
    first_items = [sum(item[0] < b for item in items) for b in range(len(lengths))]
    items_I3 = [*items, *[(1 << 30,) * 3] * (max_items - len(items))]
    parts = (list(rows), list(lengths), items_I3, first_items, [len(items)])
    return ResidentPlan(*(torch.tensor(part, dtype=torch.int32) for part in parts))


def resident_case(
    *,
    lengths: Sequence[int] = (5, 0, 300),
    queries: int = 1,
    heads: int = 2,
    group: int = 3,
    dim: int = 64,
    page_size: int = 32,
    split_tokens: int = 256,
    programs: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, object]:
    """Arguments of ``attend_resident``; room that must not be read, and every layer but the one
    asked for, holds NaN. Length 0 is padding; rows, frames and blocks lie in no order."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-length // BLOCK_TOKENS) for length in lengths]
    pages_per_block, layer = BLOCK_TOKENS // page_size, 1
    blocks = torch.randperm(heads * sum(num_blocks) + 1, generator=generator).tolist()
    rows = torch.randperm(len(lengths) + 2, generator=generator).tolist()[: len(lengths)]
    arena_NTCD = torch.full((len(blocks) * pages_per_block, page_size, 2, dim), math.nan)
    spare = sum(num_blocks) + 2
    frames = torch.randperm(spare, generator=generator).tolist()
    frames_RF = torch.full((len(lengths) + 2, max(num_blocks) + 1), spare, dtype=torch.int32)
    page_slot_MLHP = torch.full((spare + 1, 3, heads, pages_per_block), -1, dtype=torch.int32)
    for row, length in zip(rows, lengths, strict=True):
        for start in range(0, length, BLOCK_TOKENS):
            frame = frames_RF[row, start // BLOCK_TOKENS] = frames.pop()
            for head in range(heads):
                first, count = blocks.pop() * pages_per_block, min(BLOCK_TOKENS, length - start)
                arena_NTCD[first : first + pages_per_block].view(-1, 2, dim)[:count] = torch.randn(
                    count, 2, dim, generator=generator
                )
                for page in range(-(-count // page_size)):
                    page_slot_MLHP[frame, layer, head, page] = first + page
    q_NXD = random(len(lengths) * queries, heads * group + 2, dim, dtype=dtype, seed=seed + 1)
    return {
        "q_NHD": q_NXD[:, : heads * group],
        "arena_NTCD": arena_NTCD.to(dtype),
        "frames_RF": frames_RF,
        "page_slot_MLHP": page_slot_MLHP,
        "layer": layer,
        "plan": resident_plan(rows, lengths, split_tokens=split_tokens),
        "scale": dim**-0.5,
        "programs": programs,
    }


def naive_resident(
    q_NHD: Tensor,
    arena_NTCD: Tensor,
    *,
    frames_RF: Tensor,
    page_slot_MLHP: Tensor,
    layer: int,
    plan: ResidentPlan,
    scale: float,
    programs: int,
) -> Tensor:
    num_heads, page_size = page_slot_MLHP.shape[2], arena_NTCD.shape[1]
    num_queries, group = len(q_NHD) // len(plan.rows_B), q_NHD.shape[1] // num_heads
    q_NHD, tokens_nCD = q_NHD.cpu().double(), arena_NTCD.cpu().double().flatten(0, 1)
    o_NHD = torch.zeros_like(q_NHD)
    for b, row in enumerate(plan.rows_B.tolist()):
        length = int(plan.lengths_B[b])
        for head in range(num_heads if length else 0):
            frames = frames_RF[row, : -(-length // BLOCK_TOKENS)].tolist()
            starts = [int(page_slot_MLHP[i, layer, head, 0]) * page_size for i in frames]
            kv_WCD = torch.cat([tokens_nCD[start : start + BLOCK_TOKENS] for start in starts])
            for query in range(num_queries):
                k_WD, v_WD = kv_WCD[: length - num_queries + 1 + query].unbind(1)
                lanes = (b * num_queries + query, slice(head * group, (head + 1) * group))
                o_NHD[lanes] = (q_NHD[lanes] @ k_WD.T * scale).softmax(1) @ v_WD
    return o_NHD


def rotate_case(
    *,
    tokens: int = 5,
    heads: int = 3,
    dim: int = 64,
    norm: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, object]:
    """Arguments of ``rotate_heads``; each row of heads goes on, as values do after keys."""
    angles_NF = random(tokens, dim // 2, seed=seed).double() * 9
    cos_NF, sin_NF = angles_NF.cos(), angles_NF.sin()
    return {
        "heads_NHD": random(tokens, heads + 2, dim, dtype=dtype, seed=seed + 1)[:, :heads],
        "cos_ND": torch.cat((cos_NF, cos_NF), dim=1).to(dtype),
        "sin_ND": torch.cat((-sin_NF, sin_NF), dim=1).to(dtype),
        "norm_HD": random(heads, dim, dtype=dtype, seed=seed + 2) if norm else None,
        "eps": 0.1,  # large, so that it shows
    }


def naive_rotate(
    heads_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor, *, norm_HD: Tensor | None, eps: float
) -> Tensor:
    heads_NHD = heads_NHD.cpu().double()
    if norm_HD is not None:
        mean_NH1 = heads_NHD.square().mean(2, keepdim=True)
        heads_NHD = heads_NHD / (mean_NH1 + eps).sqrt() * norm_HD.cpu().double()
    half = heads_NHD.shape[2] // 2
    o_NHD = torch.empty_like(heads_NHD)
    for token in range(len(heads_NHD)):
        for i in range(half):
            cos, sin = float(cos_ND[token, i]), float(sin_ND[token, i + half])
            x_H, y_H = heads_NHD[token, :, i], heads_NHD[token, :, i + half]
            o_NHD[token, :, i], o_NHD[token, :, i + half] = (
                x_H * cos - y_H * sin,
                y_H * cos + x_H * sin,
            )
    return o_NHD


def naive_silu_mul(gate_up_NF: Tensor) -> Tensor:
    gate, up = gate_up_NF.cpu().double().chunk(2, dim=1)
    return gate / (1 + torch.exp(-gate)) * up


def merge_case(
    *,
    requests: int = 2,
    heads: int = 3,
    group: int = 9,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """Arguments of ``merge_states``, no two with the same strides, with sets that are empty."""
    o_a_BHGD = random(heads, group, requests, dim + 3, dtype=dtype, seed=seed)[..., :dim]
    o_b_BHGD = random(requests, group, heads, dim, dtype=dtype, seed=seed + 1)
    lse_a_BHG = random(group, heads, requests, seed=seed + 2) * 9
    lse_b_BHG = random(requests, heads, group, seed=seed + 3) * 9
    lse_a_BHG = lse_a_BHG.permute(2, 1, 0)
    lse_a_BHG[..., :2] = lse_b_BHG[..., 1:3] = -math.inf  # of a, of both, of b
    return [o_a_BHGD.permute(2, 0, 1, 3), lse_a_BHG, o_b_BHGD.transpose(1, 2), lse_b_BHG]


def naive_merge(
    o_a_BHGD: Tensor, lse_a_BHG: Tensor, o_b_BHGD: Tensor, lse_b_BHG: Tensor
) -> tuple[Tensor, Tensor]:
    o_BHGD = torch.zeros(o_a_BHGD.shape, dtype=torch.float64)
    lse_BHG = torch.full(lse_a_BHG.shape, -math.inf, dtype=torch.float64)
    for row in itertools.product(*map(range, lse_BHG.shape)):
        weights = [math.exp(lse[row]) for lse in (lse_a_BHG, lse_b_BHG)]
        if sum(weights):
            parts = (o_a_BHGD[row].cpu().double(), o_b_BHGD[row].cpu().double())
            o_BHGD[row] = (weights[0] * parts[0] + weights[1] * parts[1]) / sum(weights)
            lse_BHG[row] = math.log(sum(weights))
    return o_BHGD, lse_BHG


TEMPERATURES = (0.0, 1e-3, 0.2, 1.0, 1.7, 100.0)


def draw_plan(**columns: Sequence[int] | Sequence[float]) -> DrawPlan:
    """A plan of these columns; ``key`` are integers of 128 bits, of others the default is no cut."""
    rows = len(columns["key"])
    keys_B4 = [[key >> 32 * word & 0xFFFFFFFF for word in range(4)] for key in columns["key"]]
    defaults = {"index": 0, "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0}
    values = [
        torch.tensor(
            columns.get(name, [default] * rows),
            dtype=torch.int32 if isinstance(default, int) else torch.float32,
        )
        for name, default in defaults.items()
    ]
    key_4B = torch.from_numpy(
        np.array(keys_B4, dtype=np.uint32).reshape(rows, 4).T.copy().view(np.int32)
    )
    return DrawPlan(key_4B, *values)


def draw_case(
    *, rows: int = 24, vocab: int = 700, spread: float = 3.0, ties: bool = False, seed: int = 0
) -> tuple[Tensor, DrawPlan]:
    """Logits and a plan of every cut, none and all of them."""
    numbers = np.random.default_rng(seed)
    logits_BV = random(rows, vocab, seed=seed) * spread
    if ties:  # as logits computed in 16 bits have them, and -0.0 beside 0.0
        logits_BV = (logits_BV * 2).round() / 2
    plan = draw_plan(
        key=[int.from_bytes(numbers.bytes(16), "little") for _ in range(rows)],
        index=numbers.integers(0, 1000, rows),
        temperature=numbers.choice(TEMPERATURES, rows),
        top_p=numbers.choice([0.0, 1e-6, 0.30710678, 0.90710678, 0.99931234, 1.0], rows),
        min_p=numbers.choice([0.0, 0.0, 0.0513, 0.513, 1.0], rows),
        top_k=numbers.choice([0, 0, 1, 5, 100, 1500, 2**31 - 1], rows),
    )
    return logits_BV, plan


def fair_draws(tokens_B: Tensor, logits_BV: Tensor, plan: DrawPlan, *, slack: float) -> list[bool]:
    """Whether each token is that of the definitions, or was within ``slack`` of a boundary."""
    keys = plan.key_4B.T.contiguous().numpy().view(np.uint64)
    rows = zip(tokens_B.tolist(), logits_BV.double().numpy(), keys, *plan[1:], strict=True)
    return [
        any(_is_fair(*map(_plain, row), slack=slack, shift=shift) for shift in (0, -slack, slack))
        for row in rows
    ]


def _plain(value: object) -> object:
    return value.item() if isinstance(value, Tensor) else value


def _is_fair(
    token: int, logits_V: np.ndarray, key: np.ndarray, index: int, temperature: float,
    top_p: float, min_p: float, top_k: int, *, slack: float, shift: float,
) -> bool:  # fmt: skip
    if temperature == 0.0:
        return token == int(logits_V.argmax())
    weights_V = np.exp((logits_V - logits_V.max()) / temperature)
    order = np.argsort(-logits_V, kind="stable")
    order = order[weights_V[order] >= min_p * (1 + shift)]
    order = order[: top_k or None]
    if top_p < 1.0:
        shares = weights_V[order].cumsum() / weights_V[order].sum()
        order = order[: int((shares < top_p * (1 + shift)).sum()) + 1]
    kept_V = np.zeros(len(logits_V), dtype=bool)
    kept_V[order] = True
    shares_V = np.where(kept_V, weights_V, 0.0).cumsum() / weights_V[kept_V].sum()
    number = np.random.Generator(np.random.Philox(key=key, counter=index)).random()
    before = shares_V[token - 1] if token else 0.0
    return kept_V[token] and before - slack <= number < shares_V[token] + slack


@triton.jit
def _uniform_kernel(key_4B: tl.tensor, index_B: tl.tensor, out_B: tl.tensor) -> None:
    b, rows = tl.program_id(0), tl.num_programs(0)
    tl.store(out_B + b, sample._uniform(key_4B + b, rows, tl.load(index_B + b)))


def uniforms(key_4B: Tensor, index_B: Tensor) -> Tensor:
    """The numbers that a kernel draws with, (B,) float64."""
    out_B = torch.empty(len(index_B), dtype=torch.float64, device=index_B.device)
    _uniform_kernel[(len(index_B),)](key_4B, index_B, out_B)
    return out_B


def numpy_uniforms(plan: DrawPlan) -> list[float]:
    keys = plan.key_4B.T.contiguous().numpy().view(np.uint64)
    return [
        np.random.Generator(np.random.Philox(key=key, counter=index)).random()
        for key, index in zip(keys, plan.index_B.tolist(), strict=True)
    ]


def select_case(
    *,
    pages: Sequence[int] = (300, 53, 4, 0, 129, 200),
    heads: int = 2,
    group: int = 3,
    columns: int = 40,
    spread: float = 3.0,
    ties: bool = False,
    seed: int = 0,
) -> dict[str, object]:
    """Logits, NaN in the columns of no page. With ``ties`` few columns repeat, and between those
    that differ there is room for rounding."""
    numbers = np.random.default_rng(seed)
    room = -(-max(pages) // 4) * 4 + 4 * int(numbers.integers(0, 2))
    logits_BHGP = torch.full((len(pages), heads, group, room), math.nan)
    for b, num in enumerate(pages):
        logits_HGP = random(heads, group, num, seed=seed + b) * spread
        if ties and num:
            chosen = torch.from_numpy(numbers.integers(0, min(num, 6), num))
            logits_HGP = logits_HGP[..., chosen]
        logits_BHGP[b, ..., :num] = logits_HGP
    sink, recent = int(numbers.integers(0, 3)), int(numbers.integers(0, 4))
    counts = numbers.choice([0, 1, 3, sink + recent, sink + recent + 1, 9, columns], len(pages))
    return {
        "logits_BHGP": logits_BHGP,
        "num_full_B": torch.tensor(pages, dtype=torch.int32),
        "count_B": torch.from_numpy(counts.astype(np.int32)).clamp(max=columns),
        "sink_pages": sink,
        "recent_pages": recent,
        "out_BHK": torch.full((len(pages), heads, columns), 77, dtype=torch.int32),
    }


def selected_by(select: Callable[..., None], case: dict[str, object]) -> Tensor:
    """What ``select`` writes into an output of its own, rising."""
    out_BHK = torch.full_like(case["out_BHK"], 77)
    select(**{**case, "out_BHK": out_BHK})
    return rising(out_BHK)


def rising(out_BHK: Tensor) -> Tensor:
    """Ids in order; -1 must come last, and stays there."""
    is_page_BHK, most = out_BHK >= 0, torch.iinfo(torch.int32).max
    assert not (is_page_BHK.diff(dim=-1) & is_page_BHK[..., 1:]).any()
    rising_BHK = out_BHK.masked_fill(~is_page_BHK, most).sort(dim=-1).values
    return torch.where(rising_BHK == most, -1, rising_BHK)


def _ranked_pages(case: dict[str, object]) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """Request, head, how many are wanted, and the scores with the forced pages above all."""
    for b, logits_HGP in enumerate(case["logits_BHGP"].double().cpu().numpy()):
        num_full, count = int(case["num_full_B"][b]), int(case["count_B"][b])
        for head, logits_GP in enumerate(logits_HGP):
            scores_P = np.zeros(num_full)
            for logits_P in logits_GP[:, :num_full]:
                weights_P = np.exp(logits_P - logits_P.max(initial=-math.inf))
                scores_P += weights_P / weights_P.sum()
            scores_P[scores_P < 2.0**-40] = 0.0
            page_P = np.arange(num_full)
            forced_P = page_P < case["sink_pages"]
            forced_P |= page_P >= num_full - case["recent_pages"]
            yield b, head, min(count, num_full), np.where(forced_P, math.inf, scores_P)


def naive_select(**case: object) -> Tensor:
    """By a sort in float64. Rounded, so that columns that repeat tie wherever they lie."""
    out_BHK = torch.full_like(case["out_BHK"], -1, device="cpu")
    for b, head, count, scores_P in _ranked_pages(case):
        best = np.argsort(-scores_P.astype(np.float32), kind="stable")[:count]
        out_BHK[b, head, :count] = torch.from_numpy(np.sort(best))
    return out_BHK


def fair_selections(out_BHK: Tensor, case: dict[str, object], *, slack: float) -> list[bool]:
    """Whether each lane has as many as it wants, and no other is better by ``slack``."""
    fair = []
    for b, head, count, scores_P in _ranked_pages(case):
        ids = out_BHK[b, head, :count].tolist()
        rest = np.delete(scores_P, ids)
        whole = ids == sorted(set(ids)) and (out_BHK[b, head, count:] == -1).all()
        enough = not ids or scores_P[ids].min() >= rest.max(initial=0.0) * (1 - slack)
        fair.append(bool(whole and enough))
    return fair


def page_tables(
    *,
    rows: int = 3,
    layers: int = 2,
    heads: int = 2,
    page_size: int = 32,
    row_frames: int = 6,
    num_blocks: Sequence[int] = (3,),
    seed: int = 0,
) -> PageTables:
    """Empty tables; frames and blocks lie in no order, lanes own ``num_blocks`` of them in turn."""
    generator = torch.Generator().manual_seed(seed)
    pages_per_block, num_frames = BLOCK_TOKENS // page_size, rows * row_frames
    lanes = rows * layers * heads
    counts = torch.tensor(list(num_blocks) * lanes)[:lanes]
    blocks = torch.randperm(int(counts.sum()) + 2, generator=generator).tolist()
    lane_blocks = [
        [blocks.pop() if i < count else -1 for i in range(max(num_blocks))] for count in counts
    ]
    num_slots = (int(counts.sum()) + 2) * pages_per_block
    spare = torch.full((1, row_frames), num_frames)
    frames = torch.randperm(num_frames, generator=generator).view(rows, row_frames)
    spare_blocks = torch.full((1, layers, heads, max(num_blocks)), -1)
    blocks_RLHN = torch.tensor(lane_blocks).view(rows, layers, heads, -1)
    counts_RLH = torch.cat((counts.view(rows, layers, heads), torch.zeros(1, layers, heads)))
    return PageTables(
        frames_RF=torch.cat((frames, spare)).int(),
        page_slot_X=torch.full(
            ((num_frames + 1) * layers * heads * pages_per_block,), -1, dtype=torch.int32
        ),
        lane_blocks_RLHN=torch.cat((blocks_RLHN, spare_blocks)).int(),
        num_blocks_RLH=counts_RLH.int(),
        slot_page_N=torch.full((num_slots,), -1, dtype=torch.int32),
        slot_step_N=torch.full((num_slots,), FREE_STEP, dtype=torch.int32),
    )


def resolved(requests: int, columns: int, tables: PageTables) -> Resolved:
    """Room for the results of a layer, and for the misses of all; it holds other numbers."""
    num_rows, layers, heads = tables.num_blocks_RLH.shape
    slots_BHK = torch.full((requests, heads, columns), 77, dtype=torch.int32)
    room_M = torch.full((slots_BHK.numel() * layers,), -77)
    return Resolved(
        slots_BHK=slots_BHK,
        num_hits_BH=slots_BHK[:, :, 0].clone(),
        tail_slots_BH=slots_BHK[:, :, 0].clone(),
        miss_dst_M=room_M,
        miss_src_M=room_M.clone(),
        num_misses_1=torch.zeros(1, dtype=torch.int32),
        window_RLH=torch.zeros(num_rows, layers, heads, dtype=torch.int32),
        demand_RLH2=torch.zeros(num_rows, layers, heads, 2, dtype=torch.int32),
        counters_4=torch.zeros(4, dtype=torch.int64),
    )


def sealed(requests: int, tables: PageTables) -> Sealed:
    room_M = torch.full((requests * tables.num_blocks_RLH[0].numel(),), -77)
    return Sealed(room_M, room_M.clone(), torch.zeros(1, dtype=torch.int32))


def decode_steps(
    tables: PageTables, *, page_size: int, columns: int, steps: int, seed: int = 0
) -> Iterator[tuple[int, list[int], list[int], Tensor]]:
    """Step, rows and positions of a decode, and pages selected (B, L, H, K), much as before.

    Some steps lie far apart, some requests pause, and the batch is padded; the pages of padding
    and of a row before its first full page are of the kind that must not be looked at.
    """
    numbers = np.random.default_rng(seed)
    spare_row, row_frames = len(tables.frames_RF) - 1, tables.frames_RF.shape[1]
    _, layers, heads = tables.num_blocks_RLH.shape
    last = row_frames * BLOCK_TOKENS - 1
    positions = numbers.integers(0, max(last - steps, 1), spare_row)
    favourites = numbers.random((spare_row, layers, heads, last // page_size + 1))
    step = 0
    for _ in range(steps):
        rows = numbers.permutation(spare_row)[: numbers.integers(1, spare_row + 1)].tolist()
        rows.insert(int(numbers.integers(0, len(rows) + 1)), spare_row)
        pages = torch.full((len(rows), layers, heads, columns), -1, dtype=torch.int32)
        for b, row in enumerate(rows):
            full = int(positions[row]) // page_size if row < spare_row else row_frames
            for layer, head in itertools.product(range(layers), range(heads)):
                taste = favourites[min(row, spare_row - 1), layer, head, :full]
                taste += numbers.random(full) * 0.3 - 0.15
                chosen = np.sort(np.argsort(taste)[: numbers.integers(0, columns + 1)])
                pages[b, layer, head, : len(chosen)] = torch.from_numpy(chosen)
        yield step, rows, [int(positions[row]) if row < spare_row else 3 for row in rows], pages
        for row in rows:
            if row < spare_row:
                positions[row] = min(positions[row] + 1, last)
        step += int(numbers.choice([1, 1, 1, 1, 1, 2, 5, 80]))


def mean_keys_case(
    *,
    requests: int = 3,
    heads: int = 2,
    group: int = 3,
    dim: int = 64,
    num_dims: int = 40,
    frame_pages: int = 16,
    row_frames: int = 9,
    layers: int = 2,
    columns: int = 21,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, object]:
    """Arguments of ``select_by_mean_keys``; one request has no full page."""
    numbers = torch.Generator().manual_seed(seed)
    num_frames = row_frames * 3
    lanes = num_frames * layers * heads
    means = random(lanes * frame_pages, num_dims, seed=seed + 1)
    codes, scales = reference_mean_keys.pack_means(means)
    codes = codes.view(lanes, frame_pages, -1, 4).transpose(1, 2).reshape(lanes, -1)
    scales = scales.view(lanes, frame_pages).contiguous().view(torch.uint8)
    store_MY = torch.cat((codes, scales), dim=1)
    pages = torch.randint(1, row_frames * frame_pages, (requests,), generator=numbers)
    pages[0], pages[-1] = row_frames * frame_pages, pages[-1] if requests == 1 else 0
    frames = torch.randperm(num_frames, generator=numbers).view(3, row_frames)
    return {
        "q_BHGD": random(requests, heads, group, dim, dtype=dtype, seed=seed + 2),
        "store_MY": torch.nn.functional.pad(store_MY, (0, -store_MY.shape[1] % 4), value=77),
        "basis_HDR": random(heads, dim, num_dims, seed=seed + 3) / 8,
        "rows_B": torch.randint(0, 3, (requests,), generator=numbers).int(),
        "frames_RF": frames.int(),
        "num_full_B": pages.int(),
        "count_B": torch.randint(0, columns + 1, (requests,), generator=numbers).int(),
        "layer": layers - 1,
        "num_layers": layers,
        "pages_per_frame": frame_pages,
        "scale": 0.125,
        "sink_pages": 1,
        "recent_pages": 2,
        "max_pages": row_frames * frame_pages,
        "out_BHK": torch.full((requests, heads, columns), 77, dtype=torch.int32),
    }


def logits_of_mean_keys(case: dict[str, object]) -> dict[str, object]:
    """The same as arguments of ``select_pages``: logits page by page in float64, of queries in 127
    steps of their largest value."""
    q_BHGD, basis_HDR = (case[name].cpu().double() for name in ("q_BHGD", "basis_HDR"))
    store_MY, frames_RF = case["store_MY"].cpu(), case["frames_RF"].tolist()
    heads, per_frame, half = len(basis_HDR), case["pages_per_frame"], basis_HDR.shape[2] // 2
    pages_B = case["num_full_B"].cpu()
    shape = (len(q_BHGD), heads, q_BHGD.shape[2], int(pages_B.max()))
    logits_BHGP = torch.zeros(shape, dtype=torch.float64)
    for b, row in enumerate(case["rows_B"].tolist()):
        for page, head in itertools.product(range(int(pages_B[b])), range(heads)):
            frame, place = frames_RF[row][page // per_frame], page % per_frame
            kept_Y = store_MY[(frame * case["num_layers"] + case["layer"]) * heads + head]
            codes = kept_Y[: half * per_frame].view(-1, per_frame, 4)[:, place].flatten().int()
            scale = kept_Y[half * per_frame :].view(torch.float16)[place].double()
            mean_R = (torch.cat((codes & 15, codes >> 4)).double() - 8) * scale
            q_GR = q_BHGD[b, head] @ basis_HDR[head]
            step_G1 = q_GR.abs().amax(1, keepdim=True) / 127
            logits_G = (q_GR / step_G1).round() * step_G1 @ mean_R * case["scale"]
            logits_BHGP[b, head, :, page] = logits_G
    same = ("num_full_B", "count_B", "sink_pages", "recent_pages", "out_BHK")
    return {"logits_BHGP": logits_BHGP} | {name: case[name] for name in same}


def summarise_case(
    *,
    pages: int = 30,
    page_size: int = 8,
    dim: int = 64,
    num_dims: int = 40,
    lanes: int = 4,
    num_frames: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, object]:
    """Arguments of ``summarise_pages``: different pages in any order, one of centres alone."""
    numbers = torch.Generator().manual_seed(seed)
    per_frame = BLOCK_TOKENS // page_size
    num_rows = num_frames * lanes * per_frame
    rows = torch.randperm(num_rows, generator=numbers)[:pages]
    pages_MTCD = random(len(rows), page_size, 2, dim, dtype=dtype, seed=seed + 1)
    # Of few bits, so that the mean of a page of them is exact and nothing is left of it.
    centre_ND = random(lanes, dim, dtype=torch.bfloat16, seed=seed + 2).float()
    for i, row in enumerate(rows[:1]):
        pages_MTCD[i, :, 0] = centre_ND[row // per_frame % lanes].to(dtype)
    row_bytes = -(-per_frame * (num_dims // 2 + 2) // 4) * 4
    return {
        "pages_MTCD": pages_MTCD,
        "page_rows_M": rows,
        "basis_NDR": random(lanes, dim, num_dims, seed=seed + 3),
        "centre_ND": centre_ND,
        "pages_per_frame": per_frame,
        "store_SY": torch.full((num_frames * lanes, row_bytes), 77, dtype=torch.uint8),
    }


def summarised_by(summarise: Callable[..., None], case: dict[str, object]) -> Tensor:
    """The store after ``summarise``, which has one of its own."""
    store_SY = torch.full_like(case["store_SY"], 77)
    summarise(**{**case, "store_SY": store_SY})
    return store_SY


def same_summaries(store_SY: Tensor, expected_SY: Tensor, *, per_frame: int) -> bool:
    """The same but for rounding: few codes one step off, few scales by their last bit."""
    half = (store_SY.shape[1] // per_frame - 2) // 4 * 4
    steps = [
        torch.cat((codes & 15, codes >> 4)).int()
        for codes in (part[:, : half * per_frame].cpu() for part in (store_SY, expected_SY))
    ]
    scales = [
        part[:, half * per_frame :][:, : 2 * per_frame]
        .cpu()
        .contiguous()
        .view(torch.float16)
        .float()
        for part in (store_SY, expected_SY)
    ]
    off = (steps[0] - steps[1]).abs()
    close = torch.allclose(*scales, rtol=2e-3, atol=1e-7)
    return close and int(off.max()) <= 1 and float(off.float().mean()) < 2e-3


def split_query(q_BHD: Tensor) -> Tensor:
    return torch.cat((q_BHD.clamp(min=0), q_BHD.clamp(max=0)), dim=-1)


@pytest.fixture(scope="session")
def cases() -> SimpleNamespace:
    """The builders and the oracles of this file."""
    return SimpleNamespace(
        tolerance=TOLERANCE,
        random=random,
        random_slots=random_slots,
        split_query=split_query,
        attend=attend_case,
        attended_by=attended_by,
        naive_attend=naive_attend,
        naive_copy=naive_copy,
        naive_store=naive_store,
        naive_bounds=naive_bounds,
        naive_score=naive_score,
        int8_bounds=int8_bounds,
        resident=resident_case,
        resident_plan=resident_plan,
        naive_resident=naive_resident,
        rotate=rotate_case,
        naive_rotate=naive_rotate,
        naive_silu_mul=naive_silu_mul,
        merge=merge_case,
        naive_merge=naive_merge,
        draw=draw_case,
        draw_plan=draw_plan,
        fair_draws=fair_draws,
        page_tables=page_tables,
        resolved=resolved,
        sealed=sealed,
        decode_steps=decode_steps,
        uniforms=uniforms,
        select=select_case,
        selected_by=selected_by,
        rising=rising,
        naive_select=naive_select,
        fair_selections=fair_selections,
        numpy_uniforms=numpy_uniforms,
        mean_keys=mean_keys_case,
        logits_of_mean_keys=logits_of_mean_keys,
        summarise=summarise_case,
        summarised_by=summarised_by,
        same_summaries=same_summaries,
    )


@pytest.fixture(autouse=True)
def poisoned_memory() -> object:
    """Fresh memory holds NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
