"""Which kind of load a daemon serves: contexts grouped as they come, without haste; pure.

Online k-means over what is asked of the engine. What that takes (concurrency, hits, bytes) is left
out: it follows from the knobs as well, and every change of them would look like another load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import dist, isfinite, log2
from typing import Final

from sparsed.core import KnobValue, Regime, WorkloadContext
from sparsed.tuner.drift import version_drift

Place = Mapping[str, float]  # binary logarithms of fields of a context, by name

SCALES: Final[Place] = {  # octaves that count as one
    "requests_per_s": 1.0,
    "input_tokens_p50": 1.0,
    "input_tokens_p95": 2.0,  # of few requests, which make it noisy
    "output_tokens_p50": 1.0,
    "output_tokens_p95": 2.0,
}
NEEDED: Final = ("requests_per_s", "input_tokens_p50")
MIN_REQUESTS: Final = 4
RADIUS: Final = 2.0  # of a regime: loads that are further away are another one
LEAVE_RADIUS: Final = 1.25 * RADIUS  # of the one in force
NEARER: Final = 0.6  # times as far as the one in force, and a load belongs to another one
FIRST_FRAC: Final = 0.25  # of the dwell, for the first regime of a life
MAX_REGIMES: Final = 8
MEMORY_S: Final = 6 * 3600.0  # in which a centroid follows
MAX_GAP_S: Final = 5.0  # what a silence counts for at most


@dataclass(frozen=True, kw_only=True, slots=True)
class Elsewhere:
    """A load that is not the one in force: where it was, on average, and for how long."""

    place: Place
    seen_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Regimes:
    """All that are known, and where the load is. ``current``: id of the one in force, None before
    the first; ``elsewhere``: None while the load is in it."""

    known: tuple[Regime, ...] = ()
    current: int | None = None
    elsewhere: Elsewhere | None = None
    at: float | None = None

    @property
    def standing(self) -> Regime | None:
        """The one in force."""
        return next((one for one in self.known if one.regime_id == self.current), None)

    def with_changed(self, regime: Regime) -> Regimes:
        """``regime`` in the place of the one with its id."""
        known = tuple(regime if one.regime_id == regime.regime_id else one for one in self.known)
        return replace(self, known=known)


def observe(
    state: Regimes, context: WorkloadContext | None, *, at: float, dwell_s: float
) -> Regimes:
    """The state after one more context, at seconds since the epoch.

    Another regime comes into force once the load was there for ``dwell_s``; a context that says
    too little changes nothing. Source: ours, online k-means with hysteresis.
    """
    elapsed_s = min(max(0.0, at - state.at), MAX_GAP_S) if state.at is not None else 0.0
    state = replace(state, at=at if state.at is None else max(at, state.at))
    place = place_of(context)
    if place is None:
        return state
    if (standing := state.standing) is not None and _belongs(place, standing, state.known):
        home = replace(_drawn(standing, place, seconds=elapsed_s), seen_at=at)
        return replace(state.with_changed(home), elsewhere=None)
    elsewhere = _grown(state.elsewhere, place, elapsed_s)
    needed_s = dwell_s if standing is not None else FIRST_FRAC * dwell_s
    if elsewhere.seen_s < needed_s:
        return replace(state, elsewhere=elsewhere)
    return _adopt(state, elsewhere, at=at)


def place_of(context: WorkloadContext | None) -> Place | None:
    """Where a context lies; None where it says too little to tell."""
    if context is None or context.num_requests < MIN_REQUESTS:
        return None
    figures = {name: getattr(context, name) for name in SCALES}
    place = {
        name: log2(value)
        for name, value in figures.items()
        if value is not None and isfinite(value) and value > 0
    }
    return place if all(name in place for name in NEEDED) else None


def distance(one: Place, other: Place) -> float:
    """In units of ``SCALES``, by the figures that both have."""
    names = [name for name in SCALES if name in one and name in other]
    return dist(*([place[name] / SCALES[name] for name in names] for place in (one, other)))


def in_words(place: Place) -> str:
    """As in: 2 requests/s, prompts of 5k (p95 8k) tokens, outputs of 300 (p95 500)."""
    rate, *lengths = (2 ** place[name] if name in place else None for name in SCALES)
    prompt, prompt_p95, output, output_p95 = map(_short, lengths)
    return (
        f"{rate or 0:.2g} requests/s, prompts of {prompt} (p95 {prompt_p95}) tokens, "
        f"outputs of {output} (p95 {output_p95})"
    )


def with_incumbent(
    state: Regimes,
    values: Mapping[str, KnobValue],
    *,
    at: float | None,
    versions: Mapping[str, str],
) -> Regimes:
    """``values`` are what is verified for the regime in force; empty: nothing is."""
    if (standing := state.standing) is None:
        return state
    return state.with_changed(
        replace(standing, incumbent=values, verified_at=at, versions=versions)
    )


def still_verified(known: tuple[Regime, ...], versions: Mapping[str, str]) -> tuple[Regime, ...]:
    """``known``, without incumbents that were verified on other versions than these."""
    return tuple(
        replace(one, incumbent={}, verified_at=None, versions={})
        if version_drift(one.versions, versions)
        else one
        for one in known
    )


def _belongs(place: Place, standing: Regime, known: tuple[Regime, ...]) -> bool:
    """To the regime in force, unless it lies well outside of it, or much nearer to another."""
    here = distance(place, standing.centroid)
    nearest = min(distance(place, one.centroid) for one in known)
    return here <= LEAVE_RADIUS and not nearest < NEARER * here


def _grown(before: Elsewhere | None, place: Place, seconds: float) -> Elsewhere:
    """A load that goes on to yet another place begins anew."""
    if before is None or distance(before.place, place) > RADIUS:
        return Elsewhere(place=place)
    seen_s = before.seen_s + seconds
    share = seconds / seen_s if seen_s > 0 else 1.0
    return Elsewhere(place=_between(before.place, place, share), seen_s=seen_s)


def _adopt(state: Regimes, elsewhere: Elsewhere, *, at: float) -> Regimes:
    place, seen_s = elsewhere.place, elsewhere.seen_s
    near = min(state.known, key=lambda one: distance(place, one.centroid), default=None)
    if near is not None and distance(place, near.centroid) <= RADIUS:
        home = replace(_drawn(near, place, seconds=seen_s), seen_at=at)
        known = state.with_changed(home).known
    else:
        home = Regime(
            regime_id=max((one.regime_id for one in state.known), default=0) + 1,
            centroid=place,
            signature=in_words(place),
            seen_s=seen_s,
            seen_at=at,
        )
        known = (*_with_room(state), home)
    return replace(state, known=known, current=home.regime_id, elsewhere=None)


def _with_room(state: Regimes) -> tuple[Regime, ...]:
    """Without the one that is missed least, where there are as many as may be."""
    if len(state.known) < MAX_REGIMES:
        return state.known
    least = min(state.known, key=lambda one: (bool(one.incumbent), one.seen_at))
    return tuple(one for one in state.known if one is not least)


def _drawn(regime: Regime, place: Place, *, seconds: float) -> Regime:
    """``regime`` after a load at ``place``, towards which its centroid has moved."""
    seen_s = regime.seen_s + seconds
    share = seconds / min(seen_s, MEMORY_S) if seen_s > 0 else 0.0
    centroid = _between(regime.centroid, place, min(1.0, share))
    return replace(regime, centroid=centroid, signature=in_words(centroid), seen_s=seen_s)


def _between(one: Place, other: Place, share: float) -> Place:
    """``share`` of the way to ``other``; figures that ``one`` has not, from there."""
    moved = {name: one[name] + share * (other.get(name, one[name]) - one[name]) for name in one}
    return {**other, **moved}


def _short(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.0f}"
