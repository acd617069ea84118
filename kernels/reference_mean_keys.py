"""Twins of ``kernels.mean_keys`` and ``kernels.summarise`` in plain torch.

Shape legend as there; in ``pack_means`` N are pages, W the values of 16 bits of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsed.kernels.levels import to_levels
from sparsed.kernels.reference_select import select_pages

CODE_ZERO = 8
MAX_CODE = 7
MAX_QUERY_LEVEL = 127
_PART_PAGES = 1024  # summarised at once: each takes a copy of its lane's basis


def select_by_mean_keys(
    q_BHGD: Tensor,
    store_MY: Tensor,
    *,
    basis_HDR: Tensor,
    rows_B: Tensor,
    frames_RF: Tensor,
    num_full_B: Tensor,
    count_B: Tensor,
    layer: int,
    num_layers: int,
    pages_per_frame: int,
    scale: float,
    sink_pages: int,
    recent_pages: int,
    max_pages: int,
    out_BHK: Tensor,
) -> None:
    """See ``kernels.mean_keys``."""
    parts = zip(q_BHGD, rows_B.tolist(), num_full_B.tolist(), count_B, out_BHK, strict=True)
    for q_HGD, row, num_full, count, out_HK in parts:
        num_frames = -(-num_full // pages_per_frame)
        logits_HGP = estimate_pages(
            q_HGD,
            store_MY,
            basis_HDR=basis_HDR,
            frames_F=frames_RF[row, :num_frames],
            layer=layer,
            num_layers=num_layers,
            pages_per_frame=pages_per_frame,
            scale=scale,
        )
        assert num_full <= max_pages
        select_pages(
            logits_HGP[None],
            num_full_B=count.new_full((1,), num_full),
            count_B=count[None],
            sink_pages=sink_pages,
            recent_pages=recent_pages,
            out_BHK=out_HK[None],
        )


def estimate_pages(
    q_HGD: Tensor,
    store_MY: Tensor,
    *,
    basis_HDR: Tensor,
    frames_F: Tensor,
    layer: int,
    num_layers: int,
    pages_per_frame: int,
    scale: float,
) -> Tensor:
    """Logits (H, G, F * P) of all pages of these frames, for the queries of one request."""
    num_heads = len(q_HGD)
    heads_H1 = torch.arange(num_heads, device=q_HGD.device)[:, None]
    lanes_HF = (frames_F.long() * num_layers + layer) * num_heads + heads_H1
    means_HXR = read_means(store_MY[lanes_HF], pages_per_frame=pages_per_frame)
    queries_HGR = round_queries(q_HGD.float() @ basis_HDR)
    return queries_HGR @ means_HXR.transpose(1, 2) * scale


def round_queries(q_HGR: Tensor) -> Tensor:
    """Queries in the kept dims as the kernel multiplies them: whole steps of a scale of each."""
    peak_HG1 = q_HGR.abs().amax(-1, keepdim=True)
    step_HG1 = torch.where(peak_HG1 == 0.0, 1.0, peak_HG1 / MAX_QUERY_LEVEL)
    return (q_HGR / step_HG1).round_() * step_HG1


def read_means(rows_HFY: Tensor, *, pages_per_frame: int) -> Tensor:
    """The kept means (H, F * P, R), float32, of rows (H, F, Y)."""
    num_heads, num_frames, num_bytes = rows_HFY.shape
    half_dims = (num_bytes // pages_per_frame - 2) // 4 * 4
    codes = rows_HFY[..., : half_dims * pages_per_frame]
    words = codes.reshape(num_heads, num_frames, half_dims // 4, pages_per_frame, 4)
    codes_HFRP = words.transpose(3, 4).flatten(2, 3)
    scales = rows_HFY[..., half_dims * pages_per_frame :].contiguous().view(torch.float16)
    scales = scales[..., :pages_per_frame]
    both_HFRP = torch.cat((codes_HFRP & 15, codes_HFRP >> 4), dim=2).float() - CODE_ZERO
    return (both_HFRP * scales.float()[:, :, None]).transpose(2, 3).flatten(1, 2)


def summarise_pages(
    pages_MTCD: Tensor,
    page_rows_M: Tensor,
    *,
    basis_NDR: Tensor,
    centre_ND: Tensor,
    pages_per_frame: int,
    store_SY: Tensor,
) -> None:
    """See ``kernels.summarise.summarise_pages``."""
    half_dims = basis_NDR.shape[2] // 2
    half_R = torch.arange(half_dims, device=store_SY.device)
    byte_R = half_R // 4 * (4 * pages_per_frame) + half_R % 4
    first_scale = half_dims // 2 * pages_per_frame
    is_kept_M = page_rows_M >= 0
    kept = pages_MTCD[is_kept_M], page_rows_M[is_kept_M]
    pages, rows = (torch.split(part, _PART_PAGES) for part in kept)
    for part_MTCD, part_M in zip(pages, rows, strict=True):
        rows_M, places_M = part_M // pages_per_frame, part_M % pages_per_frame
        lanes_M = rows_M % len(basis_NDR)
        means_MD = part_MTCD[:, :, 0].mean(1, dtype=torch.float32) - centre_ND[lanes_M]
        codes, scales_M = pack_means(torch.bmm(means_MD[:, None], basis_NDR[lanes_M])[:, 0])
        store_SY[rows_M[:, None], byte_R + 4 * places_M[:, None]] = codes
        store_SW = store_SY.view(torch.float16)
        store_SW[rows_M, first_scale + places_M] = scales_M


def pack_means(means_NR: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N, R / 2) uint8, dim r in the low and dim r + R / 2 in the high half of a byte, and
    scales (N,) float16, of means in float32."""
    steps_NR, scale_N1 = to_levels(means_NR, MAX_CODE)
    low, high = (steps_NR + CODE_ZERO).to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4), scale_N1[:, 0].half()
