"""The command line against a scripted daemon on real sockets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main

from sparsed.controller import seeds
from sparsed.controller.cli import start as start_verb
from sparsed.controller.cli.detach import _wait_until_ready
from sparsed.controller.cli.flags import KNOB_FLAGS, SERVING_FLAGS
from sparsed.controller.cli.main import app, run
from sparsed.controller.config import DaemonConfig
from sparsed.controller.control import DaemonState, LoadState
from sparsed.controller.options import OPTIONS
from sparsed.controller.state_dir import StateLock
from sparsed.core import (
    KNOB_GUIDES,
    KNOB_SPECS,
    EngineStats,
    ExitCode,
    GpuSlowdown,
    HbmUse,
    InputError,
    KnobProgress,
    KnobSpec,
    Objective,
    Profile,
    ProfileKey,
    ProfileStatus,
    RefusalCount,
    RefusalReason,
    Regime,
    Slo,
    StartError,
    TunerMode,
    WaitCount,
    WaitingRequest,
    WaitReason,
)
from sparsed.db import open_store
from sparsed.profiler.machine import read_machine
from sparsed.tuner.export import render_profile

SEED = Profile(
    key=ProfileKey(hardware="", model="m", dtype="float32"),
    values={"token_budget": 512},
    status=ProfileStatus.VERIFIED,
    workload="mixed",
    objective=Objective.THROUGHPUT,
)
GOLDEN = Path(__file__).parent / "golden" / "cli.txt"
Sparsed = Callable[..., int]


@pytest.fixture
def sparsed(daemon: Any) -> Sparsed:
    """Run a verb that asks the scripted daemon; returns the exit status."""

    def run_verb(*arguments: str) -> int:
        return run([*arguments, "--state-dir", str(daemon.place.root)])

    return run_verb


def surface() -> set[str]:
    """Every verb with each of its arguments and flags."""
    lines = set()

    def walk(command: Any, path: str) -> None:
        for name, child in getattr(command, "commands", {}).items():
            walk(child, f"{path} {name}")
        for parameter in command.params:
            spellings = [*parameter.opts, *parameter.secondary_opts]
            lines.update(f"{path} {spelling}" for spelling in spellings)

    walk(typer.main.get_command(app), "sparsed")
    return lines


def test_verbs_and_flags_are_the_golden_ones() -> None:
    golden = set(GOLDEN.read_text().splitlines())
    assert not golden - surface(), "a script that uses these would break"
    assert not surface() - golden, f"new: add these lines to {GOLDEN.name}"


def test_start_takes_every_option_and_knob() -> None:
    names = [*OPTIONS, *(spec.name for spec in KNOB_SPECS)]
    flags = {f"sparsed start --{name.replace('_', '-')}" for name in names}
    assert flags <= surface()


def test_status_in_words(sparsed: Sparsed, capsys: pytest.CaptureFixture[str]) -> None:
    assert sparsed("status") == 0
    text = capsys.readouterr().out
    for part in ("serving", "dummy:tiny", "97.0 %", "30.0 / 40.0 / - ms", "0.50 GiB"):
        assert part in text


def test_status_tells_of_clocks_that_are_cut(
    sparsed: Sparsed, daemon: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    now = daemon.control.now
    assert sparsed("status") == 0
    assert "GPU clocks" not in capsys.readouterr().out
    host = replace(now.snapshot.host, gpu_slowdown=GpuSlowdown.POWER_BRAKE)
    daemon.control.now = replace(now, snapshot=replace(now.snapshot, host=host))
    assert sparsed("status") == 0
    assert "GPU clocks cut: power-brake" in " ".join(capsys.readouterr().out.split())


def test_status_says_why_requests_wait(
    sparsed: Sparsed, daemon: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    now = daemon.control.now
    waiting = [
        WaitingRequest(request_id=name, reason=reason, waited_s=waited_s)
        for name, reason, waited_s in (
            ("a", WaitReason.LINK, 2.5),
            ("b", WaitReason.TURN, 0.5),
            ("c", WaitReason.TURN, 0.25),
        )
    ]
    stats = replace(
        now.stats,
        waiting=tuple(waiting),
        waits=(WaitCount(reason=WaitReason.LINK, count=7),),
        refusals=(RefusalCount(reason=RefusalReason.TOO_LONG, count=3),),
        spills=4,
        restores=3,
        quality_raises=2,
        quality_dense=1,
    )
    daemon.control.now = replace(now, stats=stats)
    assert sparsed("status") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "waiting for 1 link, 2 turn; at most 2.5 s so far",
        "waits 7 link",
        "refusals 3 too-long",
        "spilled 4, 3 of them came back",
        "low recall 2 budgets raised, 1 requests made dense",
    ):
        assert words in shown


@pytest.mark.parametrize(
    ("slo", "pins", "targets", "live"),
    [
        (Slo(), (), "none", "start with --min-recall"),
        (
            Slo(tpot_s=0.05, min_recall=0.9),
            (),
            "TPOT 50 ms, attention recall 0.9",
            "may change it in mode auto",
        ),
        (Slo(min_recall=0.9), ("token_budget",), "attention recall 0.9", "it is pinned"),
    ],
)
def test_targets_are_told(
    sparsed: Sparsed,
    daemon: Any,
    capsys: pytest.CaptureFixture[str],
    slo: Slo,
    pins: tuple[str, ...],
    targets: str,
    live: str,
) -> None:
    daemon.control.now = replace(daemon.control.now, slo=slo)
    daemon.control.pins.update(pins)
    assert sparsed("status") == 0
    assert targets in capsys.readouterr().out
    assert sparsed("knobs", "explain", "token_budget") == 0
    assert live in " ".join(capsys.readouterr().out.split())


def test_status_tells_of_a_change_under_way(
    sparsed: Sparsed, daemon: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = KnobProgress(names=("token_budget", "copy_programs"), frac=0.374)
    daemon.control.now = replace(daemon.control.now, stats=EngineStats(applying=progress))
    assert sparsed("status") == 0
    assert "token_budget, copy_programs 37 %" in capsys.readouterr().out


def test_status_tells_who_has_the_memory_and_how_full_the_link_is(
    sparsed: Sparsed, daemon: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    now, gib = daemon.control.now, 1 << 30
    use = HbmUse(
        weights_bytes=16 * gib,
        hot_pages_bytes=40 * gib,
        summaries_bytes=3 * gib,
        tables_bytes=gib,
        staging_bytes=gib // 2,
        prefill_buffer_bytes=gib // 4,
        rest_bytes=2 * gib,
        others_bytes=None,
        free_bytes=7 * gib,
    )
    snapshot = replace(now.snapshot, hbm=use, h2d_bytes=5_000_000_000, window_s=2.0)
    daemon.control.now = replace(now, snapshot=snapshot)
    assert sparsed("status") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "HBM, weights 16.00 GiB",
        "HBM, summaries 3.00 GiB",
        "HBM, rest of the engine 2.00 GiB",
        "HBM, free 7.00 GiB",
        "link in use H2D / D2H 25.0 % / 0.0 %",
    ):
        assert words in shown
    assert "other processes" not in shown


def test_why_in_words(sparsed: Sparsed, capsys: pytest.CaptureFixture[str]) -> None:
    assert sparsed("why") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "capacity-bound: 3 requests wait: whole requests do not fit the DRAM tier",
        "(3 windows, 0.5 s old)",
        "mean step 12.5 ms",
        "link in use 25 %",
        "loaded over the link 12.5 GB/s",
        "left out: utilisation of the GPU",
        "kv_dram_gib raise more whole requests have frames",
        "token_budget lower working sets shrink",
        "beyond knobs more memory",
        "tried 2023-11-14 22:13 UTC: hbm_budget=auto, token_budget=1024: rejected: no gain",
        "live 2023-11-14 22:13 UTC: prefill_chunk=4096: reverted, slo_breach",
        "advised: hold: no better point is known",
    ):
        assert words in shown


def test_regimes_and_drift_in_words(
    sparsed: Sparsed, daemon: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Regime(regime_id=1, centroid={}, signature="2 requests/s", seen_s=9.0, seen_at=1.0)
    documents = replace(
        chat,
        regime_id=2,
        signature="long ones",
        incumbent={"token_budget": 512, "hbm_budget": None},
    )
    load = LoadState(regimes=(chat, documents), current=2, drift="the link is slow")
    daemon.control.load = load
    daemon.control.explanation = replace(daemon.control.explanation, load=load)
    for verb in (("why",), ("tuner", "status")):
        assert sparsed(*verb) == 0
        shown = capsys.readouterr().out.splitlines()
        for line in (
            "regime 1: 2 requests/s: nothing verified, the last known good",
            "in regime 2: long ones: verified hbm_budget=auto, token_budget=512",
            "drift: the link is slow",
        ):
            assert line in shown
    daemon.control.load = replace(load, is_settled=False, drift="")
    assert sparsed("tuner", "status") == 0
    text = capsys.readouterr().out
    assert "leaving regime 2: long ones" in text and "drift" not in text
    daemon.control.load = LoadState()
    assert sparsed("tuner", "status") == 0
    assert "regime: none yet" in capsys.readouterr().out


def test_why_as_json_and_without_a_history(
    sparsed: Sparsed, daemon: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.control.explanation = replace(
        daemon.control.explanation, tried=(), advised=(), rollouts=()
    )
    assert sparsed("why", "-o", "json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"]["bound"] == "capacity-bound"
    assert answer["remedies"][0] == {
        "knob": "kv_dram_gib",
        "up": True,
        "why": "more whole requests have frames",
    }
    assert sparsed("why") == 0
    assert "nothing was put to the test here yet" in capsys.readouterr().out


@pytest.mark.parametrize("spec", KNOB_SPECS, ids=lambda spec: spec.name)
def test_every_knob_is_explained(
    sparsed: Sparsed, spec: KnobSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sparsed("knobs", "explain", spec.name) == 0
    shown = " ".join(capsys.readouterr().out.split())
    guide = KNOB_GUIDES[spec.name]
    for words in (spec.help, guide.rises, guide.falls, guide.bounded_by, "comes from its default"):
        assert words in shown
    assert all(move.why in shown for move in guide.moves)


def test_an_explained_knob_tells_its_value_and_what_waits(
    sparsed: Sparsed, daemon: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sparsed("knobs", "set", "token_budget=512") == 0
    assert sparsed("knobs", "set", "page_size=64") == 5
    capsys.readouterr()
    assert sparsed("knobs", "explain", "token_budget") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "now 512 tokens" in shown and "comes from sparsed knobs set" in shown
    assert "default 2048" in shown and "after a restart" not in shown
    assert sparsed("knobs", "explain", "page_size", "-o", "json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["knob"]["value"], answer["knob"]["pending"]) == (32, 64)
    assert answer["guide"]["moves"][0]["bound"] == "link-bound"
    assert "at a restart" in answer["live_tuner"]
    assert sparsed("knobs", "explain", "retrieval_stride", "-o", "json") == 0
    assert "how much recall may be lost" in json.loads(capsys.readouterr().out)["live_tuner"]


def test_an_unknown_knob_is_not_explained(
    sparsed: Sparsed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sparsed("knobs", "explain", "nonsense") == 2
    assert "nonsense" in capsys.readouterr().err


def test_status_as_json(sparsed: Sparsed, daemon: Any, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.control.now = replace(
        daemon.control.now, state=DaemonState.DEGRADED, reasons=("disk full",)
    )
    assert sparsed("status", "-o", "json") == 4
    answer = json.loads(capsys.readouterr().out)
    assert (answer["state"], answer["reasons"]) == ("degraded", ["disk full"])
    assert answer["knobs"]["hbm_budget"] is None
    assert answer["snapshot"]["h2d_bytes"] == 1 << 40


@pytest.mark.parametrize("output", ["text", "json"])
def test_reads_print_both_forms(
    sparsed: Sparsed, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in (
        ("knobs", "list"),
        ("knobs", "explain", "token-budget"),
        ("why",),
        ("tuner", "status"),
        ("profile", "list"),
        ("profile", "show", "1"),
    ):
        assert sparsed(*verb, "-o", output) == 0
        text = capsys.readouterr().out
        assert ("token_budget" in text) or ("dummy:tiny" in text)
        if output == "json":
            json.loads(text)


def test_knobs_set(sparsed: Sparsed, daemon: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert sparsed("knobs", "set", "token_budget=1024", "--dry-run") == 0
    assert daemon.control.changes == []
    assert sparsed("knobs", "set", "token-budget=1024", "--reason", "test", "-o", "json") == 0
    assert daemon.control.changes == [({"token_budget": 1024}, "test")]
    assert sparsed("knobs", "set", "page_size=64") == 5
    assert sparsed("knobs", "reset", "token_budget") == 0
    assert daemon.control.now.knobs.token_budget == 2048
    assert "64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("assignment", "code", "message"),
    [
        ("token_budget=7", 1, "allowed: 256 to 8192 tokens"),
        ("nonsense=1", 1, "unknown knob 'nonsense'"),
        ("token_budget", 2, "is not NAME=VALUE"),
    ],
)
def test_bad_assignments(
    sparsed: Sparsed,
    assignment: str,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sparsed("knobs", "set", assignment) == code
    assert message in capsys.readouterr().err


def test_the_tuner_is_switched(sparsed: Sparsed, daemon: Any) -> None:
    for verb in ("advise", "observe", "auto", "off"):
        assert sparsed("tuner", verb) == 0
        assert daemon.control.now.tuner_mode is TunerMode(verb)


def test_drain_and_stop(sparsed: Sparsed, daemon: Any, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.control.may_drain.clear()
    assert sparsed("drain", "--timeout", "0.05") == 0
    assert "2 requests were cut off" in capsys.readouterr().out
    assert sparsed("stop") == 0
    assert daemon.control.stops == 1
    with StateLock(daemon.place, verb="start"):  # of a daemon that goes on
        assert sparsed("stop", "--wait", "0") == 0
        assert sparsed("stop", "--wait", "0.1") == 1
    assert "still stopping" in capsys.readouterr().err


def test_profiles_through_the_daemon(
    sparsed: Sparsed, daemon: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "profile.json"
    assert sparsed("profile", "export", "1", "-o", str(file)) == 0
    assert sparsed("profile", "import", str(file)) == 0
    assert sparsed("profile", "pin", "2") == 0
    assert [profile.pinned for profile in daemon.control.profiles.list_profiles()].count(True) == 1
    assert sparsed("profile", "export", "1") == 0
    assert "token_budget = 1024" in capsys.readouterr().out
    assert sparsed("profile", "show", "77") == 1
    assert "there is no profile 77" in capsys.readouterr().err


def test_profiles_without_a_daemon(
    daemon: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    store = open_store(_made(Path(elsewhere)) / "sparsed.db")
    store.save_profile(daemon.control.profiles.list_profiles()[0])
    store.close()
    assert run(["profile", "list", "-o", "json", "--state-dir", elsewhere]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)[0]["values"]["sparse_method"] == "quest"
    assert f"no daemon runs; using the database {elsewhere}" in captured.err
    assert run(["profile", "pin", "1", "--state-dir", elsewhere]) == 0


def test_no_profiles_are_said_to_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(_made(tmp_path / "empty") / "sparsed.db").close()
    monkeypatch.setattr(seeds.load_seeds, "__defaults__", (_made(tmp_path / "seeds"),))
    assert run(["profile", "list", "--state-dir", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == "no profiles\n"


@pytest.mark.parametrize("name", ["copy_programs", "enforce_eager", "always_select"])
def test_flags_that_do_nothing_on_a_cpu_say_so(name: str) -> None:
    (flag,) = (flag for flag in (*KNOB_FLAGS, *SERVING_FLAGS) if flag.name == name)
    assert flag.help.startswith("On a GPU: ")


@pytest.mark.parametrize("verb", [["status"], ["drain"], ["stop"], ["knobs", "list"]])
def test_no_daemon_is_status_3(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*verb, "--state-dir", str(tmp_path)]) == 3
    assert "start one with: sparsed start" in capsys.readouterr().err


def test_usage_errors_differ_by_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--no-such-flag"]) == 2
    assert run(["start", "--no-such-flag"]) == ExitCode.USAGE
    assert run(["start", "--token-budget", "-5"]) == ExitCode.USAGE
    assert "--token-budget" in capsys.readouterr().err
    assert run(["start", "one", "--model", "two"]) == ExitCode.USAGE
    assert run(["start", "--tp", "2"]) == ExitCode.USAGE


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StartError("port 8000 is in use", code=ExitCode.UNAVAILABLE), ExitCode.UNAVAILABLE),
        (InputError("no such model", field="model"), ExitCode.USAGE),
    ],
)
def test_a_failed_start_is_one_line(
    error: Exception,
    code: ExitCode,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(configuration: DaemonConfig) -> None:
        raise error

    monkeypatch.setattr(start_verb, "_serve", fail)
    assert run(["start"]) == code
    assert capsys.readouterr().err == f"sparsed: {error}\n"


def test_flags_and_their_aliases_reach_the_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served: list[DaemonConfig] = []
    monkeypatch.setattr(start_verb, "_serve", served.append)
    file = tmp_path / "sparsed.toml"
    file.write_text("config_version = 1\nport = 9000\ntoken_budget = 512\n")
    flags = "--block-size 64 --context-length 4096 --max-running-requests 4 --hbm-budget auto"
    flags += f" --max-num-batched-tokens 512 --tp 1 --no-profile --config {file}"
    assert run(["start", "dummy:tiny", *flags.split(), "--state-dir", str(tmp_path)]) == 0
    (configuration,) = served
    assert configuration.model == "dummy:tiny"
    assert (configuration.port, configuration.no_profile) == (9000, True)
    assert dict(configuration.knobs) == {
        "page_size": 64,
        "max_model_len": 4096,
        "max_num_seqs": 4,
        "hbm_budget": None,
        "prefill_chunk": 512,
        "token_budget": 512,
    }


def test_a_bug_shows_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start_verb, "_serve", lambda configuration: {}["engine"])
    assert run(["start"]) == ExitCode.SOFTWARE
    assert "KeyError" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "expected"), [(75, 75), (0, ExitCode.SOFTWARE)])
def test_a_detached_daemon_that_ends_gives_its_status(
    code: int, expected: int, place: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    script = f"print('port in use', flush=True); raise SystemExit({code})"
    with (
        place.log_file.open("wb") as log,
        place.log_file.open("rb") as reader,
        subprocess.Popen([sys.executable, "-c", script], stdout=log) as process,
    ):
        assert _wait_until_ready(process, place, reader) == expected
    assert "port in use" in capsys.readouterr().out


def test_a_detached_daemon_is_awaited(daemon: Any, capsys: pytest.CaptureFixture[str]) -> None:
    place = daemon.place
    with subprocess.Popen(["sleep", "60"]) as process:
        daemon.control.now = replace(daemon.control.now, pid=process.pid)
        place.log_file.write_text("sparsed ready: dummy:tiny\n")
        with place.log_file.open("rb") as reader:
            assert _wait_until_ready(process, place, reader) == 0
        process.terminate()
    assert capsys.readouterr().out == (
        f"sparsed ready: dummy:tiny\npid {process.pid}, log {place.log_file}\n"
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["start", "--help"], ["bench", "serve", "--help"], ["--version"]]
)
def test_light_verbs_load_nothing_heavy(arguments: list[str]) -> None:
    heavy = ("torch", "numpy", "sqlalchemy", "grpc", "google.protobuf", "fastapi", "zmq", "skopt")
    script = (
        "import sys; from sparsed.controller.cli.main import run; "
        f"assert run({arguments!r}) == 0; "
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr == "[]\n"


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_the_tuner_is_steered(
    sparsed: Sparsed, daemon: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (("freeze",), ("unfreeze",), ("approve",), ("reject",), ("revive",)):
        assert sparsed("tuner", *words) == 0
    assert sparsed("tuner", "pin", "token_budget", "--reason", "mine") == 0
    capsys.readouterr()
    assert sparsed("tuner", "kill") == 0
    text = capsys.readouterr().out
    for part in (
        "stopped: killed",
        "left alone: token_budget",
        "candidate: too little traffic; 2.5% of the busy time",
        "reverted: hbm_budget=4096 token_budget=1536: slo_breach, by auto",
        "advice: token_budget=1024",
    ):
        assert part in text
    assert sparsed("tuner", "unpin", "token_budget") == 0
    told = "token_budget: the live tuner leaves it alone: nothing says how much recall may be lost"
    assert told in capsys.readouterr().out
    verbs = [verb.value for verb in daemon.control.verbs]
    assert verbs == ["freeze", "unfreeze", "approve", "reject", "revive", "pin", "kill", "unpin"]


def test_what_ships_is_listed_shown_and_exported_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(_made(tmp_path / "empty") / "sparsed.db").close()
    folder = _made(tmp_path / "seeds")
    hardware = read_machine().fingerprint
    (folder / "m-here.json").write_text(
        render_profile(replace(SEED, key=replace(SEED.key, hardware=hardware)), format="json")
    )
    monkeypatch.setattr(seeds.load_seeds, "__defaults__", (folder,))
    place = ["--state-dir", str(tmp_path / "empty")]
    assert run(["profile", "list", *place]) == 0
    listed = capsys.readouterr().out
    assert "m-here" in listed and "shipped" in listed and "compatible" in listed
    assert run(["profile", "show", "m-here", *place]) == 0
    assert "it ships with sparsed" in capsys.readouterr().out
    assert run(["profile", "export", "m-here", "-o", str(tmp_path / "p.json"), *place]) == 0
    assert run(["profile", "import", str(tmp_path / "p.json"), *place]) == 0
    assert run(["profile", "show", "no-such", *place]) != 0
    assert "neither a number nor a profile that ships" in capsys.readouterr().err
    (folder / "bad.json").write_text("{}")
    assert run(["profile", "list", *place]) != 0
    assert "bad.json of the package holds no profile" in capsys.readouterr().err
