"""Small numbers on their way from the host to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def upload(values: Sequence[int] | npt.NDArray[np.int64], *, device: torch.device) -> Tensor:
    """``values`` on ``device`` as int64, in the order of the current stream.

    A copy from ordinary memory would wait for everything queued before it, and the device would
    run dry; this one comes from pinned memory.
    """
    here = torch.from_numpy(np.array(values, dtype=np.int64))
    if device.type == "cpu":
        return here
    return here.pin_memory().to(device, non_blocking=True)
