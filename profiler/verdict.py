"""What binds an engine now, from its newest windows: the first rule that holds gives the verdict.

The rules, in their order:

1. *unknown*: no window ended within the last ``STALE_S`` seconds.
2. *idle*: under ``BUSY_SHARE`` of the time in steps, and at the end of some window no request ran or
   waited.
3. *link-bound*: the link carries ``LINK_SHARE`` of its ceiling, whoever sends; or attention waits for
   pages in ``EXPOSED_SHARE`` of a step; or most requests that wait do so for the link.
4. *capacity-bound*: most requests that wait do so for a tier or for a place in the batch.
5. *host-bound*: requests run and under ``BUSY_SHARE`` of the time is in steps; or a GPU is busy for
   less than ``GPU_SHARE`` of the time; or ``HOST_SHARE`` of the cores are busy and other processes
   have half of all cores.
6. *HBM-, compute- or latency-bound*: the largest part of a mean step by bytes and rates, if all parts
   together explain ``EXPLAINED_SHARE`` of it. On a CPU, *compute-bound* if the engine keeps
   ``CORES_SHARE`` of the cores busy.
7. *unknown*: what is missing is said.

"Most ... wait": at the end of half of the windows or more. Pure, and raises nothing, whatever the
windows hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from sparsed.core import Bound, Ceilings, Snapshot, Verdict, WaitReason
from sparsed.profiler.figures import Figures
from sparsed.profiler.window import STALE_S

BUSY_SHARE: Final = 0.5
LINK_SHARE: Final = 0.7
EXPOSED_SHARE: Final = 0.3
GPU_SHARE: Final = 0.7
HOST_SHARE: Final = 0.9
EXPLAINED_SHARE: Final = 0.3
CORES_SHARE: Final = 0.7

CAPACITY_WORDS: Final = {
    WaitReason.HOT_TIER: "working sets do not fit the hot tier",
    WaitReason.DRAM_TIER: "whole requests do not fit the DRAM tier",
    WaitReason.ACTIVE_LIMIT: "as many run as max_num_active_seqs allows",
    WaitReason.SPILLED: "requests gave up their hot pages and wait to come back",
}


def fresh(windows: Sequence[Snapshot], *, now: float) -> tuple[Snapshot, ...]:
    """Those that tell of now: which ended at most ``STALE_S`` before ``now`` (epoch seconds), or as
    little after it, and have a length."""
    return tuple(one for one in windows if abs(now - one.ended_at) <= STALE_S and one.window_s > 0)


def judge(windows: Sequence[Snapshot], ceilings: Ceilings, *, now: float) -> Verdict:
    """The verdict over the fresh ones of ``windows``, the oldest first; ``now``: epoch seconds."""
    good = fresh(windows, now=now)
    if not good:
        told = f"no window of the last {STALE_S:g} s"
        reason = "the engine has not reported yet" if not windows else f"{told}: it is silent"
        return Verdict(bound=Bound.UNKNOWN, reason=reason, left_out=_old(len(windows)))
    figures = Figures.of(good, ceilings)
    found = next(verdict for rule in RULES if (verdict := rule(figures)) is not None)
    return Verdict(
        bound=found.bound,
        reason=found.reason,
        share=found.share,
        limit=found.limit,
        evidence=figures.evidence(),
        age_s=max(0.0, now - max(one.ended_at for one in good)),
        num_windows=len(good),
        left_out=(*_old(len(windows) - len(good)), *figures.missing()),
    )


def _old(count: int) -> tuple[str, ...]:
    return (f"{_num(count, 'window')} over {STALE_S:g} s old",) if count else ()


def _num(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _idle(seen: Figures) -> Verdict | None:
    if seen.busy_share >= BUSY_SHARE or seen.always_has_work:
        return None
    reason = f"steps take {seen.busy_share:.0%} of the time, then there is nothing to do"
    return Verdict(bound=Bound.IDLE, reason=reason, share=seen.busy_share)


def _link(seen: Figures) -> Verdict | None:
    limit = WaitReason.LINK if seen.waits_for is WaitReason.LINK else None
    if seen.link_share is not None and seen.link_share >= LINK_SHARE:
        share, others = seen.link_share, seen.others_link_share
        reason = f"the link carries {share:.0%} of its calibrated rate"
        if others is not None and others > share / 2:
            reason += f", {others:.0%} of the rate not by this engine's copies"
    elif seen.exposed_share is not None and seen.exposed_share >= EXPOSED_SHARE:
        share = seen.exposed_share
        reason = f"attention waits for pages in {share:.0%} of a step"
    elif limit is not None:
        return Verdict(
            bound=Bound.LINK,
            reason="requests wait because what all would miss takes longer than a token may",
            share=seen.link_share,
            limit=limit,
        )
    else:
        return None
    return Verdict(bound=Bound.LINK, reason=reason, share=share, limit=limit)


def _capacity(seen: Figures) -> Verdict | None:
    limit = seen.waits_for
    if limit is None or limit not in CAPACITY_WORDS:
        return None
    shares = {
        WaitReason.HOT_TIER: seen.newest.hot_used_frac,
        WaitReason.SPILLED: seen.newest.hot_used_frac,
        WaitReason.DRAM_TIER: seen.newest.dram_used_frac,
    }
    share = shares.get(limit)
    used = "" if share is None else f"; {share:.0%} of it is in use"
    waiting = _num(seen.newest.num_waiting, "request")
    reason = f"{waiting} waiting: {CAPACITY_WORDS[limit]}{used}"
    return Verdict(bound=Bound.CAPACITY, reason=reason, share=share, limit=limit)


def _host(seen: Figures) -> Verdict | None:
    if seen.busy_share < BUSY_SHARE:
        reason = f"there is work all the time, and steps take {seen.busy_share:.0%} of it"
        return Verdict(bound=Bound.HOST, reason=reason, share=seen.busy_share)
    if seen.ceilings.is_gpu and seen.gpu_share is not None and seen.gpu_share < GPU_SHARE:
        reason = f"the GPU is busy for {seen.gpu_share:.0%} of the time: it waits for the host"
        return Verdict(bound=Bound.HOST, reason=reason, share=seen.gpu_share)
    host, others = seen.host_cpu_share, seen.others_cpu_share
    if host is None or others is None or host < HOST_SHARE or others < 0.5:
        return None
    reason = f"{host:.0%} of the cores are busy, {others:.0%} of them all with other processes"
    return Verdict(bound=Bound.HOST, reason=reason, share=others)


def _parts(seen: Figures) -> Verdict | None:
    parts = seen.parts
    if not parts or sum(parts.values()) < EXPLAINED_SHARE:
        return None
    bound = max(parts, key=parts.__getitem__)
    words = {
        Bound.HBM: "reading weights, keys and values from device memory",
        Bound.COMPUTE: "products of matrices",
        Bound.LATENCY: "small kernels that wait for each other",
        Bound.LINK: "waits for pages",
    }
    reason = f"{words[bound]} takes {parts[bound]:.0%} of a step by bytes and rates alone"
    return Verdict(bound=bound, reason=reason, share=parts[bound])


def _cores(seen: Figures) -> Verdict | None:
    own = seen.own_cpu_share
    if seen.ceilings.is_gpu or own is None or own < CORES_SHARE:
        return None
    reason = f"the engine keeps {own:.0%} of all cores busy"
    return Verdict(bound=Bound.COMPUTE, reason=reason, share=own)


def _unknown(seen: Figures) -> Verdict:
    if seen.parts:
        share = sum(seen.parts.values())
        reason = f"bytes and rates explain only {share:.0%} of a step, and nothing else stands out"
        return Verdict(bound=Bound.UNKNOWN, reason=reason, share=share)
    gap = "; ".join(seen.missing()) or "the rates of this device"
    return Verdict(bound=Bound.UNKNOWN, reason=f"nothing stands out, and there is no {gap}")


RULES: Final[tuple[Callable[[Figures], Verdict | None], ...]] = (
    _idle,
    _link,
    _capacity,
    _host,
    _parts,
    _cores,
    _unknown,
)
