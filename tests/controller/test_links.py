"""Calibrations: their key, the process that makes them, where they are kept, who uses them."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from sparsed import __version__
from sparsed.controller.bench import link as bench
from sparsed.controller.bench.link import (
    Calibrated,
    best_of_each_way,
    calibrate_link,
    run_calibration,
)
from sparsed.controller.cli.bench_link import parse_sizes
from sparsed.controller.cli.main import run
from sparsed.controller.config import DaemonConfig
from sparsed.controller.links import keep_calibration, link_key
from sparsed.controller.startup import prepare
from sparsed.controller.state_dir import StateDir, StateLock, resolve_state_dir
from sparsed.controller.supervisor import Supervisor
from sparsed.core import (
    GIB,
    CalibrateLink,
    CopyPath,
    Direction,
    EngineFacts,
    EngineFailed,
    EngineReady,
    ExitCode,
    InputError,
    LinkCalibration,
    LinkEntry,
    LinkKey,
    LinkProbe,
    MachineFacts,
    StartError,
)
from sparsed.db import open_store
from sparsed.db.memory import InMemoryProfileStore
from sparsed.db.store import StoreError

MACHINE = MachineFacts(
    cpu_name="any",
    num_cpus=2,
    dram_total_bytes=16 * GIB,
    dram_free_bytes=8 * GIB,
    gpu_name="Fake H100",
    num_gpus=1,
    hbm_total_bytes=80 * GIB,
    hbm_free_bytes=70 * GIB,
    driver_version="580.1",
    pcie_generation=5,
    pcie_width=16,
)


def entry(
    path: CopyPath, gb_per_s: float, *, programs: int = 0, piece_bytes: int = 16384,
    direction: Direction = Direction.H2D,
) -> LinkEntry:  # fmt: skip
    return LinkEntry(
        direction=direction,
        piece_bytes=piece_bytes,
        path=path,
        programs=programs,
        tile_bytes=32768 if programs else 0,
        bytes_per_s=gb_per_s * 1e9,
        slowdown=1.1,
    )


def calibration(*entries: LinkEntry, key: LinkKey | None = None) -> LinkCalibration:
    found = key or link_key(MACHINE)
    assert found is not None
    probe = LinkProbe(h2d_bytes_per_s=54e9, d2h_bytes_per_s=54e9)
    return LinkCalibration(key=found, contiguous=probe, entries=entries)


FOUND = calibration(entry(CopyPath.KERNEL, 50, programs=16), entry(CopyPath.BATCHED, 5))


@pytest.fixture
def place(tmp_path: Path) -> StateDir:
    return resolve_state_dir(tmp_path, environment={})


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsed.controller.startup.read_machine", lambda gpu_index: MACHINE)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``measured(*lines, status=0)``: what the measuring process writes, and how it ends."""

    def say(*values: object, status: int = 0) -> None:
        lines = [json.dumps({type(v).__name__: msgspec.to_builtins(v)}) for v in values]
        text = "".join(f"{line}\n" for line in lines)
        code = f"import sys; sys.stdin.read(); sys.stdout.write({text!r}); sys.exit({status})"
        monkeypatch.setattr(bench, "COMMAND", (sys.executable, "-c", code))

    return say


def calibrate(place: StateDir, *, device: str = "cuda") -> Calibrated:
    return calibrate_link(
        device, sizes_bytes=(), quick=True, state_dir=place, on_progress=lambda *_: None
    )


def test_the_key_names_all_that_decides() -> None:
    key = link_key(MACHINE)
    assert key is not None
    assert (key.gpu_name, key.driver, key.link) == ("Fake H100", "580.1", "gen5x16")
    assert key.torch[0].isdigit() and key.triton[0].isdigit()
    assert link_key(replace(MACHINE, pcie_width=None)) == replace(key, link="unknown")
    assert link_key(replace(MACHINE, gpu_name=None)) is None


def test_what_was_measured_is_kept_beside_what_was_known(
    place: StateDir, measured: Callable[..., None], on_a_gpu: None
) -> None:
    old = calibration(entry(CopyPath.KERNEL, 30, programs=16), entry(CopyPath.STAGED, 4))
    place.root.mkdir(exist_ok=True)
    store = open_store(place.database)
    store.save_calibration(old)
    store.close()
    measured(FOUND)
    found, is_kept, fault = calibrate(place)
    assert (replace(found, measured_at=0.0), is_kept, fault) == (FOUND, True, None)
    store = open_store(place.database)
    kept = store.find_calibration(FOUND.key)
    store.close()
    assert kept is not None and kept.measured_at == found.measured_at > 0
    assert set(kept.entries) == {*FOUND.entries, old.entries[1]}


