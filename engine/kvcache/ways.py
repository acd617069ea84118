"""The ways copies take at run time: those a calibration found best, or the operator asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from sparsed.core import CopyPath, Direction, LinkCalibration, LinkEntry
from sparsed.engine.kvcache.link_policy import RUN_TIME_PATHS, CopyChoice, choose_copy
from sparsed.kernels.copy import DEFAULT_PROGRAMS, DEFAULT_TILE_BYTES

BLOCK_PATHS: Final = RUN_TIME_PATHS[Direction.D2H]
ON_CPU: Final = CopyChoice(CopyPath.MEMCPY, 0, 0)
# Until a calibration is there, which on a CUDA device is before the first request.
_ROWS: Final = CopyChoice(CopyPath.KERNEL, DEFAULT_PROGRAMS, DEFAULT_TILE_BYTES)
_BLOCKS: Final = CopyChoice(CopyPath.COPY_ENGINE, 0, 0)


class Ways:
    """How pages of one size are loaded and saved, and larger pieces saved."""

    def __init__(
        self, *, page_bytes: int, device: torch.device, calibration: LinkCalibration | None
    ) -> None:
        self._page_bytes = page_bytes
        self._is_cpu = device.type == "cpu"
        self._calibration = calibration
        self._programs: int | None = None
        self._blocks: dict[int, CopyChoice] = {}
        self._choose()

    @property
    def load(self) -> CopyChoice:
        """How pages are loaded."""
        return self._load

    @property
    def load_bytes_per_s(self) -> float | None:
        """What the calibration measured of that way; None without one."""
        return self._load_bytes_per_s

    @property
    def save(self) -> CopyChoice:
        """How page rows that only the device knows are saved."""
        return self._save

    def save_blocks(self, piece_bytes: int) -> CopyChoice:
        """How pieces of that size are saved to places the host knows."""
        if piece_bytes not in self._blocks:
            self._blocks[piece_bytes] = self._choice(
                Direction.D2H, piece_bytes, BLOCK_PATHS, otherwise=_BLOCKS
            )
        return self._blocks[piece_bytes]

    def entries(self, *, block_bytes: int) -> tuple[LinkEntry, ...]:
        """What the calibration says of loads, saves, and saves of blocks; nothing without one."""
        wanted = (
            (Direction.H2D, self._page_bytes, (CopyPath.KERNEL,)),
            (Direction.D2H, self._page_bytes, (CopyPath.KERNEL,)),
            (Direction.D2H, block_bytes, BLOCK_PATHS),
        )
        found = [self._entry(*way) for way in wanted]
        return tuple(entry for entry in found if entry is not None)

    def calibrate(self, calibration: LinkCalibration) -> None:
        self._calibration = calibration
        self._choose()

    def set_programs(self, programs: int | None) -> None:
        """Programs of the kernel that loads; None: the calibrated number."""
        self._programs = programs
        self._choose()

    def _choose(self) -> None:
        self._blocks.clear()
        kernel, page_bytes = (CopyPath.KERNEL,), self._page_bytes
        self._save = self._choice(Direction.D2H, page_bytes, kernel, otherwise=_ROWS)
        self._load = self._choice(Direction.H2D, page_bytes, kernel, otherwise=_ROWS)
        entry = self._entry(Direction.H2D, page_bytes, kernel)
        self._load_bytes_per_s = entry.bytes_per_s if entry else None
        if self._programs is not None and not self._is_cpu:
            self._load = self._load._replace(programs=self._programs)

    def _choice(
        self,
        direction: Direction,
        piece_bytes: int,
        paths: Sequence[CopyPath],
        *,
        otherwise: CopyChoice,
    ) -> CopyChoice:
        if self._is_cpu:
            return ON_CPU
        entry = self._entry(direction, piece_bytes, paths)
        if entry is None:
            return otherwise
        return CopyChoice(entry.path, entry.programs, entry.tile_bytes)

    def _entry(
        self, direction: Direction, piece_bytes: int, paths: Sequence[CopyPath]
    ) -> LinkEntry | None:
        if self._calibration is None or self._is_cpu:
            return None
        return choose_copy(
            self._calibration, direction=direction, piece_bytes=piece_bytes, paths=paths
        )
