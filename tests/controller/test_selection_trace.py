"""A recording in place of selections: refused before a start, told wherever there are figures."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsed.controller.bench.measure import plan_decode
from sparsed.controller.cli.main import run
from sparsed.controller.config import DaemonConfig
from sparsed.controller.logs import log_plan
from sparsed.controller.startup import StartPlan, check_next_start, describe_plan
from sparsed.core import CopyPath, CopyTotal, Direction, ExitCode, InputError, KnobValue
from sparsed.engine.evaluate.recording import Recording, RecordingHeader, write_recording

PlanStart = Callable[..., StartPlan]
Configure = Callable[..., DaemonConfig]
FITTING: dict[str, KnobValue] = {"page_size": 32, "token_budget": 256}


def write(path: Path, *, context_tokens: int = 1000) -> Path:
    num_full = context_tokens // 16
    ranked = np.tile(np.arange(min(40, num_full), dtype=np.int32), (3, 2, 1))
    ranked = np.pad(ranked, ((0, 0), (0, 0), (0, 40 - ranked.shape[2])), constant_values=-1)
    header = RecordingHeader(
        model="tiny",
        text="words",
        method="quest",
        commit="0123abc",
        context_tokens=context_tokens,
        page_size=16,
        token_budget=256,
        sink_pages=1,
        recent_pages=1,
        num_kv_heads=2,
        dense_layers=0,
    )
    write_recording(path, Recording(header=header, ranked_SLR=ranked))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "recording.npz")


def test_a_start_that_replays_says_so(
    plan_start: PlanStart,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(file.parent)
    plan = plan_start(selection_trace=file.name, no_profile=True, **FITTING)
    assert plan.spec.selection_trace == str(file), "the engine may run elsewhere"
    assert f"selections replayed from {file}" in describe_plan(plan)
    with caplog.at_level(logging.INFO):
        log_plan(plan)
    assert f"replayed from {file}" in caplog.text


def test_a_start_that_does_not_says_nothing(
    plan_start: PlanStart, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_start(no_profile=True)
    assert plan.spec.selection_trace is None
    with caplog.at_level(logging.INFO):
        log_plan(plan)
    assert "replayed" not in describe_plan(plan) + caplog.text


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"page_size": 8}, "page_size=8 is no multiple of 16"),
        ({"page_size": 32, "token_budget": 2048}, "a recording of more ranks"),
        ({"sparse_method": "dense"}, "give another sparse_method, or drop the recording"),
    ],
)
def test_what_does_not_fit_is_refused(
    plan_start: PlanStart, file: Path, values: dict[str, KnobValue], says: str
) -> None:
    with pytest.raises(InputError) as caught:
        plan_start(selection_trace=str(file), no_profile=True, **FITTING | values)
    assert caught.value.field == "selection_trace"
    assert says in str(caught.value)


def test_a_file_that_is_no_recording_is_refused(plan_start: PlanStart, tmp_path: Path) -> None:
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"no zip")
    short = write(tmp_path / "short.npz", context_tokens=200)
    for path, code, says in (
        (tmp_path / "none.npz", ExitCode.USAGE, "benchmarks/record_selection.py"),
        (tmp_path, ExitCode.USAGE, "is no file"),
        (broken, ExitCode.DATA, "copy it anew"),
        (short, ExitCode.USAGE, "another recording"),
    ):
        with pytest.raises(InputError) as caught:
            plan_start(selection_trace=str(path), no_profile=True, **FITTING)
        assert (caught.value.field, caught.value.code) == ("selection_trace", code)
        assert says in str(caught.value) and str(path) in str(caught.value)


def test_a_next_start_that_could_not_replay_is_refused(plan_start: PlanStart, file: Path) -> None:
    plan = plan_start(selection_trace=str(file), no_profile=True, **FITTING)
    asked = {"max_num_seqs": 4, "kv_hbm_gib": 0.5, "kv_dram_gib": 0.5}
    check_next_start(plan, {**asked, **FITTING, "page_size": 16})
    with pytest.raises(InputError) as caught:
        check_next_start(plan, {**asked, **FITTING, "page_size": 8})
    assert caught.value.field == "selection_trace"


def test_a_dry_run_and_a_study(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", "dummy:tiny", "--device", "cpu", "--state-dir", str(tmp_path / "state")]
    trace = ["--selection-trace", str(file)]
    sizes = ["--page-size", "32", "--kv-hbm-gib", "0.1", "--kv-dram-gib", "0.1"]
    assert run(["start", *common, "--dry-run", *trace, *sizes, "--token-budget", "256"]) == 0
    assert "replayed from" in capsys.readouterr().out
    assert run(["start", *common, "--dry-run", *trace, *sizes]) == ExitCode.USAGE
    assert "selection_trace" in capsys.readouterr().err


def test_a_study_replays_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSED_SELECTION_TRACE", str(file))
    place = ["--state-dir", str(tmp_path / "state")]
    assert run(["tune", "--model", "dummy:tiny", "--device", "cpu", *place]) == ExitCode.USAGE
    assert "drop selection_trace" in capsys.readouterr().err


def test_a_measurement_of_steps_takes_it_along(configure: Configure, file: Path) -> None:
    config = configure(selection_trace=str(file), sparse_method="quest", **FITTING)
    wanted = plan_decode(config, batches=(1,), contexts=(400,), on_progress=lambda *_: None)
    assert wanted.spec.selection_trace == str(file)


def test_the_status_tells_it(daemon: Any, capsys: pytest.CaptureFixture[str]) -> None:
    place, now = ["--state-dir", str(daemon.place.root)], daemon.control.now
    assert run(["status", *place]) == 0
    assert "replayed" not in capsys.readouterr().out
    facts = replace(now.facts, selection_trace="/recordings/r.npz")
    daemon.control.now = replace(now, facts=facts)
    assert run(["status", *place]) == 0
    assert "replayed from /recordings/r.npz" in capsys.readouterr().out


def test_the_status_tells_what_the_tiers_do(
    daemon: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = (
        CopyTotal(direction=Direction.H2D, path=CopyPath.KERNEL, num_bytes=3 << 30, seconds=0.0),
        CopyTotal(direction=Direction.D2H, path=CopyPath.BATCHED, num_bytes=1 << 30, seconds=0.5),
    )
    now = daemon.control.now
    stats = replace(
        now.stats,
        working_set_pages=4096,
        working_set_bytes=2 << 30,
        metadata_bytes=1 << 29,
        overflow_pages=17,
        foreseen_pages=40,
        wasted_pages=9,
        exposed_s=0.012,
        timed_steps=8,
        copies=copies,
    )
    daemon.control.now = replace(now, stats=stats)
    assert run(["status", "--state-dir", str(daemon.place.root)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        *("working set 4096 pages, 2.00 GiB", "summaries 0.50 GiB", "overflow pages 17"),
        *(
            "foreseen pages 40, 9 of them for nothing",
            "waits for pages 1.50 ms a step that fetches",
        ),
        *("h2d by kernel 3.00 GiB", "d2h by batched 1.00 GiB in 0.5 s", "misses a step 16.0 pages"),
    ):
        assert words in out
    assert "3.00 GiB in" not in out, "nothing was timed"
