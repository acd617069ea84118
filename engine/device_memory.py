"""The most that this process has had of its device's memory."""

from __future__ import annotations

import torch


class DeviceMemory:
    """``free_bytes``: of the device before the engine was on it, all its other users counted; 0: not
    known, and then the peak is that of torch's allocator alone.

    What the driver holds for the process besides (context, modules, graphs) is what is in use now,
    less what was before and less what the allocator has reserved: memory that others have taken
    since counts as ours, and they are few on the device of an engine. One thread.
    """

    def __init__(self, device: torch.device, *, free_bytes: int) -> None:
        self._device = device
        self._free_bytes = free_bytes
        self._driver_bytes = 0

    def peak_bytes(self) -> int:
        """Since the start; 0 on a CPU. Does not wait for the device."""
        if self._device.type == "cpu":
            return 0
        if self._free_bytes:
            free_bytes, _ = torch.cuda.mem_get_info(self._device)
            own_bytes = self._free_bytes - free_bytes
            driver_bytes = own_bytes - torch.cuda.memory_reserved(self._device)
            self._driver_bytes = max(self._driver_bytes, driver_bytes)
        return torch.cuda.max_memory_reserved(self._device) + self._driver_bytes
