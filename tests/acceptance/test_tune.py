"""`sparsed tune` on the real engine: a short study, Ctrl-C, and going on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sparsed.controller.config import DaemonConfig, load_config
from sparsed.controller.search_model import search_space
from sparsed.controller.startup import prepare
from sparsed.controller.tune_options import TuneOptions
from sparsed.controller.tuning import run_tune
from sparsed.core import (
    AcceptanceDecision,
    Objective,
    Profile,
    TrialResult,
    TrialStatus,
    WindowStage,
    Workload,
    WorkloadRequest,
)
from sparsed.db import open_store
from sparsed.tuner.acceptance import agree, decide
from sparsed.tuner.export import parse_profile
from sparsed.tuner.space import describe_space

REQUESTS = tuple(
    WorkloadRequest(arrival_s=0.0, input_tokens=num_input, output_tokens=12)
    for num_input in (32, 64, 96)
)
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def tune(state_dir: Path, *more: str) -> subprocess.Popen[str]:
    """One trial an arm of about a second; the page size is fixed, so one engine serves all."""
    command = (sys.executable, "-m", "sparsed", "tune", "--model", "dummy:tiny", "--device", "cpu")
    options = ("--workload", "chat", "--trials", "1", "--trial-seconds", "1", "--page-size", "32")
    options += ("--max-seconds", "120")  # of which a slow machine may need all
    return subprocess.Popen(
        (*command, *options, "--state-dir", str(state_dir), *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | QUIET,
    )


def read_until(process: subprocess.Popen[str], words: str, *, num: int = 1) -> str:
    """What it printed up to the line that holds ``words`` for the ``num``-th time."""
    assert process.stdout is not None
    printed = ""
    deadline = time.monotonic() + 120
    while printed.count(words) < num:
        assert time.monotonic() < deadline and process.poll() is None, printed
        printed += process.stdout.readline()
    return printed


@pytest.mark.slow
def test_a_study_is_stored_trial_by_trial_and_its_result_exported(tmp_path: Path) -> None:
    file = tmp_path / "best.toml"
    process = tune(tmp_path / "state", "--export", str(file))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    store = open_store(tmp_path / "state" / "sparsed.db")
    trials = store.list_trials()
    profiles = store.list_profiles()
    decisions = store.list_acceptances()
    store.close()
    assert bool(decisions) == ("sparsed decision show 1" in " ".join(output.split()))
    assert all(item.study_id == 1 and is_reproduced(item) for item in decisions)
    assert [trial.arm for trial in trials[:3]] == ["default", "bayes", "random"]
    assert trials[0].status is TrialStatus.OK
    assert trials[0].metrics["output_tokens_per_s"] == trials[0].score
    assert all(trial.ended_at > trial.started_at > 0 for trial in trials)
    for trial in (trial for trial in trials if trial.score):
        assert bool(trial.metrics["sparse_steps"]) == ("attention_recall" in trial.metrics)
    exported = parse_profile(file.read_text())
    expected: Profile | None = next(iter(profiles), None)
    assert exported.values == (expected.values if expected else trials[0].values)
    assert "page_size" not in exported.values
    assert "the default stays" in output or "is verified" in output
    assert "the prompts are random tokens" in " ".join(output.split())
    longest = re.search(r"longest prompt (\d+) tokens", words := " ".join(output.split()))
    assert longest
    budget = trials[0].values.get("token_budget")
    if budget is not None:  # on a slow machine no prompt may reach it: then it is not tried at all
        assert ("hardly tried" in words) is (int(longest[1]) <= int(budget))


def is_reproduced(decision: AcceptanceDecision) -> bool:
    changed = {"config_from": decision.config_from, "config_to": decision.config_to}
    return agree(decision.verdict, decide(decision.windows, rule=decision.rule, **changed))


def searched(config: DaemonConfig) -> None:
    """Leave a study behind whose search is over: it found one candidate."""
    config.state_dir.root.mkdir()
    store = open_store(config.state_dir.database)
    plan = prepare(config, progress=lambda phase, frac: None)
    workload, fixed = Workload(name="chat", requests=REQUESTS), config.knobs.keys()
    study = store.start_study(
        plan.key,
        workload=workload,
        objective=Objective.THROUGHPUT,
        slo=config.slo,
        seed=config.seed,
        space=describe_space(search_space(plan, fixed=fixed, workload=workload), fixed=fixed),
        versions={},
        started_at=0.0,
    )
    for number, (arm, num_seqs) in enumerate((("default", 2), ("bayes", 1), ("random", 2))):
        store.record_trial(
            study,
            TrialResult(
                number=number,
                arm=arm,
                values={"max_num_active_seqs": num_seqs},
                status=TrialStatus.OK,
                score=20.0 if arm == "bayes" else 10.0,
                spread_frac=None,
                metrics={},
            ),
        )
    store.close()


@pytest.mark.slow
def test_a_decision_keeps_its_windows_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    given = {"model": "dummy:tiny", "device": "cpu", "max_num_seqs": 2}
    config = load_config(flags=given | {"state_dir": tmp_path / "state"}, environment={})
    searched(config)
    options = TuneOptions(config=config, workload="chat", trials=1, resume="last", max_s=60.0)
    assert run_tune(options) == 0
    store = open_store(config.state_dir.database)
    (decision,) = store.list_acceptances()
    assert len(store.list_trials()) == 3
    store.close()
    assert is_reproduced(decision)
    assert decision.config_from == {"max_num_active_seqs": 2}
    assert decision.config_to == {"max_num_active_seqs": 1}
    ranked = [item for item in decision.windows if item.stage is WindowStage.RANK]
    served = [(item.order, item.values["max_num_active_seqs"]) for item in ranked]
    whole = [(1, 2), (1, 1), (2, 1), (2, 2), (3, 2), (3, 1), (4, 1), (4, 2), (5, 2), (5, 1)]
    assert served == whole[: len(served)] and served
    for item in decision.windows:
        assert item.ended_at > item.started_at > 0
        assert item.status is TrialStatus.OK
        assert all(item.metrics[guard] is not None for guard in decision.rule.guards)


@pytest.mark.slow
def test_no_time_for_the_default_is_said(tmp_path: Path) -> None:
    process = tune(tmp_path / "state", "--max-seconds", "1")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "--max-seconds passed before the default was measured" in output


@pytest.mark.slow
def test_ctrl_c_keeps_the_trials_and_resume_goes_on(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    process = tune(state_dir, "--trials", "8")  # more than end before the signal arrives
    printed = read_until(process, " default ")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed + output
    resumed = tune(state_dir, "--resume", "last", "--trials", "8")
    printed = read_until(resumed, " random ")
    resumed.send_signal(signal.SIGINT)  # another test sees a resumed study end by itself
    output, _ = resumed.communicate(timeout=60)
    assert resumed.returncode in (130, 0), printed + output  # 0: there was nothing more to try
    assert "resuming study 1" in printed
    store = open_store(state_dir / "sparsed.db")
    arms = [item.arm for item in store.list_trials(study_id=1) if item.status != "interrupted"]
    store.close()
    assert arms.count("default") == 1
    assert {"bayes", "random"} <= set(arms)


@pytest.mark.slow
@pytest.mark.parametrize("age_s", [0.0, 0.1, 0.5])  # of the engine; its own imports take some of it
def test_no_engine_outlives_a_study_that_was_killed(tmp_path: Path, age_s: float) -> None:
    process = tune(tmp_path / "state")
    deadline = time.monotonic() + 120
    while not engines_of(tmp_path):
        assert time.monotonic() < deadline and process.poll() is None
    time.sleep(age_s)
    process.kill()
    process.communicate(timeout=60)
    _, left = psutil.wait_procs(engines_of(tmp_path), timeout=20)
    assert not left


def engines_of(directory: Path) -> list[psutil.Process]:
    """Of whatever study in ``directory``, whoever their parent is now."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "sparsed.engine.worker" in (command := process.info["cmdline"] or [])
        and any(str(directory) in argument for argument in command)
    ]


