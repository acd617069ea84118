"""What an operator does with stored profiles; the same for the daemon and without one."""

from __future__ import annotations

from typing import Protocol

from sparsed.core import InputError, Profile
from sparsed.db.store import ProfileStore
from sparsed.tuner.export import ExportFormat, parse_profile, render_profile


class ProfileShelf(Protocol):
    """Stored profiles. InputError: no such profile, or a text that is none.

    ``validate_only`` checks and changes nothing; ``reason`` is for the log.
    """

    def list_profiles(self) -> tuple[Profile, ...]: ...

    def get_profile(self, profile_id: int) -> Profile: ...

    def import_profile(self, text: str, *, validate_only: bool, reason: str) -> Profile:
        """Store the profile that ``text`` (TOML or JSON) describes, and return it."""
        ...

    def export_profile(
        self,
        profile_id: int,
        *,
        format: ExportFormat,
        engine_version: str | None = None,
        force: bool = False,
    ) -> str:
        """Its text; ``engine_version`` and ``force`` as in ``render_profile``."""
        ...

    def pin_profile(self, profile_id: int, *, validate_only: bool, reason: str) -> Profile:
        """Prefer this profile to all others of its key at the next start."""
        ...


class StoredProfiles:
    """A ``ProfileShelf`` over the store itself; threads as the store allows them."""

    def __init__(self, store: ProfileStore) -> None:
        self._store = store

    def list_profiles(self) -> tuple[Profile, ...]:
        return self._store.list_profiles()

    def get_profile(self, profile_id: int) -> Profile:
        for profile in self.list_profiles():
            if profile.profile_id == profile_id:
                return profile
        raise InputError(
            f"there is no profile {profile_id}; see: sparsed profile list", field="profile_id"
        )

    def import_profile(self, text: str, *, validate_only: bool, reason: str) -> Profile:
        profile = parse_profile(text)
        return profile if validate_only else self._store.save_profile(profile)

    def export_profile(
        self,
        profile_id: int,
        *,
        format: ExportFormat,
        engine_version: str | None = None,
        force: bool = False,
    ) -> str:
        profile = self.get_profile(profile_id)
        return render_profile(profile, format=format, engine_version=engine_version, force=force)

    def pin_profile(self, profile_id: int, *, validate_only: bool, reason: str) -> Profile:
        profile = self.get_profile(profile_id)
        return profile if validate_only else self._store.pin(profile_id)
