"""Dense attention of prompt tiles by the fastest of torch's backends, found by measurement."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsed.engine.kvcache.streams import timer
from sparsed.kernels.dense import Backend, attend_dense

TILE_TOKENS = 1024  # only shapes in whole tiles are measured: each costs a plan of its backend
REPEATS = 3


class TileShape(NamedTuple):
    num_queries: int
    num_keys: int
    causal: bool


class DenseAttention:
    """Remembers the fastest backend of every tile shape; odd shapes take torch's own flash.

    Plans of cuDNN take a tenth of a second each and depend on the shape, so that only few shapes
    may use it.
    """

    def __init__(self, *, scale: float) -> None:
        self._scale = scale
        self._fastest: dict[TileShape, Backend] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Shapes: q (H, G, N, D); k, v (H, M, D); returns o (H, G, N, D) and lse (H, G, N)."""
        backend = self._backend(q, k, v, causal=causal)
        return attend_dense(q, k, v, causal=causal, scale=self._scale, backend=backend)

    def _backend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Backend:
        shape = TileShape(q.shape[2], k.shape[1], causal)
        whole = shape.num_queries % TILE_TOKENS == 0 and shape.num_keys % TILE_TOKENS == 0
        if not q.is_cuda or q.dtype == torch.float32 or not whole:
            return Backend.FLASH
        if shape not in self._fastest:
            self._fastest[shape] = min(
                Backend, key=lambda backend: self._seconds(backend, q, k, v, causal=causal)
            )
        return self._fastest[shape]

    def _seconds(self, backend: Backend, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> float:
        """Least of some runs, the first of which makes the plan; infinite if it cannot."""
        best = float("inf")
        for _ in range(REPEATS):
            begin, end = timer(), timer()
            begin.record()
            try:
                attend_dense(q, k, v, causal=causal, scale=self._scale, backend=backend)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # this device or shape is not supported
                return float("inf")
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end))
        return best
