"""The arithmetic of ``benchmarks/memory_error.py``, and one point of it without device memory."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime
from pathlib import Path

import memory_error
import pytest
from driver_memory import Driver, phases
from memory_error import Point, Row, Seen

from sparsed.core import GIB
from sparsed.engine.models.dummy import dummy_config
from sparsed.engine.planner import PAGE_TOKENS
from sparsed.engine.workspace import Workspace, workspace
from sparsed.tuner.roofline import HbmPeak

RESULTS = Path(memory_error.__file__).parent / "results"
PLANNED = HbmPeak(
    weights_bytes=16 * GIB,
    hot_pages_bytes=17 * GIB,
    summaries_bytes=GIB // 2,
    tables_bytes=GIB // 4,
    staging_bytes=GIB // 8,
    prefill_buffer_bytes=GIB // 8,
    workspace_bytes=2 * GIB,
)


WORKSPACE = Workspace(
    driver_bytes=GIB,
    graphs_bytes=GIB // 4,
    steps_bytes=GIB // 4,
    sampling_bytes=GIB // 4,
    prompt_bytes=GIB // 4,
)


def row(told_bytes: int, *, failures: tuple[str, ...] = ()) -> Row:
    return Row(
        point=Point(knobs={}, prompt=1, requests=1, output=1),
        predicted=PLANNED,
        workspace=WORKSPACE,
        seen=Seen(told_bytes=told_bytes, weights_bytes=16 * GIB, failures=failures),
        context_bytes=GIB // 2,
    )


def test_a_point_is_knobs_and_a_load() -> None:
    point = Point.parse("kv_hbm_gib=6,page_size=16,prompt=32000,requests=4")
    assert point == Point(
        knobs={"kv_hbm_gib": "6", "page_size": "16"}, prompt=32000, requests=4, output=32
    )
    with pytest.raises(ValueError, match="kv_hmb_gib"):
        Point.parse("kv_hmb_gib=6")


@pytest.mark.parametrize(
    ("told_gib", "is_fault"),
    [(36.0, False), (36.3, False), (36.5, True), (35.0, False), (34, True)],
)
def test_errors_beyond_the_target_are_faults(told_gib: float, is_fault: bool) -> None:
    """3 % too much may be planned, 1 % too little."""
    measured = row(int(told_gib * GIB))
    assert measured.error == pytest.approx(36 / told_gib - 1)
    assert bool(memory_error.faults([measured])) is is_fault


def test_what_is_neither_weights_nor_kv_memory_is_the_rest() -> None:
    owners = row(37 * GIB).owners()
    assert owners.pop("the rest, as planned") == 2 * GIB
    assert sum(owners.pop(name) or 0 for name in [*owners] if name.startswith("planned")) == 2 * GIB
    assert owners.pop("CUDA context") == GIB // 2
    assert owners["the rest, context included"] == 3 * GIB
    assert sum(size or 0 for size in owners.values()) == 37 * GIB
    assert row(0).error is None and row(0).owners()["the rest, context included"] is None


def test_failures_are_faults() -> None:
    assert memory_error.faults([row(36 * GIB, failures=("503: full",))])


def test_memory_is_told_at_the_end_of_each_phase(tmp_path: Path) -> None:
    log = tmp_path / "daemon.log"
    log.write_text(
        "2026-01-02 03:04:05,000 INFO model: dummy:tiny, float32 on cpu\n"
        "2026-01-02 03:04:05,000 INFO loading weights, 33 %\n"
        "2026-01-02 03:04:06,000 INFO loading weights, 66 %\n"
        "2026-01-02 03:04:07,500 INFO measuring the link\n"
    )
    start = datetime(2026, 1, 2, 3, 4, 5).timestamp()
    samples = [(start + at, number) for number, at in enumerate((-1.0, 1.0, 2.4, 2.6, 4.0, 9.0))]
    assert phases(log, samples, ready_at=start + 5) == {
        "loading weights": 2,
        "measuring the link": 4,
    }


def test_a_driver_that_is_not_there_tells_nothing() -> None:
    with Driver(None, index=None) as counts:
        time.sleep(0.1)
        assert counts.used_bytes() is None
    assert not counts.samples and not counts.own_peak_bytes


def test_the_plan_meets_its_target_where_it_was_measured() -> None:
    """The committed run, whose tiers are as they were, beside the workspace as it is planned now."""
    rows = json.loads((RESULTS / "h100-memory-error.json").read_text())["rows"]
    assert len(rows) == 6
    for measured in rows:
        knobs = measured["point"]["knobs"]
        needed = workspace(
            dummy_config("dummy:llama-3.1-8b").shape,
            dtype="bfloat16",
            chunk=int(knobs["prefill_chunk"]),
            num_seqs=int(knobs["max_num_seqs"]),
            page_size=int(knobs.get("page_size", PAGE_TOKENS)),
            max_tokens=131_072,
            selects=True,
        )
        predicted = HbmPeak(
            **measured["predicted"] | {"workspace_bytes": needed.total_bytes}
        ).total_bytes
        error = predicted / measured["seen"]["told_bytes"] - 1
        assert -memory_error.MAX_UNDER <= error <= memory_error.MAX_ERROR, knobs


@pytest.mark.slow
def test_a_point_is_measured_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code without device memory: all requests are answered, nothing is measured."""
    output = tmp_path / "found.json"
    point = "kv_hbm_gib=0.05,prefill_chunk=256,max_num_seqs=2,prompt=300,requests=2,output=8"
    arguments = ["memory_error.py", "--device", "cpu", "--points", point, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        memory_error.main()
    assert ended.value.code == 0
    found = json.loads(output.read_text())
    (measured,) = found["rows"]
    assert measured["seen"]["failures"] == [] and found["faults"] == []
    assert measured["error_frac"] is None
    assert measured["owners"]["weights"] == measured["seen"]["weights_bytes"] > 0
