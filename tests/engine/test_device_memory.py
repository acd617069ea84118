"""The peak of device memory: arithmetic on what the allocator and the driver would say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsed.engine.device_memory import DeviceMemory

BEFORE = 1000
sizes = st.integers(0, 300)


class Device:
    """One whose users take what they take."""

    def __init__(self) -> None:
        self.reserved = self.peak = self.driver = 0

    def grow(self, reserved: int, driver: int) -> None:
        self.reserved, self.driver = reserved, driver
        self.peak = max(self.peak, reserved)

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        free = lambda _device: (BEFORE - self.reserved - self.driver, 2 * BEFORE)
        patch.setattr(torch.cuda, "mem_get_info", free)
        patch.setattr(torch.cuda, "memory_reserved", lambda _device: self.reserved)
        patch.setattr(torch.cuda, "max_memory_reserved", lambda _device: self.peak)


@given(st.lists(st.tuples(sizes, sizes), min_size=1))
def test_the_peak_is_the_most_of_the_allocator_and_of_the_driver(
    moments: list[tuple[int, int]],
) -> None:
    device, before = Device(), 0
    memory = DeviceMemory(torch.device("cuda:0"), free_bytes=BEFORE)
    with pytest.MonkeyPatch.context() as patch:
        device.patch(patch)
        for reserved, driver in moments:
            device.grow(reserved, driver)
            peak = memory.peak_bytes()
            assert peak >= max(before, reserved + driver)
            before = peak
    assert before == max(r for r, _ in moments) + max(d for _, d in moments)


def test_without_what_was_free_it_is_the_allocator_alone() -> None:
    device = Device()
    device.grow(70, 30)
    device.grow(50, 30)
    with pytest.MonkeyPatch.context() as patch:
        device.patch(patch)
        assert DeviceMemory(torch.device("cuda:0"), free_bytes=0).peak_bytes() == 70


def test_a_driver_that_says_less_than_the_allocator_takes_nothing_away() -> None:
    """Others have gone since."""
    device = Device()
    device.grow(70, -20)
    with pytest.MonkeyPatch.context() as patch:
        device.patch(patch)
        assert DeviceMemory(torch.device("cuda:0"), free_bytes=BEFORE).peak_bytes() == 70


def test_a_cpu_has_none() -> None:
    assert DeviceMemory(torch.device("cpu"), free_bytes=BEFORE).peak_bytes() == 0
