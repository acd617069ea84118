"""Calls of the driver, against a library that writes down what it is asked."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from sparsed.engine import cuda_driver
from sparsed.engine.cuda_driver import CudaDriver, CudaError


class FakeLibrary:
    """Answers ``code`` to every call; has the batch call, or does not."""

    def __init__(self, *, code: int = 0, has_batch: bool = False) -> None:
        self.code = code
        self.has_batch = has_batch
        self.calls: list[tuple[str, list[Any]]] = []
        self.batch = cuda_driver._BATCH(self.note_batch)
        for name in ("cuMemHostRegister_v2", "cuMemHostUnregister", "cuMemcpyAsync"):
            setattr(self, name, lambda *values, name=name: self.note(name, values))

    def note(self, name: str, values: tuple[Any, ...]) -> int:
        self.calls.append((name, [getattr(value, "value", value) for value in values]))
        return self.code

    def note_batch(self, targets, sources, sizes, count, *others):  # type: ignore[no-untyped-def]  # ctypes
        lists = [
            list(ctypes.cast(place, ctypes.POINTER(ctypes.c_uint64))[:count])
            for place in (targets, sources, sizes)
        ]
        attributes = ctypes.cast(others[0], ctypes.POINTER(ctypes.c_int))[:6]
        self.calls.append(("batch", [*lists, attributes, others[2], others[4]]))
        return self.code

    def cuGetProcAddress_v2(self, name, address, version, flags, found):  # type: ignore[no-untyped-def]  # ctypes
        assert (name, version.value) == (b"cuMemcpyBatchAsync", 12080)
        if self.has_batch:
            address._obj.value = ctypes.cast(self.batch, ctypes.c_void_p).value
        return 0

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


def test_a_batch_is_one_call_in_the_order_of_its_stream() -> None:
    library = FakeLibrary(has_batch=True)
    driver = CudaDriver(library)
    driver.copy_batch([1 << 40, 2], [3, 4], [16, 32], stream=7)
    in_stream_order = [1, 0, 0, 0, 0, 0]
    assert library.calls == [("batch", [[1 << 40, 2], [3, 4], [16, 32], in_stream_order, 1, 7])]
    driver.copy_batch([], [], [], stream=7)
    assert len(library.calls) == 1, "nothing to copy"


def test_an_old_driver_copies_one_by_one() -> None:
    library = FakeLibrary()
    driver = CudaDriver(library)
    driver.copy_batch([1, 2], [3, 4], [16, 32], stream=7)
    assert library.calls == [("cuMemcpyAsync", [1, 3, 16, 7]), ("cuMemcpyAsync", [2, 4, 32, 7])]
