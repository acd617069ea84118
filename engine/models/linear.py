"""A matrix product laid out for the machine it runs on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PACKED_DTYPES = (torch.float32, torch.bfloat16)


class Linear:
    """``y = x W^T + b`` with fixed weights; x (N, I), W (O, I), b (O) or None, y (N, O).

    On a CPU the weights are re-ordered once for oneDNN, because reading a plain matrix for a few
    rows uses one core and half of the memory bandwidth; the plain matrix is not kept.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self._bias_O = bias_O
        self._num_bytes = weight_OI.nbytes
        self._packed = (
            weight_OI.device.type == "cpu"
            and weight_OI.dtype in _PACKED_DTYPES
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's own
        )
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight_OI) if self._packed else weight_OI
        )

    @property
    def copied_bytes(self) -> int:
        """Bytes held besides the matrix given, 0 where that one is used as it is."""
        return self._num_bytes if self._packed else 0

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(N, O), in the dtype of x."""
        if not self._packed:
            return F.linear(x_NI, self._weight, self._bias_O)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_NI, self._weight, self._bias_O, "none", [], ""
        )
        return product

    def first_rows(self, x_NI: Tensor, num_rows: int) -> Tensor:
        """The first ``num_rows`` columns of the product, (N, num_rows)."""
        if self._packed:
            return self(x_NI)[:, :num_rows].contiguous()
        bias_O = None if self._bias_O is None else self._bias_O[:num_rows]
        return F.linear(x_NI, self._weight[:num_rows], bias_O)

    def add_to(self, out_NO: Tensor, x_NI: Tensor) -> None:
        """Add the product to ``out_NO``; on CUDA within it, so that the sum is rounded once."""
        if not out_NO.is_cuda:
            out_NO += self(x_NI)
            return
        out_NO.addmm_(x_NI, self._weight.t())
        if self._bias_O is not None:
            out_NO += self._bias_O
