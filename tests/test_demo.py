"""The demo says what its tuning came to, whatever that was, and the README draws straight."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo import in_words, what_was_exported

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


def test_figures_are_short() -> None:
    assert in_words(0.87654321) == "0.877"
    assert (in_words(1024), in_words("quest"), in_words(None)) == ("1024", "quest", "None")


def test_the_box_of_the_readme_is_straight() -> None:
    lines = (Path(__file__).resolve().parents[1] / "README.md").read_text().splitlines()
    top = next(index for index, line in enumerate(lines) if "┌" in line)
    bottom = next(index for index, line in enumerate(lines) if index > top and line.endswith("┘"))
    edges = ("┌", "┐", "└", "┘", "│", "├", "┤")
    left, right = lines[top].index("┌"), lines[top].index("┐")
    for line in lines[top : bottom + 1]:
        assert line[left] in edges and line[right] in edges and len(line) == right + 1, line
