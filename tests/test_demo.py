"""The demo says what its tuning came to, whatever that was."""

from __future__ import annotations

import pytest
from demo import what_was_exported

from sparsed.core import Objective, Profile, ProfileKey, ProfileStatus
from sparsed.tuner.export import render_profile


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (ProfileStatus.DRAFT, "nothing was verified, so no profile is kept"),
        (ProfileStatus.VERIFIED, "holds a verified profile"),
    ],
)
def test_an_export_is_called_what_it_is(status: ProfileStatus, words: str) -> None:
    profile = Profile(
        key=ProfileKey(hardware="cpu", model="m", dtype="float32"),
        values={"token_budget": 1024},
        status=status,
        workload="chat",
        objective=Objective.THROUGHPUT,
    )
    assert words in what_was_exported(render_profile(profile, format="toml"))
