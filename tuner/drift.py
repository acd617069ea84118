"""Whether what was measured still holds: for an incumbent, and for the machine below it; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Final

from sparsed.core import KnobValue, Platform, Slo, Snapshot
from sparsed.tuner.targets import MIN_SAMPLES, is_low, mean_recall, missed

NUM_REFERENCE: Final = 30  # stretches that say what to expect
NUM_RECENT: Final = 10  # that a loss is a mean of
SLACK: Final = 1.0  # deviations that count as nothing
LIMIT: Final = 8.0  # deviations, summed up
MIN_SD: Final = 0.03  # of the logarithm

LOADED_FRAC: Final = 0.2  # of a window in copies: then the link does not rest
MIN_RATE_FRAC: Final = 0.9  # of the calibrated one
LARGE_STEP_BYTES: Final = (
    256 << 20
)  # the fetches of a step; of fewer, latency is a part of the rate
SUSTAINED_S: Final = 60.0  # of windows under load, on end

Values = Mapping[str, KnobValue]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What one set of knobs gave in one regime, by ``NUM_REFERENCE`` stretches: sums over
    (u, x), logarithms of requests running and of goodput a busy second."""

    knobs: Values
    num: int = 0
    u: float = 0.0
    x: float = 0.0
    uu: float = 0.0
    ux: float = 0.0
    xx: float = 0.0

    def with_point(self, u: float, x: float) -> Reference:
        return replace(
            self,
            num=self.num + 1,
            u=self.u + u,
            x=self.x + x,
            uu=self.uu + u * u,
            ux=self.ux + u * x,
            xx=self.xx + x * x,
        )

    def predict(self, u: float) -> tuple[float, float]:
        """Mean and standard deviation of x at u. More requests share a step: x grows with u, at
        most in proportion."""
        mean_u, mean_x = self.u / self.num, self.x / self.num
        var_u = max(0.0, self.uu / self.num - mean_u**2)
        var_x = max(0.0, self.xx / self.num - mean_x**2)
        cov = self.ux / self.num - mean_u * mean_x
        slope = min(1.0, max(0.0, cov / var_u)) if var_u > 0 else 0.0
        rest = max(0.0, var_x - 2 * slope * cov + slope**2 * var_u)
        sd = math.sqrt(rest * self.num / max(1, self.num - 2))
        return mean_x + slope * (u - mean_u), max(sd, MIN_SD)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trail:
    """What is known of one regime, over all stays in it. ``seen``: windows of the stretch that is
    under way; ``losses``: the newest (predicted - observed), logarithms; ``excess``: their cumulated
    sum in deviations."""

    reference: Reference
    seen: tuple[Snapshot, ...] = ()
    losses: tuple[float, ...] = ()
    excess: float = 0.0
    has_drifted: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """``trails``: by regime; ``regime_id``: of the one that was watched last."""

    regime_id: int | None = None
    trails: Mapping[int, Trail] = field(default_factory=dict)

    @property
    def trail(self) -> Trail | None:
        return None if self.regime_id is None else self.trails.get(self.regime_id)

    @property
    def has_drifted(self) -> bool:
        return self.trail is not None and self.trail.has_drifted

    @property
    def loss_frac(self) -> float | None:
        """Of the goodput that was to be expected, lately; None before there is an expectation."""
        if self.trail is None or not self.trail.losses:
            return None
        return 1.0 - math.exp(-fmean(self.trail.losses))


def watch(
    state: Drift,
    snapshot: Snapshot,
    *,
    regime_id: int | None,
    knobs: Values,
    window_s: float,
    slo: Slo,
) -> Drift:
    """The state after a window of the regime in force with nothing under test.

    ``knobs``: those that the live tuner may change, as they are; others are another incumbent,
    of which nothing is known yet. A cumulated sum (CUSUM) over stretches of ``window_s``, which
    short stays in a regime fill together; once it is over ``LIMIT`` it must come back to 0 for the
    drift to be over.
    """
    if regime_id is None:
        return state
    trail = state.trails.get(regime_id)
    if trail is None or trail.reference.knobs != knobs:
        trail = Trail(reference=Reference(knobs=knobs))
    trail = replace(trail, seen=(*trail.seen, snapshot))
    if sum(one.window_s for one in trail.seen) >= window_s:
        point, trail = _point(trail.seen, slo), replace(trail, seen=())
        trail = trail if point is None else _judge(trail, *point)
    return Drift(regime_id=regime_id, trails={**state.trails, regime_id: trail})


