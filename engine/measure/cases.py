"""Inputs of kernels at the sizes of a model: what is timed, and what it must move.

Bytes are those that a kernel cannot do without: each input once, each output once. Legend as in
the kernels' own files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from sparsed.core import Ceiling, ModelShape
from sparsed.engine.measure.clock import Work
from sparsed.kernels.bounds import page_bounds
from sparsed.kernels.gate import silu_mul
from sparsed.kernels.norm import rms_norm
from sparsed.kernels.rotate import rotate_heads
from sparsed.kernels.store import store_tokens

ROTATED_BYTES: Final = 256 << 20  # more than any L2 cache keeps
CPU_ROTATED_BYTES: Final = 64 << 20
MAX_ROTATIONS: Final = {"cpu": 4, "cuda": 256}
ROWS: Final = {"cpu": (16, 512), "cuda": (64, 8192)}  # tokens that decode, and of a chunk
EPS: Final = 1e-5


class Setting(NamedTuple):
    """Where, and at which sizes, kernels are measured."""

    device: torch.device
    dtype: torch.dtype
    shape: ModelShape
    page_size: int
    batches: Sequence[int]
    contexts: Sequence[int]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.shape.num_heads // self.shape.num_kv_heads

    @property
    def rows(self) -> tuple[int, int]:
        """Tokens that decode, and tokens of a prompt chunk."""
        return ROWS[self.device.type]

    def random(self, *shape: int) -> Tensor:
        """Normal values in the dtype of the setting."""
        return torch.empty(shape, device=self.device, dtype=self.dtype).normal_()

    def rotations(self, num_bytes: float) -> int:
        """How many inputs of so many bytes it takes that none is found in a cache."""
        kind = self.device.type
        wanted = CPU_ROTATED_BYTES if kind == "cpu" else ROTATED_BYTES
        return int(min(max(1, -(-wanted // num_bytes)), MAX_ROTATIONS[kind]))


class Case(NamedTuple):
    """One kernel on inputs of one size. ``make``: the same work on one rotated input after the
    other; none where the device has no implementation. ``amount``: bytes or FLOP of one, in the
    unit of its ceiling. ``capture``: whether it may run as a graph. ``prepared``: the first work
    comes ahead of every turn of the others, and is not timed."""

    kernel: str
    words: str
    ceiling: Ceiling
    amount: float
    make: Callable[[], Sequence[Work]]
    capture: bool = True
    prepared: bool = False


def token_cases(setting: Setting) -> Iterator[Case]:
    """Operations on single tokens, at the rows of decode and of a prompt chunk."""
    decode_rows, chunk_rows = setting.rows
    for rows in setting.rows:
        yield norm_case(setting, rows=rows)
        yield rotate_case(setting, rows=rows)
        yield gate_case(setting, rows=rows)
    yield store_case(setting, rows=decode_rows, page_tokens=1)
    yield store_case(setting, rows=chunk_rows, page_tokens=setting.page_size)
    yield bounds_case(setting, rows=chunk_rows)


def norm_case(setting: Setting, *, rows: int) -> Case:
    width = setting.shape.hidden_size
    amount = 2 * rows * width * setting.dtype.itemsize

    def make() -> Sequence[Work]:
        x_IND = setting.random(setting.rotations(amount), rows, width)
        weight_D = setting.random(width)
        return [partial(rms_norm, x_ND, weight_D, eps=EPS) for x_ND in x_IND]

    return Case("rms_norm", f"{rows} x {width}", Ceiling.COPY, amount, make)


def rotate_case(setting: Setting, *, rows: int) -> Case:
    """Queries and keys together, as they leave their product."""
    heads, dim = setting.shape.num_heads + setting.shape.num_kv_heads, setting.shape.head_dim
    amount = 2 * rows * (heads + 1) * dim * setting.dtype.itemsize

    def make() -> Sequence[Work]:
        x_INHD = setting.random(setting.rotations(amount), rows, heads, dim)
        angles_ND = setting.random(rows, dim).float()
        cos_ND, sin_ND = angles_ND.cos().to(setting.dtype), angles_ND.sin().to(setting.dtype)
        return [
            partial(rotate_heads, x_NHD, cos_ND, sin_ND, norm_HD=None, eps=EPS) for x_NHD in x_INHD
        ]

    return Case("rotate_heads", f"{rows} x {heads} x {dim}", Ceiling.COPY, amount, make)


def gate_case(setting: Setting, *, rows: int) -> Case:
    width = setting.shape.intermediate_size
    amount = 3 * rows * width * setting.dtype.itemsize

    def make() -> Sequence[Work]:
        x_INF = setting.random(setting.rotations(amount), rows, 2 * width)
        return [partial(silu_mul, x_NF) for x_NF in x_INF]

    return Case("silu_mul", f"{rows} x {width}", Ceiling.COPY, amount, make)


def store_case(setting: Setting, *, rows: int, page_tokens: int) -> Case:
    """``page_tokens`` neighbours share a page: 1 as in decode, all of it as in a prompt."""
    heads, dim, page_size = setting.shape.num_kv_heads, setting.shape.head_dim, setting.page_size
    amount = 4 * rows * heads * dim * setting.dtype.itemsize

    def make() -> Sequence[Work]:
        count, columns = setting.rotations(amount), -(-rows // page_tokens)
        slots_IPH = permutation(setting, count * columns * heads).int().view(count, columns, heads)
        arena_NTCD = setting.random(slots_IPH.numel(), page_size, 2, dim)
        kv_ICBHD = setting.random(count, 2, rows, heads, dim)
        places_B = torch.arange(rows, device=setting.device)
        return [
            partial(
                store_tokens,
                arena_NTCD,
                slots_BH=slots_PH[places_B // page_tokens],
                offsets_B=(places_B % page_size).int(),
                k_BHD=k_BHD,
                v_BHD=v_BHD,
            )
            for slots_PH, (k_BHD, v_BHD) in zip(slots_IPH, kv_ICBHD, strict=True)
        ]

    words = f"{rows} x {heads}, {page_tokens} a page"
    return Case("store_tokens", words, Ceiling.COPY, amount, make)


def bounds_case(setting: Setting, *, rows: int) -> Case:
    """Summaries of the pages of a prompt chunk; keys are read, values are not."""
    dim, page_size = setting.shape.head_dim, setting.page_size
    num_pages = rows * setting.shape.num_kv_heads // page_size
    amount = num_pages * (page_size + 2) * dim * setting.dtype.itemsize

    def make() -> Sequence[Work]:
        pages_IMTCD = setting.random(setting.rotations(2 * amount), num_pages, page_size, 2, dim)
        return [partial(page_bounds, pages_MTCD, minmax=False) for pages_MTCD in pages_IMTCD]

    return Case("page_bounds", f"{num_pages} pages of {page_size}", Ceiling.COPY, amount, make)


def permutation(setting: Setting, count: int) -> Tensor:
    """All numbers below ``count`` in no order, int64."""
    return torch.randperm(count, device=setting.device)
