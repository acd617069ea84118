"""Twins of ``kernels.estimate`` and ``kernels.summarise`` in plain torch.

Shape legend as there; in ``pack_means`` N are pages, W the values of 16 bits of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsed.kernels.levels import to_levels

CODE_ZERO = 8
MAX_CODE = 7
MAX_QUERY_LEVEL = 127
_PART_PAGES = 1024  # summarised at once: each takes a copy of its lane's basis


def estimate_pages(
    q_BHGD: Tensor,
    store_MY: Tensor,
    *,
    basis_HDR: Tensor,
    rows_B: Tensor,
    frames_RF: Tensor,
    num_full_B: Tensor,
    first_B: Tensor,
    layer: int,
    num_layers: int,
    pages_per_frame: int,
    scale: float,
    out_HGX: Tensor,
) -> None:
    num_heads = q_BHGD.shape[1]
    heads_H = torch.arange(num_heads, device=q_BHGD.device)
    queries_BHGR = round_queries(q_BHGD.float() @ basis_HDR)
    for b, (row, num_full, first) in enumerate(
        zip(rows_B.tolist(), num_full_B.tolist(), first_B.tolist(), strict=True)
    ):
        num_frames = -(-num_full // pages_per_frame)
        frames_F = frames_RF[row, :num_frames].long()
        lanes_HF = (frames_F * num_layers + layer) * num_heads + heads_H[:, None]
        means_HXR = read_means(store_MY[lanes_HF], pages_per_frame=pages_per_frame)
        logits_HGX = queries_BHGR[b] @ means_HXR.transpose(1, 2) * scale
        out_HGX[..., first : first + num_full] = logits_HGX[..., :num_full]


def round_queries(q_BHGR: Tensor) -> Tensor:
    """Queries in the kept dims as the kernel multiplies them: whole steps of a scale of each."""
    peak_BHG1 = q_BHGR.abs().amax(-1, keepdim=True)
    step_BHG1 = torch.where(peak_BHG1 == 0.0, 1.0, peak_BHG1 / MAX_QUERY_LEVEL)
    return (q_BHGR / step_BHG1).round_() * step_BHG1


def read_means(rows_HFY: Tensor, *, pages_per_frame: int) -> Tensor:
    """The kept means (H, F * P, R), float32, of rows (H, F, Y)."""
    num_heads, num_frames, num_bytes = rows_HFY.shape
    half_dims = num_bytes // pages_per_frame - 2
    codes = rows_HFY[..., : half_dims * pages_per_frame]
    words = codes.reshape(num_heads, num_frames, half_dims // 4, pages_per_frame, 4)
    codes_HFRP = words.transpose(3, 4).flatten(2, 3)
    scales = rows_HFY[..., half_dims * pages_per_frame :].contiguous().view(torch.float16)
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