def in_words(state: Drift) -> str:
    """What has drifted; empty: nothing."""
    if not state.has_drifted or state.loss_frac is None:
        return ""
    return (
        f"regime {state.regime_id} gives {state.loss_frac:.0%} less goodput than its values gave "
        "before; run: sparsed tune"
    )


def _judge(trail: Trail, u: float, x: float) -> Trail:
    reference = trail.reference
    if reference.num < NUM_REFERENCE:
        return replace(trail, reference=reference.with_point(u, x))
    mean, sd = reference.predict(u)
    excess = min(2 * LIMIT, max(0.0, trail.excess + (mean - x) / sd - SLACK))
    return replace(
        trail,
        excess=excess,
        losses=(*trail.losses, mean - x)[-NUM_RECENT:],
        has_drifted=excess > LIMIT or (trail.has_drifted and excess > 0.0),
    )


def _point(seen: tuple[Snapshot, ...], slo: Slo) -> tuple[float, float] | None:
    """Logarithms of requests running, and of tokens within the targets for a second in steps:
    throughput itself follows the load. None of a stretch that was mostly idle."""
    busy = [one for one in seen if one.steps and one.num_running]
    busy_s = sum(one.step_s for one in busy)
    tokens = sum(one.generated_tokens_per_s * one.window_s for one in busy)
    is_bad = is_low(mean_recall(busy, least=MIN_SAMPLES), slo)
    good = sum(
        one.generated_tokens_per_s * one.window_s
        for one in busy
        if not is_bad and not missed(one, slo)
    )
    if 2 * len(busy) < len(seen) or busy_s <= 0 or tokens <= 0:
        return None
    running = fmean(one.num_running for one in busy)
    return math.log(running), math.log(max(good, tokens / 100) / busy_s)


# ---- the platform ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkWatch:
    """Seconds of windows under load, on end, in which the link was narrower or slower than what
    was measured of it."""

    narrow_s: float = 0.0
    slow_s: float = 0.0


def watch_link(state: LinkWatch, snapshot: Snapshot, *, platform: Platform) -> LinkWatch:
    """The state after one more window. A link at rest saves power and tells nothing."""
    if not _is_loaded(snapshot):
        return state
    host, rate = snapshot.host, (snapshot.h2d_gb_per_s or 0.0) * 1e9
    narrow = any(
        now is not None and was is not None and now < was
        for now, was in (
            (host.pcie_generation, platform.pcie_generation),
            (host.pcie_width, platform.pcie_width),
        )
    )
    expected = platform.h2d_bytes_per_s
    slow_s = state.slow_s
    if expected is not None and (snapshot.miss_bytes_per_step or 0.0) >= LARGE_STEP_BYTES:
        slow_s = slow_s + snapshot.window_s if rate < MIN_RATE_FRAC * expected else 0.0
    return LinkWatch(narrow_s=state.narrow_s + snapshot.window_s if narrow else 0.0, slow_s=slow_s)


def link_drift(state: LinkWatch, snapshot: Snapshot, *, platform: Platform) -> str | None:
    """What is wrong with the link, in words; None: nothing, as far as is known."""
    host = snapshot.host
    if state.narrow_s >= SUSTAINED_S:
        return (
            f"under load the link runs at generation {host.pcie_generation} with "
            f"{host.pcie_width} lanes, measured were generation {platform.pcie_generation} with "
            f"{platform.pcie_width}"
        )
    if state.slow_s >= SUSTAINED_S and platform.h2d_bytes_per_s:
        return (
            f"pages are loaded at {snapshot.h2d_gb_per_s:.1f} GB/s, calibrated were "
            f"{platform.h2d_bytes_per_s / 1e9:.1f} GB/s"
        )
    return None


def version_drift(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Which versions differ of those that both know, in words; None: none does. What stands after
    a + is left out: a package and its metadata do not agree on it."""
    changed = [
        f"{name} {before[name]} -> {now[name]}"
        for name in sorted(before)
        if name in now and before[name].partition("+")[0] != now[name].partition("+")[0]
    ]
    return ", ".join(changed) or None


def _is_loaded(snapshot: Snapshot) -> bool:
    if not snapshot.h2d_gb_per_s or not snapshot.h2d_bytes:
        return False
    copying_s = snapshot.h2d_bytes / (snapshot.h2d_gb_per_s * 1e9)
    return copying_s >= LOADED_FRAC * snapshot.window_s
