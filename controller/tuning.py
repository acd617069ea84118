"""``sparsed tune``: owns the machine, searches on the real engine, keeps a verified profile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from rich.console import Console

from sparsed.controller.bench_pool import BenchPool
from sparsed.controller.bench_thread import BenchThread, stop_all
from sparsed.controller.prompts import prompt_source
from sparsed.controller.search_model import search_model, search_space
from sparsed.controller.state_dir import StateLock
from sparsed.controller.study_log import StudyLog
from sparsed.controller.study_report import StudyReport, write_report
from sparsed.controller.study_resume import Question, check_space, find_study
from sparsed.controller.time_budget import TimeBudget
from sparsed.controller.trials import EngineBench
from sparsed.controller.tune_devices import prepare_places, share_in_words
from sparsed.controller.tune_options import TuneOptions, check_options
from sparsed.controller.tuning_export import export_profile
from sparsed.controller.tuning_report import StudyProgress, print_outcome
from sparsed.controller.warm_start import find_beginning
from sparsed.controller.workload import (
    ServiceTimes,
    describe_workload,
    expected_s,
    fit_workload,
    recall_stride,
)
from sparsed.core import (
    AcceptanceWindow,
    ExitCode,
    KnobValue,
    Profile,
    ProfileStatus,
    SearchMethod,
    StartError,
    TrialResult,
    Workload,
)
from sparsed.db import open_store
from sparsed.db.store import Store, Study
from sparsed.tuner.importance import knob_importance
from sparsed.tuner.objective import OutOfTime, TrialFailed
from sparsed.tuner.offline import StudyOutcome, StudyPlan, run_study
from sparsed.tuner.space import SearchSpace, describe_space
from sparsed.tuner.trials import NUM_REPEATS

EXIT_INTERRUPTED: Final = 130  # as a shell reports Ctrl-C
DEFAULT_TRIAL_S: Final = {"cpu": 6.0, "cuda": 30.0}
DEADLINE_FACTOR: Final = 10.0  # of the expected time of a window
MIN_DEADLINE_S: Final = 60.0


def run_tune(options: TuneOptions) -> int:
    """Search, verify, store and export; returns the exit code.

    Errors: StartError (75 beside a daemon, or with no time for the default; 65 or 77 for the database; 70 when the default does
    not run), InputError for an option.
    """
    requested = check_options(options)
    state_dir = options.config.state_dir
    with StateLock(state_dir, verb="tune"):
        store = open_store(state_dir.database)
        tune = _Tune(options, store=store, console=Console())
        try:
            return tune.run(requested)
        except OutOfTime:
            message = "--max-seconds passed before the default was measured: give more"
            raise StartError(message, code=ExitCode.TEMPORARY) from None
        except KeyboardInterrupt:  # outside of the study, which keeps what it has
            return EXIT_INTERRUPTED
        finally:
            tune.close()
            store.close()


class _Tune:
    """One run, from the probe to the table; to be closed by the caller."""

    def __init__(self, options: TuneOptions, *, store: Store, console: Console) -> None:
        self._budget = TimeBudget(options.max_s)
        config = replace(options.config, no_profile=True)  # trial 0 is the default, not a winner
        self._options = options
        self._store = store
        self._console = console
        self._slo = config.slo
        devices = options.devices or (config.device,)
        places = prepare_places(config, devices, progress=self._say_progress)
        self._plan = places[0].plan
        self._prompts = prompt_source(self._plan)
        self._threads = tuple(
            BenchThread(
                EngineBench(place.config, place.plan, prompts=self._prompts), budget=self._budget
            )
            for place in places
        )

    def close(self) -> None:
        """End all engines."""
        stop_all(self._threads)
        for thread in self._threads:
            thread.close()

    def run(self, requested: Workload) -> int:
        resumed = self._find_study(requested) if self._options.resume is not None else None
        if (num_engines := len(self._threads)) > 1:
            self._console.print(share_in_words(self._plan, num_engines=num_engines))
        times = self._probe()
        if resumed is not None:
            study_id, workload = resumed.study_id, resumed.workload
        else:
            study_id, workload = self._open_study(requested, times=times)
        self._ready_all(workload)
        log = StudyLog(self._store, key=self._plan.key, study_id=study_id, say=self._console.print)
        expected = DEADLINE_FACTOR * expected_s(workload.requests, times=times)
        pool = BenchPool(
            self._threads,
            workload=workload,
            deadline_s=max(MIN_DEADLINE_S, expected),
            on_begin=log.begin_window,
        )
        previous = self._store.list_trials(study_id=study_id)
        outcome = self._search(pool, previous=previous, workload=workload, log=log)
        profile = self._profile(outcome, workload=workload)
        print_outcome(self._console, outcome, objective=self._options.objective)
        if outcome.dropped_warm:
            self._console.print("the trials spoke against the profile of elsewhere: dropped")
        if outcome.comparison is not None:
            log.record_decision(outcome.comparison)
        self._export(profile)
        self._report(outcome, study_id=study_id, workload=workload)
        if outcome.interrupted:
            return EXIT_INTERRUPTED
        return ExitCode.OK if outcome.default_ran else ExitCode.SOFTWARE

    def _probe(self) -> ServiceTimes:
        """What a request takes on the first device."""
        first = self._threads[0]
        try:
            return first.run(first.bench.probe)
        except TrialFailed as error:
            message = f"the default configuration does not run: {error}"
            raise StartError(message, code=ExitCode.SOFTWARE) from error

    def _ready_all(self, workload: Workload) -> None:
        """Every device measures as the first one does."""
        first, stride = self._threads[0], recall_stride(workload)
        for thread in self._threads:
            thread.bench.take_calibration(first.bench)
            thread.run(partial(thread.bench.sample_recall, stride=stride))

    def _find_study(self, requested: Workload) -> Study:
        """The study to go on with; its workload is the one it was begun with."""
        options = self._options
        assert options.resume is not None
        question = Question(
            key=self._plan.key,
            workload=requested.name,
            objective=options.objective,
            slo=self._slo,
            seed=options.config.seed,
        )
        study = find_study(self._store, options.resume, question=question)
        check_space(study, self._describe(study.workload))
        self._console.print(f"resuming study {study.study_id}")
        return study

    def _open_study(self, requested: Workload, *, times: ServiceTimes) -> tuple[int, Workload]:
        """A new study over a workload cut to this machine."""
        options, seed = self._options, self._options.config.seed
        fitted = fit_workload(
            requested,
            max_tokens=self._plan.spec.knobs.max_model_len,
            window_s=self._trial_s / NUM_REPEATS,
            times=times,
        )
        self._console.print(
            f"workload {requested.name}: {fitted.description}, about {fitted.expected_s:.1f} s a "
            f"window, {NUM_REPEATS} windows a trial"
        )
        self._console.print(f"the prompts are {self._prompts.description}")
        self._warn_of_short_prompts(fitted.workload)
        study_id = self._store.start_study(
            self._plan.key,
            workload=fitted.workload,
            objective=options.objective,
            slo=self._slo,
            seed=seed,
            space=self._describe(fitted.workload),
            versions=self._versions,
            started_at=time.time(),
        )
        self._console.print(f"study {study_id}: goes on after a stop with --resume {study_id}")
        return study_id, fitted.workload

    def _space(self, workload: Workload) -> SearchSpace:
        return search_space(
            self._plan,
            fixed=self._options.config.knobs.keys(),
            workload=workload,
            calibration=self._threads[0].bench.calibration,
        )

    def _describe(self, workload: Workload) -> dict[str, list[KnobValue]]:
        return describe_space(self._space(workload), fixed=self._options.config.knobs.keys())

    def _warn_of_short_prompts(self, workload: Workload) -> None:
        longest = max(request.input_tokens for request in workload.requests)
        budget = self._plan.spec.knobs.token_budget
        if longest <= budget:
            self._console.print(
                f"note: no prompt is longer than token_budget={budget}, so sparsity is hardly "
                "tried; give --trial-seconds more"
            )

    def _search(
        self,
        pool: BenchPool,
        *,
        previous: Sequence[TrialResult],
        workload: Workload,
        log: StudyLog,
    ) -> StudyOutcome:
        plan, devices = self._study_plan(workload), pool.devices
        with StudyProgress(
            self._console, plan=plan, devices=devices, previous=previous
        ) as progress:

            def record(trial: TrialResult) -> None:
                log.record_trial(trial)
                progress.show(trial)

            def record_window(window: AcceptanceWindow) -> None:
                log.record_window(window)
                progress.show_window(window)

            return run_study(
                pool,
                plan=plan,
                record=record,
                record_window=record_window,
                left_frac=lambda: self._budget.left_frac,
                previous=previous,
            )

    def _study_plan(self, workload: Workload) -> StudyPlan:
        """What is known beforehand, each part told to the user."""
        options = self._options
        model = search_model(
            self._plan,
            workload,
            objective=options.objective,
            slo=self._slo,
            calibration=self._threads[0].bench.calibration,
        )
        if options.method is SearchMethod.CONSTRAINED:
            self._console.print(model.description)
        space = self._space(workload)
        beginning = find_beginning(
            self._plan,
            self._store,
            space=space,
            objective=options.objective,
            is_wanted=not options.config.no_profile,
        )
        if beginning.warm is None or options.method is SearchMethod.CONSTRAINED:
            self._console.print(beginning.description)  # no other search takes anything over
        return StudyPlan(
            space=space,
            objective=options.objective,
            slo=self._slo,
            num_trials=options.trials,
            method=options.method,
            seed=options.config.seed,
            prior=model.prior,
            memory=model.memory,
            warm=beginning.warm,
            first=beginning.first,
        )

    def _profile(self, outcome: StudyOutcome, *, workload: Workload) -> Profile | None:
        """The verified winner, stored; else the default as a draft, which is not. None without
        a default that ran."""
        chosen = outcome.winner or outcome.default
        if chosen is None or not outcome.default_ran:
            return None
        verified = outcome.winner is not None
        profile = Profile(
            key=self._plan.key,
            values=chosen.values,
            status=ProfileStatus.VERIFIED if verified else ProfileStatus.DRAFT,
            workload=workload.name,
            objective=self._options.objective,
            default_scores=outcome.default_scores,
            winner_scores=outcome.winner_scores if verified else (),
            versions=self._versions,
            created_at=time.time(),
            shape=self._plan.model.shape,
        )
        if not verified:
            return profile
        saved = self._store.save_profile(profile)
        self._console.print(f"profile {saved.profile_id} is verified: the next start takes it")
        return saved

    def _export(self, profile: Profile | None) -> None:
        if self._options.export is not None and profile is not None:
            words = export_profile(profile, self._options.export, plan=self._plan)
            self._console.print(words)

    def _report(self, outcome: StudyOutcome, *, study_id: int, workload: Workload) -> None:
        options = self._options
        if options.output_dir is None:
            return
        seed = options.config.seed
        report = StudyReport(
            study_id=study_id,
            key=self._plan.key,
            workload=describe_workload(workload),
            objective=options.objective,
            slo=self._slo,
            seed=seed,
            outcome=outcome,
            importance=knob_importance(self._space(workload), outcome.trials, seed=seed),
            versions=self._versions,
        )
        for path in write_report(report, options.output_dir):
            self._console.print(str(path), soft_wrap=True, highlight=False)

    @property
    def _trial_s(self) -> float:
        kind = self._plan.spec.device.partition(":")[0]
        return self._options.trial_s or DEFAULT_TRIAL_S[kind]

    @property
    def _versions(self) -> dict[str, str]:
        return {**self._plan.versions, **self._threads[0].bench.versions}

    def _say_progress(self, phase: str, frac: float) -> None:
        self._console.print(f"{phase}, {100 * frac:.0f} %")
