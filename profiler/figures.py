"""The figures of a few windows together, as shares of what the machine carries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Self

from sparsed.core import Bound, Ceilings, Evidence, HostGauges, NvmlFault, Snapshot, WaitReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Shares are of 1; None: a number that the figure needs is absent or not finite.

    ``busy_share`` of the time in steps; ``link_share`` of the ceiling, by whoever sends most: the
    engine's own copies or what the GPU counts of all traffic, ``others_link_share`` their
    difference; ``own_cpu_share`` and ``others_cpu_share`` of all cores; ``exposed_share`` and
    ``parts`` of a mean step.
    """

    newest: Snapshot
    ceilings: Ceilings
    always_has_work: bool
    waits_for: WaitReason | None  # of those waiting in half of the windows or more
    busy_share: float
    step_s: float | None  # mean
    own_h2d_bytes_per_s: float
    link_share: float | None
    others_link_share: float | None
    exposed_share: float | None
    gpu_share: float | None
    host_cpu_share: float | None
    own_cpu_share: float | None
    others_cpu_share: float | None
    parts: Mapping[Bound, float]

    @classmethod
    def of(cls, windows: Sequence[Snapshot], ceilings: Ceilings) -> Self:
        """Of one window or more, the oldest first."""
        seconds = sum(one.window_s for one in windows)
        steps_s = sum(one.step_s for one in windows)
        step_s = _ratio(steps_s, sum(one.steps for one in windows))
        own = _ratio(sum(one.h2d_bytes for one in windows), seconds) or 0.0
        counted = _mean_gauge(windows, lambda host: host.pcie_h2d_bytes_per_s)
        busiest = max(own, counted or 0.0)
        ceiling = ceilings.h2d_bytes_per_s or 0.0
        exposed_s = _mean(one.exposed_s_per_step for one in windows)
        host_cpu = _mean_gauge(windows, lambda host: host.host_cpu_frac)
        own_cpu = _ratio(
            _mean_gauge(windows, lambda host: host.process_cpu_frac), ceilings.num_cpus
        )
        has_both = host_cpu is not None and own_cpu is not None
        exposed_share = _ratio(exposed_s, step_s)
        return cls(
            newest=windows[-1],
            ceilings=ceilings,
            always_has_work=all(one.num_running > 0 or one.num_waiting > 0 for one in windows),
            waits_for=_waits_for(windows),
            busy_share=_ratio(steps_s, seconds) or 0.0,
            step_s=step_s,
            own_h2d_bytes_per_s=own,
            link_share=_ratio(busiest, ceiling),
            others_link_share=None if counted is None else _ratio(max(0.0, counted - own), ceiling),
            exposed_share=exposed_share,
            gpu_share=_mean_gauge(windows, lambda host: host.gpu_util_frac),
            host_cpu_share=host_cpu,
            own_cpu_share=own_cpu,
            others_cpu_share=max(0.0, (host_cpu or 0.0) - (own_cpu or 0.0)) if has_both else None,
            parts=_parts(ceilings, step_s=step_s, exposed_share=exposed_share),
        )

    def evidence(self) -> tuple[Evidence, ...]:
        """What there is, in the order in which one would ask; never a zero for what is absent."""
        newest, ceiling = self.newest, self.ceilings.h2d_bytes_per_s
        found: tuple[tuple[str, float | None, str], ...] = (
            ("time in steps", self.busy_share, "share"),
            ("mean step", self.step_s, "s"),
            ("TTFT p95", newest.ttft_p95_s, "s"),
            ("TPOT p95", newest.tpot_p95_s, "s"),
            ("running", newest.num_running, "requests"),
            ("waiting", newest.num_waiting, "requests"),
            ("loaded over the link", self.own_h2d_bytes_per_s / 1e9, "GB/s"),
            ("calibrated rate of the link", None if ceiling is None else ceiling / 1e9, "GB/s"),
            ("link in use", self.link_share, "share"),
            ("link not by this engine's copies", self.others_link_share, "share"),
            ("waits for pages in a step", self.exposed_share, "share"),
            ("hot hits", newest.hot_hit_frac, "share"),
            ("hot tier in use", newest.hot_used_frac, "share"),
            ("DRAM tier in use", newest.dram_used_frac, "share"),
            ("GPU busy", self.gpu_share, "share"),
            ("cores busy", self.host_cpu_share, "share"),
            ("cores busy with other processes", self.others_cpu_share, "share"),
            *((f"{bound} part of a step", share, "share") for bound, share in self.parts.items()),
        )
        return tuple(
            Evidence(name=name, value=float(value), unit=unit)
            for name, value, unit in found
            if value is not None and isfinite(value)
        )

    def missing(self) -> tuple[str, ...]:
        """Figures that a rule would have looked at, in words."""
        is_gpu, host = self.ceilings.is_gpu, self.newest.host
        gaps = (
            (self.ceilings.h2d_bytes_per_s is None, "calibrated rate of the link"),
            (is_gpu and self.exposed_share is None, "timed step that fetches in these windows"),
            (
                is_gpu and self.others_link_share is None,
                f"PCIe counter of the GPU{_why(host.pcie_fault)}",
            ),
            (is_gpu and self.gpu_share is None, f"utilisation of the GPU{_why(host.gpu_fault)}"),
            (self.host_cpu_share is None, "gauges of the host"),
            (is_gpu and not self.parts, "rates of this GPU's memory and products"),
        )
        return tuple(words for is_missing, words in gaps if is_missing)


def _why(fault: NvmlFault | None) -> str:
    return f" ({fault})" if fault else ""


def _parts(
    ceilings: Ceilings, *, step_s: float | None, exposed_share: float | None
) -> Mapping[Bound, float]:
    """Empty where no floor is known: waits for pages alone would always be the largest."""
    floors = {
        Bound.HBM: _ratio(ceilings.floor_hbm_s, step_s),
        Bound.COMPUTE: _ratio(ceilings.floor_compute_s, step_s),
        Bound.LATENCY: _ratio(ceilings.floor_latency_s, step_s),
    }
    parts = {bound: share for bound, share in floors.items() if share is not None}
    return parts | {Bound.LINK: exposed_share} if parts and exposed_share is not None else parts


def _waits_for(windows: Sequence[Snapshot]) -> WaitReason | None:
    """A turn is left out: it is a wait for whatever the oldest request waits for."""
    own = [[item for item in one.waiting if item.reason is not WaitReason.TURN] for one in windows]
    most = [max(items, key=lambda item: item.count).reason for items in own if items]
    if not most:
        return None
    reason, count = Counter(most).most_common(1)[0]
    return reason if 2 * count >= len(windows) else None


def _mean_gauge(
    windows: Iterable[Snapshot], read: Callable[[HostGauges], float | None]
) -> float | None:
    return _mean(read(one.host) for one in windows)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None and isfinite(value)]
    return _ratio(sum(known), len(known))


def _ratio(value: float | None, whole: float | None) -> float | None:
    if value is None or whole is None or not whole > 0:
        return None
    ratio = value / whole
    return ratio if isfinite(ratio) else None
