"""Which stored study a run goes on with, and why it may not; and what the newest one measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sparsed.core import InputError, Objective, ProfileKey, Slo, TrialResult
from sparsed.db.store import Study, StudyStore

LAST: Final = "last"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What a run asks; ``workload`` by its name."""

    key: ProfileKey
    workload: str
    objective: Objective
    slo: Slo
    seed: int


def latest_trials(store: StudyStore, key: ProfileKey) -> tuple[TrialResult, ...]:
    """Those of the newest study: scores of different workloads do not compare. StoreError."""
    trials = store.list_trials(key=key)
    begins = max((i for i, trial in enumerate(trials) if trial.number == 0), default=0)
    return trials[begins:]


def find_study(store: StudyStore, resume: str, *, question: Question) -> Study:
    """The study with the number ``resume``, or the newest one of this question for ``LAST``.

    InputError: there is none, or it asked something else; the message says what.
    """
    if resume == LAST:
        found = store.find_study(
            question.key,
            workload=question.workload,
            objective=question.objective,
            slo=question.slo,
            seed=question.seed,
        )
        if found is None:
            raise InputError(
                "no study of this model, machine, workload, objective, targets and seed is "
                "stored: leave --resume out to begin one",
                field="resume",
            )
        return found
    if not resume.isdecimal():
        raise InputError(
            f"--resume {resume!r}: give the number of a study, or {LAST}", field="resume"
        )
    study = store.get_study(int(resume))
    asked = {
        "hardware": (study.key.hardware, question.key.hardware),
        "model": (study.key.model, question.key.model),
        "dtype": (study.key.dtype, question.key.dtype),
        "workload": (study.workload.name, question.workload),
        "objective": (study.objective.value, question.objective.value),
        "targets": (_in_words(study.slo), _in_words(question.slo)),
        "seed": (study.seed, question.seed),
    }
    _refuse(study, {name: pair for name, pair in asked.items() if pair[0] != pair[1]})
    return study


def check_space(study: Study, space: Mapping[str, Any]) -> None:
    """InputError if ``study`` searches another space: its trials could not be compared."""
    if study.space is None:
        raise InputError(
            f"study {study.study_id} was begun by a version that did not keep its search space, "
            "so nobody knows whether it is the same: begin a new one",
            field="resume",
        )
    names = sorted(study.space.keys() | space.keys())
    pairs = {name: (study.space.get(name), space.get(name)) for name in names}
    _refuse(study, {name: pair for name, pair in pairs.items() if pair[0] != pair[1]})


def _refuse(study: Study, differences: Mapping[str, tuple[object, object]]) -> None:
    if not differences:
        return
    words = "; ".join(f"{name} {old}, now {new}" for name, (old, new) in differences.items())
    raise InputError(
        f"study {study.study_id} cannot be gone on with, it was begun with {words}: repeat its "
        "options, or leave --resume out",
        field="resume",
    )


def _in_words(slo: Slo) -> str:
    return f"TTFT {slo.ttft_s} s, TPOT {slo.tpot_s} s, recall {slo.min_recall}"
