"""Inputs for the kernels, and what they must give: loops in float64, on the CPU."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

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
        naive_attend=naive_attend,
        naive_copy=naive_copy,
        naive_store=naive_store,
        naive_bounds=naive_bounds,
        naive_score=naive_score,
    )


@pytest.fixture(autouse=True)
def poisoned_memory() -> object:
    """Fresh memory holds NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
