"""What the database of a state directory knows, where nobody has opened it for writing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sparsed.controller.recovery import TunedValues, tuned_values
from sparsed.controller.state_dir import StateDir
from sparsed.core import ExitCode, LinkCalibration, LinkKey, Profile, ProfileKey, StartError
from sparsed.db import open_store
from sparsed.db.memory import InMemoryProfileStore
from sparsed.db.store import Store

logger = logging.getLogger(__name__)

FindVerified = Callable[[ProfileKey], Profile | None]
FindProfiles = Callable[[], tuple[Profile, ...]]
FindTuned = Callable[[ProfileKey], TunedValues]
FindCalibration = Callable[[LinkKey], LinkCalibration | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finders:
    """Where values of a start are looked for. ``verified``: the profile of a key; ``profiles``: all
    that are stored; ``tuned``: what the live tuner left."""

    verified: FindVerified
    profiles: FindProfiles
    tuned: FindTuned


def finders_of(
    state_dir: StateDir,
    *,
    verified: FindVerified | None,
    profiles: FindProfiles | None,
    tuned: FindTuned | None,
) -> Finders:
    """None: the database of ``state_dir``, if there is one."""
    return Finders(
        verified=verified or profiles_of(state_dir),
        profiles=profiles or all_profiles_of(state_dir),
        tuned=tuned or tuned_of(state_dir),
    )


def profiles_of(state_dir: StateDir) -> FindVerified:
    def find(key: ProfileKey) -> Profile | None:
        with _database(state_dir) as store:
            return store.find_verified(key) if store else None

    return find


def all_profiles_of(state_dir: StateDir) -> FindProfiles:
    def find() -> tuple[Profile, ...]:
        with _database(state_dir) as store:
            return store.list_profiles() if store else ()

    return find


def calibrations_of(state_dir: StateDir) -> FindCalibration:
    def find(key: LinkKey) -> LinkCalibration | None:
        with _database(state_dir) as store:
            return store.find_calibration(key) if store else None

    return find


def tuned_of(state_dir: StateDir) -> FindTuned:
    def find(key: ProfileKey) -> TunedValues:
        with _database(state_dir) as store:
            return tuned_values(store, key) if store else TunedValues()

    return find


@contextmanager
def _database(state_dir: StateDir) -> Iterator[Store | None]:
    """The store; None where there is no file, and none is made."""
    if not state_dir.database.exists():
        yield None
        return
    store = open_store(state_dir.database)
    try:
        yield store
    finally:
        store.close()


def open_or_remember(state_dir: StateDir) -> tuple[Store, str | None]:
    """The database, or a store in memory and the reason: a bad disk must not keep us down.

    Errors: StartError for a database that is damaged or newer than this version.
    """
    try:
        return open_store(state_dir.database), None
    except StartError as error:
        if error.code is ExitCode.DATA:
            raise
        logger.warning("%s; profiles and measurements are kept in memory only", error)
        return InMemoryProfileStore(), str(error)