def test_what_cannot_be_kept_is_shown_and_an_error(
    tmp_path: Path,
    measured: Callable[..., None],
    on_a_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Full(InMemoryProfileStore):
        def save_calibration(self, calibration: LinkCalibration) -> None:
            raise StoreError("disk full")

    monkeypatch.setattr(bench, "open_store", lambda path: Full())
    measured(FOUND)
    arguments = ["bench", "link", "--device", "cuda", "--state-dir", str(tmp_path)]
    assert run(arguments) == ExitCode.UNAVAILABLE
    captured = capsys.readouterr()
    assert "one DMA" in captured.out and "50.00" in captured.out
    assert "measured but not kept: disk full" in captured.err.splitlines()[-1]


def test_other_words_of_the_process_are_passed_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = json.dumps({"LinkCalibration": msgspec.to_builtins(FOUND)})
    noise = ["a library's greeting", "[1, 2]", "{}", '{"other": 1}', '{"LoadProgress": "no"}']
    code = f"import sys; sys.stdin.read(); print(*{[*noise, said]!r}, sep='\\n')"
    monkeypatch.setattr(bench, "COMMAND", (sys.executable, "-c", code))
    found = run_calibration(CalibrateLink(device="cpu"), on_progress=lambda *_: None)
    assert found.entries == FOUND.entries
    assert capsys.readouterr().err.splitlines() == noise


def test_a_failure_is_told_in_the_words_of_the_process(
    place: StateDir, measured: Callable[..., None], on_a_gpu: None
) -> None:
    measured(EngineFailed(message="no memory to pin", exit_code=69), status=69)
    with pytest.raises(StartError, match="no memory to pin") as caught:
        calibrate(place)
    assert caught.value.code is ExitCode.UNAVAILABLE
    measured(status=3)
    with pytest.raises(StartError, match="ended with status"):
        run_calibration(CalibrateLink(device="cpu"), on_progress=lambda *_: None)


def test_a_cpu_is_measured_and_forgotten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "link", "--device", "cpu", "--sizes", "64", "--state-dir", str(tmp_path)]
    assert run(arguments) == 0
    captured = capsys.readouterr()
    assert "memcpy" in captured.out and "one memory copy" in captured.out
    assert "DMA" not in captured.out and "nothing is kept for a CPU" in captured.err
    assert run([*arguments, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["entries"]) == 2 and found["measured_at"] > 0
    assert found["sparsed"] == __version__
    assert not (tmp_path / "sparsed.db").exists()


def test_it_does_not_run_beside_a_daemon(
    tmp_path: Path, place: StateDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with StateLock(place, verb="start"):
        code = run(["bench", "link", "--device", "cpu", "--state-dir", str(tmp_path)])
    assert code == ExitCode.TEMPORARY
    assert "`sparsed start`" in capsys.readouterr().err
    with StateLock(place, verb="bench link"), pytest.raises(StartError, match="wait for it"):
        StateLock(place, verb="start")


def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "link", "--device", "cuda:7", "--state-dir", str(tmp_path)]) == 64
    assert "this machine has" in capsys.readouterr().err


def test_sizes_are_powers_of_two() -> None:
    assert parse_sizes("") == ()
    assert parse_sizes("4, 16,4") == (4096, 16384)
    for wrong in ("3", "0", "-4", "4096", "x", "4.5"):
        with pytest.raises(InputError, match="powers of two from 1 to 1024"):
            parse_sizes(wrong)


def test_the_table_has_the_best_of_each_way_and_what_is_taken() -> None:
    kernels = [
        entry(CopyPath.KERNEL, rate, programs=n) for n, rate in ((8, 40), (16, 50), (32, 51))
    ]
    staged = entry(CopyPath.STAGED, 90)
    found = calibration(*kernels, staged)
    assert dict(best_of_each_way(found)) == {kernels[1]: True, staged: False}


# -- starts ----------------------------------------------------------------------------------


def test_a_start_on_a_gpu_looks_its_calibration_up(
    configure: Callable[..., DaemonConfig], on_a_gpu: None
) -> None:
    config = configure(device="cuda")

    def spec(config: DaemonConfig = config):  # type: ignore[no-untyped-def]  # an EngineSpec
        return prepare(config, progress=lambda *_: None).spec

    assert (spec().link, spec().calibration) == (FOUND.key, None)
    config.state_dir.root.mkdir()
    store = open_store(config.state_dir.database)
    store.save_calibration(FOUND)
    store.close()
    assert spec().calibration == FOUND
    asked: list[LinkKey] = []
    prepare(config, progress=lambda *_: None, find_calibration=asked.append)  # type: ignore[arg-type]
    assert asked == [FOUND.key]
    on_cpu = spec(configure(device="cpu"))
    assert (on_cpu.link, on_cpu.calibration) == (None, None)


def test_what_an_engine_measured_is_kept_and_a_bad_disk_survived(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = InMemoryProfileStore()
    keep_calibration(store, None)
    keep_calibration(store, FOUND)
    kept = store.find_calibration(FOUND.key)
    assert kept is not None and kept.entries == FOUND.entries and kept.measured_at > 0

    class Full(InMemoryProfileStore):
        def save_calibration(self, calibration: LinkCalibration) -> None:
            raise StoreError("disk full")

    with caplog.at_level(logging.WARNING):
        keep_calibration(Full(), FOUND)
    assert "disk full" in caplog.text


def test_the_next_engine_need_not_measure_again(
    plan_start: Callable[..., object], tmp_path: Path
) -> None:
    async def specs() -> list[LinkCalibration | None]:
        supervisor = Supervisor(
            plan_start().spec,  # type: ignore[attr-defined]  # a StartPlan
            run_dir=tmp_path,
            on_message=lambda _: None,
            on_lost=lambda _: None,
        )
        facts = EngineFacts(
            pid=1,
            device_name="x",
            weights_bytes=1,
            load_s=1.0,
            link=FOUND.contiguous,
            versions={},
            calibration=FOUND,
        )
        seen = [supervisor._spec.calibration]
        for told in (facts, replace(facts, calibration=None)):
            supervisor._receive(EngineReady(facts=told))
            seen.append(supervisor._spec.calibration)
        await supervisor.stop(0.0)
        return seen

    assert asyncio.run(specs()) == [None, FOUND, FOUND]
