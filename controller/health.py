"""Whether a daemon serves as it should, and what keeps it from that."""

from __future__ import annotations

from collections.abc import Sequence

from sparsed.controller.control import DaemonState
from sparsed.controller.engine_link import EngineLink


def state_of(engine: EngineLink, *, reasons: Sequence[str]) -> DaemonState:
    """Of a daemon with this engine; ``reasons`` are those of a degraded one."""
    if engine.ledger.draining:
        return DaemonState.DRAINING
    if engine.facts is None:
        return DaemonState.LOADING
    if not engine.up:
        return DaemonState.RESTARTING
    return DaemonState.DEGRADED if reasons else DaemonState.SERVING


def store_reasons(*, fault: str | None, lost_writes: int) -> tuple[str, ...]:
    """What is wrong with the memory of the daemon."""
    lost = f"the store lost {lost_writes} writes; is the disk full?" if lost_writes else ""
    return tuple(reason for reason in (fault, lost) if reason)


def copy_reasons(num_broken: int) -> tuple[str, ...]:
    """What is wrong with copies between the tiers."""
    if not num_broken:
        return ()
    return (f"{num_broken} KV pages differed after a copy; see the log",)
