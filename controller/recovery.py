"""What a start makes of what the live tuner left behind, whatever ended it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from sparsed.core import (
    VERDICT_REASONS,
    VERDICT_STATES,
    KnobValue,
    ProfileKey,
    RolloutRecord,
)
from sparsed.db.store import RolloutStore, StoreError

MAX_CRASHES: Final = 3  # in a row
CRASHES_WINDOW_S: Final = 600.0  # of serving, all of them together
# What a daemon without a tuner begins with, prompts in smaller pieces and more blocks kept free.
SAFE_VALUES: Final[Mapping[str, KnobValue]] = {
    "token_budget": 2048,
    "hbm_budget": None,
    "prefill_chunk": 512,
    "residency_watermark": 0.2,
    "retrieval_stride": 1,
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedValues:
    """Hot knobs for a start: the last known good, those of safe mode, or none. ``records``: what
    became of candidates, newest first."""

    values: Mapping[str, KnobValue] = field(default_factory=dict)
    is_safe: bool = False
    moved_at: float = 0.0
    why: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)  # of what they were proved on
    records: tuple[RolloutRecord, ...] = ()


def recover(store: RolloutStore, *, at: float) -> None:
    """Settle what a death left: a marked candidate has failed; too many crashes under values of
    the live tuner, within ten minutes of serving, mean safe mode. Once, before anything starts.

    May itself be killed, or find the store failing: what is left then is settled by the next
    start. The values of this one do not depend on it.
    """
    try:
        _settle(store, at=at)
    except StoreError as error:
        logger.warning("what the live tuner left cannot be settled: %s", error)


def _settle(store: RolloutStore, *, at: float) -> None:
    for record in store.fail_marked(at):
        logger.warning("the daemon died while it tested %s: reverted", dict(record.config_to))
    crashes = store.list_runs()[:MAX_CRASHES]
    served_s = sum(run.alive_at - run.started_at for run in crashes)
    is_crashing = len(crashes) == MAX_CRASHES and not any(run.ended for run in crashes)
    controls = store.controls()
    if is_crashing and served_s <= CRASHES_WINDOW_S and controls.safe_since is None:
        store.keep_controls(replace(controls, safe_since=at))
        logger.error("%d crashes within %.0f s of serving: safe mode", MAX_CRASHES, served_s)


def tuned_values(store: RolloutStore, key: ProfileKey) -> TunedValues:
    """What a start for ``key`` is to take. Errors: StoreError."""
    if store.controls().safe_since is not None:
        why = "safe mode after crashes; see: sparsed tuner revive"
        return TunedValues(values=SAFE_VALUES, is_safe=True, why=why)
    good, records = store.find_good(key), store.list_rollouts(key)
    if good is None:
        return TunedValues(records=records)
    values = "; ".join(f"{name}={value}" for name, value in good.values.items())
    return TunedValues(
        values=good.values,
        moved_at=good.moved_at,
        why=f"the last known good: {values}",
        versions=good.versions,
        records=records,
    )


def verdict_on(profile: str, records: Iterable[RolloutRecord]) -> RolloutRecord | None:
    """The last verdict on the values of an ``UnprovedProfile`` of this name, by a paired test, by
    a fault or by an operator; ``records`` are the newest first. None: no test has come to one."""
    for item in records:
        is_verdict = item.state in VERDICT_STATES or item.reason in VERDICT_REASONS
        if item.profile == profile and is_verdict:
            return item
    return None
