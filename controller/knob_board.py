"""The knobs of a running daemon: values, where they came from, and what waits for a restart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

from sparsed.controller.control import KnobSource, KnobState
from sparsed.core import (
    KNOB_SPECS,
    KNOBS_BY_NAME,
    InputError,
    KnobClass,
    Knobs,
    KnobValue,
    check_knob_values,
)
from sparsed.tuner.space import largest_chunk


class KnobChange(NamedTuple):
    """What a set of values asks for: the knobs to have now, and what waits for a restart."""

    knobs: Knobs
    pending: Mapping[str, KnobValue]


class KnobBoard:
    """The values in force, ``knobs``, follow the engine: they change by ``take`` alone.

    A change begins from those asked for last, ``wanted``, so that none is lost that the engine is
    still getting ready for. What was set for a restart is also wanted by every start after it.
    ``max_prefill_chunk``: what memory has room for until a restart, None: any chunk.
    """

    def __init__(
        self,
        knobs: Knobs,
        *,
        sources: Mapping[str, KnobSource],
        max_prefill_chunk: int | None = None,
    ) -> None:
        self.knobs = knobs
        self._max_prefill_chunk = max_prefill_chunk
        self._sources = dict(sources)
        self._pending: dict[str, KnobValue] = {}
        self._asked: dict[int, Knobs] = {}  # by id, the newest last; not answered yet
        self._ids = itertools.count(1)

    @property
    def wanted(self) -> Knobs:
        """What the engine was asked for last, or has."""
        return next(reversed(self._asked.values()), self.knobs)

    def ask(self, knobs: Knobs) -> int:
        """The engine is asked for ``knobs``; an id that no other question has. InputError, and it is
        not asked, where they need more memory than there is."""
        self._check_memory(knobs)
        change_id = next(self._ids)
        self._asked[change_id] = knobs
        return change_id

    def answered(self, change_id: int) -> None:
        """The engine has taken or refused what it was asked for under that id."""
        self._asked.pop(change_id, None)

    def forget_asked(self) -> None:
        """Nobody will answer: the engine that was asked is gone."""
        self._asked.clear()

    def resolve(self, values: Mapping[str, KnobValue]) -> KnobChange:
        """Split into hot and waiting values. InputError if they cannot be; nothing changes."""
        checked = check_knob_values(values)
        hot = {name: value for name, value in checked.items() if _is_hot(name)}
        knobs = self.wanted.with_values(hot)
        self._check_memory(knobs)
        asked = self._pending | {name: checked[name] for name in checked.keys() - hot.keys()}
        pending = {name: value for name, value in asked.items() if value != getattr(knobs, name)}
        knobs.with_values(pending)  # what the next start will be told must hold together
        return KnobChange(knobs=knobs, pending=pending)

    def take(self, knobs: Knobs) -> None:
        """The engine runs with ``knobs`` from now on."""
        self._sources |= self._changed_sources(knobs)
        self.knobs = knobs

    def check_in_force(self, values: Mapping[str, KnobValue]) -> None:
        """InputError for a hot value that a newer change has overtaken."""
        for name, value in check_knob_values(values).items():
            if _is_hot(name) and (now := getattr(self.knobs, name)) != value:
                raise InputError(
                    f"{name} is {'auto' if now is None else now}: another change came before this "
                    "one was in force; set it again if it should be otherwise",
                    field=name,
                )

    def for_next_start(self, pending: Mapping[str, KnobValue]) -> dict[str, KnobValue]:
        """``pending``, and what this start was already told in the same way."""
        told = {
            spec.name: getattr(self.knobs, spec.name)
            for spec in KNOB_SPECS
            if not _is_hot(spec.name) and self._sources[spec.name] is KnobSource.LIVE
        }
        return told | dict(pending)

    def keep(self, pending: Mapping[str, KnobValue]) -> None:
        """Remember what waits for a restart."""
        self._pending = dict(pending)

    def states(self, change: KnobChange | None = None) -> tuple[KnobState, ...]:
        """All knobs, as they are or as they would be after ``change``."""
        knobs, pending = change or KnobChange(knobs=self.knobs, pending=self._pending)
        sources = self._sources | self._changed_sources(knobs)
        return tuple(
            KnobState(
                spec=spec,
                value=getattr(knobs, spec.name),
                source=sources[spec.name],
                pending=pending.get(spec.name),
            )
            for spec in KNOB_SPECS
        )

    def _check_memory(self, knobs: Knobs) -> None:
        chunk = knobs.prefill_chunk
        if chunk > largest_chunk(self.knobs, self._max_prefill_chunk):
            raise InputError(
                f"prefill_chunk={chunk} does not fit: beside the tiers of this start the device has "
                f"room for chunks of {self._max_prefill_chunk} tokens; restart with --prefill-chunk {chunk}, which "
                "makes the hot tier smaller, or lower it",
                field="prefill_chunk",
            )

    def _changed_sources(self, knobs: Knobs) -> dict[str, KnobSource]:
        before, after = self.knobs.as_dict(), knobs.as_dict()
        return {name: KnobSource.LIVE for name in after if after[name] != before[name]}


def _is_hot(name: str) -> bool:
    return KNOBS_BY_NAME[name].klass is KnobClass.HOT
