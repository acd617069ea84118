"""Calls of the driver, against a library that writes down what it is asked."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from sparsed.engine.cuda_driver import CudaDriver, CudaError


class FakeLibrary:
    """Answers ``code`` to every call; has the batch call of one CUDA version, or none."""

    def __init__(self, *, code: int = 0, batch: str | None = None) -> None:
        self.code = code
        self.calls: list[tuple[str, list[Any]]] = []
        for name in ("cuMemHostRegister_v2", "cuMemHostUnregister", "cuMemcpyAsync", batch):
            if name is not None:
                setattr(self, name, lambda *values, name=name: self.note(name, values))

    def note(self, name: str, values: tuple[Any, ...]) -> int:
        self.calls.append((name, [self.plain(value) for value in values]))
        return self.code

    @staticmethod
    def plain(value: Any) -> Any:
        if isinstance(value, ctypes.Array):
            return list(value)
        return getattr(value, "value", value)

    def cuGetErrorName(self, code: ctypes.c_int, text: Any) -> int:
        text._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY"
        return 0

    def cuDeviceGetPCIBusId(self, text: Any, size: ctypes.c_int, device: ctypes.c_int) -> int:
        text.value = b"0000:B5:00.0"
        return 0


def test_registering_maps_memory_for_every_context() -> None:
    library = FakeLibrary()
    driver = CudaDriver(library)
    driver.register(4096, 1 << 33)
    driver.unregister(4096)
    assert library.calls == [
        ("cuMemHostRegister_v2", [4096, 1 << 33, 3]),
        ("cuMemHostUnregister", [4096]),
    ]


def test_a_refusal_has_a_name() -> None:
    with pytest.raises(CudaError, match=r"cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        CudaDriver(FakeLibrary(code=2)).register(4096, 10)


def test_a_device_is_called_as_the_kernel_calls_it() -> None:
    assert CudaDriver(FakeLibrary()).pci_id(1) == "0000:b5:00.0"


@pytest.mark.parametrize(
    ("name", "num_arguments"), [("cuMemcpyBatchAsync", 9), ("cuMemcpyBatchAsync_v2", 8)]
)
def test_a_batch_is_one_call(name: str, num_arguments: int) -> None:
    library = FakeLibrary(batch=name)
    driver = CudaDriver(library)
    assert driver.has_batches
    driver.copy_batch([1 << 40, 2], [3, 4], [16, 32], stream=7)
    ((called, values),) = library.calls
    assert (called, len(values)) == (name, num_arguments)
    assert values[:4] == [[1 << 40, 2], [3, 4], [16, 32], 2]
    assert values[-1] == 7
    driver.copy_batch([], [], [], stream=7)
    assert len(library.calls) == 1, "nothing to copy"


def test_an_old_driver_copies_one_by_one() -> None:
    library = FakeLibrary()
    driver = CudaDriver(library)
    assert not driver.has_batches
    driver.copy_batch([1, 2], [3, 4], [16, 32], stream=7)
    assert library.calls == [("cuMemcpyAsync", [1, 3, 16, 7]), ("cuMemcpyAsync", [2, 4, 32, 7])]
