"""The selector of each method."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsed.core import SparseMethod
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.sparse.base import Selector
from sparsed.engine.sparse.basis import Basis
from sparsed.engine.sparse.bounds import BoundSelector
from sparsed.engine.sparse.mean_key import MeanKeySelector


def make_selector(
    method: str,
    *,
    geometry: Geometry,
    frames_RF: Tensor,
    num_frames: int,
    dtype: torch.dtype,
    basis: Basis | None = None,
) -> Selector | None:
    """The selector of a ``sparse_method``, with room for a pool of ``num_frames`` and a spare one;
    None where nothing is ranked. ``basis``: for mean-key, which cannot be without."""
    if method == SparseMethod.DENSE:
        return None
    if method == SparseMethod.MEAN_KEY:
        assert basis is not None
        return MeanKeySelector(basis, geometry=geometry, frames_RF=frames_RF, num_frames=num_frames)
    return BoundSelector(
        minmax=method == SparseMethod.QUEST,
        geometry=geometry,
        frames_RF=frames_RF,
        num_frames=num_frames,
        dtype=dtype,
    )
