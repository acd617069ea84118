"""The share of a GPU's memory in use, or nothing."""

from __future__ import annotations

from typing import Any

import pytest

from sparsed.profiler.device_memory import open_device_memory


@pytest.mark.parametrize("index", [0, 3])
def test_it_is_what_the_driver_says(make_nvml: Any, index: int) -> None:
    library = make_nvml()
    with open_device_memory(index, library=library) as read:
        assert read() == pytest.approx(9 / 80)  # without what the driver reserves
        assert library.open
    assert not library.open


def test_without_a_gpu_or_an_answer_there_is_no_figure(make_nvml: Any) -> None:
    with open_device_memory(None, library=make_nvml()) as read:
        assert read() is None
    for call in ("nvmlInit", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo"):
        with open_device_memory(0, library=make_nvml(failing={call: 3})) as read:
            assert read() is None, call
