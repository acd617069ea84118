"""Earlier pages of a prompt that are not all hot, on their way from the DRAM tier to attention.

They come in pieces through the two halves of the staging area: while attention reads one the next
is loaded, and the first piece of a layer is loaded during the layer before.

Shape legend: H KV heads, M tokens of a piece, D head dim, N slots of the staging area, X elements
of a page.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.streams import new_stream


class _Piece(NamedTuple):
    """Full pages first .. last - 1 of a row's layer, and the half that they come to."""

    row: int
    layer: int
    first: int
    last: int
    half: int


class _Coming(NamedTuple):
    piece: _Piece
    pages_NX: Tensor
    is_there: torch.cuda.Event | None  # None: at once


class ColdContext:
    """``staging_NX`` has room for two pages a KV head at least. One thread; one stream of the
    caller, between whose ``foresee`` and the ``pieces`` foreseen nobody else writes to the area."""

    def __init__(self, cache: KVCache, *, staging_NX: Tensor) -> None:
        self._cache = cache
        self._heads = cache.geometry.num_kv_heads
        self._piece_pages = len(staging_NX) // (2 * self._heads)
        half = self._piece_pages * self._heads
        self._halves = staging_NX[:half], staging_NX[half : 2 * half]
        self._stream = new_stream(staging_NX.device)
        self._foreseen: _Coming | None = None

    @property
    def piece_tokens(self) -> int:
        """Most tokens of a piece."""
        return self._piece_pages * self._cache.geometry.page_size

    def foresee(self, row: int, layer: int, *, num_pages: int) -> None:
        """Begin to load the first piece of what ``pieces`` will be asked for next; where nothing
        runs beside it that is left to ``pieces``."""
        if self._stream is not None and num_pages:
            self._foreseen = self._load(self._split(row, layer, num_pages)[0])

    def pieces(self, row: int, layer: int, *, num_pages: int) -> Iterator[Tensor]:
        """K and V (H, M, 2, D) of the first full pages of ``row``, in order; each piece is valid
        until the next one is asked for."""
        pieces = self._split(row, layer, num_pages)
        if not pieces:
            return
        coming, self._foreseen = self._foreseen, None
        if coming is None or coming.piece != pieces[0]:
            coming = self._load(pieces[0])
        for _, piece in pairwise([*pieces, None]):
            now, coming = coming, self._load(piece) if piece else coming
            yield self._arrived(now)

    def _split(self, row: int, layer: int, num_pages: int) -> list[_Piece]:
        starts = range(0, num_pages, self._piece_pages)
        return [
            _Piece(row, layer, first, min(first + self._piece_pages, num_pages), number % 2)
            for number, first in enumerate(starts)
        ]

    def _load(self, piece: _Piece) -> _Coming:
        """Behind what the caller's stream has queued: that may still read the half."""
        if self._stream is None:
            return _Coming(piece, self._copy(piece), None)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            return _Coming(piece, self._copy(piece), self._stream.record_event())

    def _copy(self, piece: _Piece) -> Tensor:
        cache = self._cache
        rows_HP = cache.tables.layer_page_rows(piece.row, piece.layer, piece.first, piece.last)
        rows = rows_HP.flatten()
        pages_NX = self._halves[piece.half][: len(rows)]
        target = torch.arange(len(rows), device=rows.device)
        cache.transfer.load(pages_NX, cache.pool.pages_RX, dst_rows=target, src_rows=rows)
        return pages_NX

    def _arrived(self, coming: _Coming) -> Tensor:
        if coming.is_there is not None:
            torch.cuda.current_stream(coming.pages_NX.device).wait_event(coming.is_there)
        return coming.pages_NX.view(self._heads, -1, 2, self._cache.geometry.head_dim)