@pytest.mark.slow
def test_a_study_that_was_killed_goes_on_from_its_trials(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    process = tune(state_dir, "--trials", "8")
    read_until(process, " bayes ")
    process.kill()
    process.communicate(timeout=60)
    store = open_store(state_dir / "sparsed.db")
    kept = store.list_trials(study_id=1)
    store.close()
    assert [item.arm for item in kept[:2]] == ["default", "bayes"]
    refused = tune(state_dir, "--resume", "1", "--page-size", "64")
    output, _ = refused.communicate(timeout=60)
    assert refused.returncode == 64 and "page_size [32], now [64]" in " ".join(output.split())
    report = tmp_path / "report"
    resumed = tune(state_dir, "--resume", "1", "--trials", "2", "--output-dir", str(report))
    output, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, output
    store = open_store(state_dir / "sparsed.db")
    trials = store.list_trials(study_id=1)
    store.close()
    assert trials[: len(kept)] == kept
    for arm in ("default", "bayes", "random"):
        tried = [sorted(map(str, item.values.items())) for item in trials if item.arm == arm]
        assert len({str(values) for values in tried}) == len(tried)
    told = json.loads((report / "result.json").read_text())
    assert [item["number"] for item in told["trials"]] == [item.number for item in trials]


# Several devices, as which CPUs of this machine have to do: the flag refuses a list of them.
TWO = (
    "import sys; from pathlib import Path\n"
    "from sparsed.controller.config import load_config\n"
    "from sparsed.controller.tune_options import TuneOptions\n"
    "from sparsed.controller.tuning import run_tune\n"
    "state, trace, resume, max_s = sys.argv[1:]\n"
    "given = dict(model='dummy:tiny', device='cpu', state_dir=state, kv_hbm_gib=0.1, kv_dram_gib=0.1)\n"
    "options = TuneOptions(\n"
    "    config=load_config(flags=given, environment={}), workload=trace, trials=6, trial_s=1.0,\n"
    "    resume=resume or None, max_s=float(max_s), devices=('cpu', 'cpu'))\n"
    "sys.exit(run_tune(options))"
)


def tune_two(directory: Path, *, resume: str = "", max_s: int = 120) -> subprocess.Popen[str]:
    """Requests enough for a space of many points, some of which need an engine of their own."""
    trace = directory / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 40, "output_length": 10}
    trace.write_text(f"{json.dumps(row)}\n" * 6)
    arguments = (str(directory / "state"), str(trace), resume, str(max_s))
    return subprocess.Popen(
        (sys.executable, "-P", "-c", TWO, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | QUIET,
    )


def trials_of(directory: Path) -> tuple[TrialResult, ...]:
    store = open_store(directory / "state" / "sparsed.db")
    trials = store.list_trials(study_id=1)
    store.close()
    return trials


@pytest.mark.slow
def test_two_devices_measure_at_once_and_outlive_each_others_engines(tmp_path: Path) -> None:
    process = tune_two(tmp_path)
    printed = read_until(process, " default ")
    deadline = time.monotonic() + 60
    while len(engines := engines_of(tmp_path)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
    victim = max(engines, key=lambda engine: engine.create_time())
    victim.kill()
    printed += read_until(process, "killed by SIGKILL")
    assert " interrupted " in " ".join(printed.split())
    printed += read_until(process, " cpu ", num=2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed + output
    assert not engines_of(tmp_path)
    words = " ".join(printed.split())
    assert "2 engines share the memory" in words and "each pins 0.1" in words
    trials = trials_of(tmp_path)
    assert [trial.number for trial in trials] == [*range(len(trials))]
    assert {trial.device for trial in trials} == {"cpu"}
    assert trials[0].arm == "default"
    searched = trials[1:]
    assert all(trial.started_at >= trials[0].ended_at for trial in searched)
    assert any(
        one.started_at < other.started_at < one.ended_at for one in searched for other in searched
    )
    cut = [trial for trial in searched if trial.reason == "stopped by the user"]
    assert 1 <= len(cut) <= 2 and all(trial.status is TrialStatus.INTERRUPTED for trial in cut)

    resumed = tune_two(tmp_path, resume="last")
    printed = read_until(resumed, " cpu ", num=2)
    resumed.send_signal(signal.SIGINT)
    output, _ = resumed.communicate(timeout=60)
    assert resumed.returncode == 130, printed + output
    assert "resuming study 1" in printed and not engines_of(tmp_path)
    more = trials_of(tmp_path)
    assert more[: len(trials)] == trials and len(more) > len(trials)
    assert sum(trial.arm == "default" for trial in more) == 1


@pytest.mark.slow
def test_the_end_of_time_cuts_off_every_device(tmp_path: Path) -> None:
    process = tune_two(tmp_path, max_s=25)
    output, _ = process.communicate(timeout=120)
    assert process.returncode in (0, 75), output  # a slow machine may need all of it to begin
    assert not engines_of(tmp_path)
    store = open_store(tmp_path / "state" / "sparsed.db")
    assert store.list_profiles() == (), "a test that was cut off verifies nothing"
    store.close()


@pytest.mark.slow
def test_no_engine_of_several_outlives_a_study_that_was_killed(tmp_path: Path) -> None:
    process = tune_two(tmp_path)
    deadline = time.monotonic() + 120
    while len(engines_of(tmp_path)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
    process.kill()
    process.communicate(timeout=60)
    _, left = psutil.wait_procs(engines_of(tmp_path), timeout=20)
    assert not left
