"""What ended an engine is told by the type of the error or the beginning of its message."""

from __future__ import annotations

import pytest
import torch

from sparsed.core import FailureCause
from sparsed.engine.cuda_driver import CudaError
from sparsed.engine.failures import cause_of, in_words


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), FailureCause.DEVICE_MEMORY),
        (RuntimeError("Triton Error [CUDA]: out of memory"), FailureCause.DEVICE_MEMORY),
        (
            CudaError("cuMemAlloc", code=2, name="CUDA_ERROR_OUT_OF_MEMORY"),
            FailureCause.DEVICE_MEMORY,
        ),
        (
            RuntimeError("CUDA error: an illegal memory access was encountered"),
            FailureCause.DEVICE,
        ),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access"), FailureCause.DEVICE),
        (CudaError("cuMemcpy", code=700, name="CUDA_ERROR_ILLEGAL_ADDRESS"), FailureCause.DEVICE),
        (MemoryError(), FailureCause.HOST_MEMORY),
        (RuntimeError("the memory of a request is out of order"), FailureCause.OTHER),
        (KeyError("out of memory"), FailureCause.OTHER),
    ],
)
def test_the_cause_follows_the_type(error: Exception, cause: FailureCause) -> None:
    assert cause_of(error) is cause


def test_torch_says_itself_that_the_host_has_no_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert cause_of(caught.value) is FailureCause.HOST_MEMORY


def test_words_are_one_line() -> None:
    assert in_words(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert in_words(MemoryError()) == "MemoryError: no message"
