"""A start plan of the smallest model, as the daemon would make it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsed.controller.config import DaemonConfig, load_config
from sparsed.controller.startup import FindVerified, StartPlan, prepare

SMALL = {"model": "dummy:tiny", "device": "cpu", "kv_hbm_gib": 0.02, "kv_dram_gib": 0.05}


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., DaemonConfig]:
    """``configure(**flags)``: a configuration for the tiny model in a directory of its own."""

    def make(**flags: object) -> DaemonConfig:
        state_dir = tmp_path / "s"
        flags = SMALL | {"state_dir": str(state_dir)} | flags
        return load_config(flags=flags, environment={"HOME": str(tmp_path)})

    return make


@pytest.fixture
def plan_start(configure: Callable[..., DaemonConfig]) -> Callable[..., StartPlan]:
    """``plan_start(find_verified=..., **flags)``: what such a start comes to."""

    def make(*, find_verified: FindVerified | None = None, **flags: object) -> StartPlan:
        return prepare(
            configure(**flags), progress=lambda phase, frac: None, find_verified=find_verified
        )

    return make
