"""``sparsed bench decode`` and ``kernels``: what is asked for, what is shown, what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from sparsed import __version__
from sparsed.controller.bench import measure as bench
from sparsed.controller.bench.measure import (
    KERNELS_MODEL,
    choose_points,
    plan_decode,
    plan_kernels,
)
from sparsed.controller.bench.process import run_measurement
from sparsed.controller.cli.bench_engine import parse_counts
from sparsed.controller.cli.main import run
from sparsed.controller.config import DaemonConfig, load_config, write_pending
from sparsed.controller.state_dir import StateLock, resolve_state_dir
from sparsed.core import (
    Ceiling,
    DecodePoint,
    DecodeReport,
    DecodeSpeed,
    EngineFailed,
    ExitCode,
    InputError,
    KernelReport,
    KernelSpeed,
    StartError,
)
from sparsed.engine.kvcache.geometry import num_frames
from sparsed.engine.measure.points import total_tokens

Say = Callable[..., None]
SMALL = {"model": "dummy:tiny", "device": "cpu"}
KERNELS = KernelReport(
    device_name="Fake H100",
    dtype="bfloat16",
    versions={},
    ceilings={Ceiling.COPY: 3e12, Ceiling.H2D: 54e9, Ceiling.D2H: 55e9, Ceiling.MATMUL: 7e14},
    kernels=(
        KernelSpeed(
            kernel="attend_dense",
            case="8192, cudnn",
            time_us=812.34,
            rate=5.6e14,
            ceiling=Ceiling.MATMUL,
            ratio=0.8,
        ),
        KernelSpeed(
            kernel="copy_pages h2d",
            case="16 KiB, 16 programs",
            time_us=None,
            rate=5e10,
            ceiling=Ceiling.H2D,
            ratio=0.926,
        ),
    ),
    skipped=("attend_resident 64 x 32768",),
)


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., DaemonConfig]:
    def make(**flags: object) -> DaemonConfig:
        return load_config(flags={"state_dir": tmp_path, **SMALL, **flags}, environment={})

    return make


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Say:
    """``measured(answer, status=0)``: what the measuring process says, and how it ends."""

    def say(*values: object, status: int = 0) -> None:
        lines = [json.dumps({type(v).__name__: msgspec.to_builtins(v)}) for v in values]
        text = "".join(f"{line}\n" for line in lines)
        code = f"import sys; sys.stdin.read(); sys.stdout.write({text!r}); sys.exit({status})"
        monkeypatch.setattr(bench, "COMMAND", (sys.executable, "-c", code))

    return say


def points_of(config: DaemonConfig, batches: tuple[int, ...], contexts: tuple[int, ...]) -> Any:
    return plan_decode(config, batches=batches, contexts=contexts, on_progress=lambda *_: None)


# -- plans -----------------------------------------------------------------------------------


def test_every_batch_of_every_context() -> None:
    points = choose_points((1, 8), (100, 900), usual_contexts=(5,), max_tokens=1000)
    assert [(p.tokens, p.requests) for p in points] == [(100, 1), (100, 8), (900, 1), (900, 8)]


def test_usual_contexts_are_those_that_the_model_knows() -> None:
    def contexts(max_tokens: int) -> list[int]:
        points = choose_points((1,), (), usual_contexts=(512, 2048), max_tokens=max_tokens)
        return [point.tokens for point in points]

    assert contexts(8192) == [512, 2048]
    assert contexts(1024) == [512]
    assert contexts(140) == [100]
    with pytest.raises(InputError, match="give at most 984"):
        choose_points((1,), (985,), usual_contexts=(), max_tokens=1024)


def test_an_engine_has_room_for_the_points_and_little_more(
    configure: Callable[..., DaemonConfig],
) -> None:
    wanted = points_of(configure(), (1, 4), (300, 1000))
    spec = wanted.spec
    assert (spec.model, spec.device, spec.dtype) == ("dummy:tiny", "cpu", "float32")
    assert (spec.knobs.sparse_method, spec.knobs.max_num_seqs) == ("dense", 4)
    largest = DecodePoint(requests=4, tokens=1000)
    total = total_tokens(largest, chunk_tokens=2048)
    assert spec.knobs.max_model_len == total
    assert spec.plan.num_frames == 4 * num_frames(total)
    given = points_of(configure(kv_dram_gib=0.03, sparse_method="quest"), (1,), (300,)).spec
    assert (given.knobs.kv_dram_gib, given.knobs.sparse_method) == (0.03, "quest")


def test_what_a_daemon_keeps_for_its_next_start_is_not_measured(
    configure: Callable[..., DaemonConfig],
) -> None:
    kept = {"sparse_method": "quest", "page_size": 64}
    write_pending(configure().state_dir.pending_file, kept)
    assert configure().knobs == kept
    assert points_of(configure(), (1,), (300,)).spec.knobs.sparse_method == "dense"


def test_kernels_have_the_sizes_of_a_model(configure: Callable[..., DaemonConfig]) -> None:
    def plan(config: DaemonConfig) -> Any:
        return plan_kernels(config, batches=(), contexts=(), on_progress=lambda *_: None)

    tiny = plan(configure(page_size=16))
    assert (tiny.shape.head_dim, tiny.page_size, tiny.batches) == (16, 16, (1, 4))
    assert plan(configure()).page_size == 8, "as an engine has them"
    config = configure(model=None)
    assert plan(config) == plan(replace(configure(), model=KERNELS_MODEL))
    assert plan(config).shape.num_kv_heads == 8


def test_counts_are_whole_numbers() -> None:
    assert parse_counts("", name="batches", maximum=9) == ()
    assert parse_counts("8, 1,8", name="batches", maximum=9) == (8, 1)
    for wrong in ("0", "10", "-1", "x", "1.5", "9" * 5000, "²"):
        with pytest.raises(InputError, match="from 1 to 9") as caught:
            parse_counts(wrong, name="batches", maximum=9)
        assert caught.value.field == "batches"


# -- the verbs -------------------------------------------------------------------------------


@pytest.mark.slow
def test_decode_through_the_real_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "decode.json"
    arguments = "bench decode --model dummy:tiny --device cpu --batches 1,3 --contexts 200"
    place = ["--state-dir", str(tmp_path), "--output", str(file)]
    assert run([*arguments.split(), *place, "-o", "json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(file.read_text())
    report = msgspec.convert(json.loads(captured.out), type=DecodeReport)
    assert [(s.requests, s.graph_ms) for s in report.steps] == [(1, None), (3, None)]
    assert report.versions["sparsed"] == __version__ and "torch" in report.versions
    assert captured.err == ""


@pytest.mark.slow
def test_kernels_through_the_real_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "bench kernels --model dummy:tiny --device cpu --batches 1 --contexts 200"
    assert run([*arguments.split(), "--state-dir", str(tmp_path)]) == 0
    text, progress = capsys.readouterr()
    assert "100 %" in progress and " 0 %" not in progress
    for word in ("copy in device memory", "attend_pages", "rms_norm", "float32 on cpu"):
        assert word in text


def test_decode_in_a_table(
    tmp_path: Path,
    measured: Say,
    configure: Callable[..., DaemonConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = DecodeReport(
        model="dummy:tiny",
        device_name="Fake H100",
        dtype="bfloat16",
        knobs=points_of(configure(), (1,), (200,)).spec.knobs,
        versions={},
        copy_bytes_per_s=3e12,
        steps=(
            DecodeSpeed(
                requests=8,
                tokens=2048,
                step_ms=6.4321,
                graph_ms=6.25,
                not_hidden_ms=0.1821,
                read_bytes=15 << 30,
                floor_ms=5.3687,
                floor_ratio=1.198,
                tokens_per_s=1243.8,
            ),
        ),
        skipped=(DecodePoint(requests=64, tokens=32768),),
        selection_trace="/recordings/r.npz",
    )
    measured(report)
    verb = ["bench", "decode", "--model", "dummy:tiny", "--device", "cpu"]
    assert run([*verb, "--state-dir", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    for word in ("6.432", "6.250", "0.182", "15.00 GiB", "5.369", "1.20", "1244", "3000.0 GB/s"):
        assert word in captured.out
    assert "selections replayed from /recordings/r.npz" in captured.out
    assert "do not hold them at once: 64 x 32768" in captured.err
    assert run([*verb, "--state-dir", str(tmp_path), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["selection_trace"] == "/recordings/r.npz"


def test_kernels_in_a_table(
    tmp_path: Path, measured: Say, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(KERNELS)
    assert run(["bench", "kernels", "--device", "cpu", "--state-dir", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    for word in ("700.00 TFLOP/s", "560.00 TFLOP/s", "812.3", "50.0 GB/s", "0.93", "3000.0 GB/s"):
        assert word in captured.out
    assert "attend_resident 64 x 32768" in captured.err


@pytest.mark.parametrize("verb", ["decode", "kernels"])
def test_they_do_not_run_beside_a_daemon(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = resolve_state_dir(tmp_path, environment={})
    with StateLock(place, verb="start"):
        code = run(["bench", verb, "--device", "cpu", "--state-dir", str(tmp_path)])
    assert code == ExitCode.TEMPORARY
    assert "`sparsed start`" in capsys.readouterr().err
    with StateLock(place, verb=f"bench {verb}"), pytest.raises(StartError, match="wait for it"):
        StateLock(place, verb="start")


@pytest.mark.parametrize("verb", ["decode", "kernels"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--batches 1,none", "--batches 'none'"),
        ("--contexts 0", "--contexts '0'"),
        ("--device cuda:7", "this machine has"),
        ("--model dummy:huge", "unknown dummy shape"),
        ("--dtype int4", "--dtype: 'int4' is not one of"),
        ("--output /no/such/place/file.json", "no such directory"),
        ("--output /", "is a directory"),
        ("--output /proc/file.json", "cannot be written"),
        ("--page-size 7", "page_size='7'"),
        ("--no-such-flag", "--no-such-flag"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    verb: str, arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--state-dir", str(tmp_path)]
    assert run(["bench", verb, *arguments.split(), *place]) == ExitCode.USAGE
    assert words in capsys.readouterr().err


def test_a_failure_is_told_in_the_words_of_the_process(
    tmp_path: Path, measured: Say, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = ["bench", "kernels", "--device", "cpu", "--state-dir", str(tmp_path)]
    measured(EngineFailed(message="no memory to pin", exit_code=69), status=69)
    assert run(verb) == ExitCode.UNAVAILABLE
    assert "no memory to pin" in capsys.readouterr().err
    measured(status=3)
    assert run(verb) == ExitCode.SOFTWARE
    assert "ended with status 3" in capsys.readouterr().err


def test_a_process_that_was_killed_has_no_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(bench, "COMMAND", (sys.executable, "-c", code))
    verb = ["bench", "kernels", "--device", "cpu", "--state-dir", str(tmp_path)]
    assert run(verb) == ExitCode.SOFTWARE
    shown = capsys.readouterr().err
    assert "was killed by signal 9 (Killed)" in shown and "above" not in shown


def test_a_process_ends_when_nobody_waits_for_it() -> None:
    progress = json.dumps({"LoadProgress": {"phase": "measuring", "frac": 0.0}})
    code = f"import time; print({progress!r}, flush=True); time.sleep(600)"

    def leave(_phase: str, _frac: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_measurement((sys.executable, "-c", code), b"", answer=KernelReport, on_progress=leave)
    assert [x for x in psutil.Process().children() if progress in " ".join(x.cmdline())] == []


def test_a_context_beyond_the_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = ["bench", "decode", "--model", "dummy:tiny", "--device", "cpu", "--contexts", "9000"]
    assert run([*verb, "--state-dir", str(tmp_path)]) == ExitCode.USAGE
    assert "the model has 8192 positions" in capsys.readouterr().err
