"""The gated activation between the two products of an MLP."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference

_TILE = 1024


def silu_mul(gate_up_NF: Tensor) -> Tensor:
    """silu(gate) * up, the gate in the first half of the columns.

    Shapes: gate_up (N, 2 * F) contiguous; returns (N, F), the same dtype, computed in float32.
    Errors: AssertionError on other shapes.
    Source: SwiGLU, arXiv 2002.05202.
    """
    assert gate_up_NF.is_contiguous() and gate_up_NF.shape[1] % 2 == 0
    run = _launch if gate_up_NF.is_cuda else reference.silu_mul
    return run(gate_up_NF)


def _launch(gate_up_NF: Tensor) -> Tensor:
    num_rows, width = gate_up_NF.shape[0], gate_up_NF.shape[1] // 2
    out_NF = torch.empty_like(gate_up_NF[:, :width], memory_format=torch.contiguous_format)
    if num_rows:
        _silu_mul_kernel[(num_rows, triton.cdiv(width, _TILE))](
            gate_up_NF, out_NF, WIDTH=width, TILE=_TILE, enable_fp_fusion=True
        )
    return out_NF


@triton.jit
def _silu_mul_kernel(
    gate_up_NF: tl.tensor, out_NF: tl.tensor, WIDTH: tl.constexpr, TILE: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < WIDTH
    gate = tl.load(gate_up_NF + row * 2 * WIDTH + columns, mask=mask).to(tl.float32)
    up = tl.load(gate_up_NF + row * 2 * WIDTH + WIDTH + columns, mask=mask).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_NF + row * WIDTH + columns, value.to(out_NF.dtype.element_ty), mask=mask)
