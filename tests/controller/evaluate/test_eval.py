"""``sparsed eval`` from its arguments to its files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from sparsed.controller.cli.main import app, run
from sparsed.controller.evaluate import plan
from sparsed.controller.evaluate.plan import fit_default
from sparsed.controller.state_dir import StateLock, resolve_state_dir
from sparsed.core import (
    MEAN_KEY,
    Choice,
    EngineFailed,
    Evaluate,
    EvaluationReport,
    ExitCode,
    RankMethod,
    StartError,
)
from sparsed.engine.models.dummy import dummy_config

Eval = Callable[..., int]
QUICK = "--text documentation --context 256 --scored 33 --windows 1 --device cpu"
ROOM_FOR_NEEDLES = QUICK.replace("256", "512")


@pytest.fixture
def evaluate(tmp_path: Path, smollm2: Path) -> Eval:
    """The verb on the small real model; returns the exit status."""

    def run_verb(arguments: str, *others: str) -> int:
        place = ["--state-dir", str(tmp_path / "state"), "--model", str(smollm2)]
        return run(["eval", *place, *arguments.split(), *others])

    return run_verb


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Evaluate]:
    """What the process was asked for; it fails."""
    file = tmp_path / "asked.json"
    failed = EngineFailed(message="the texts are too short", exit_code=ExitCode.DATA)
    answer = json.dumps({"EngineFailed": msgspec.to_builtins(failed)})
    code = (
        f"import sys; open({str(file)!r}, 'wb').write(sys.stdin.buffer.read()); print({answer!r})"
    )
    monkeypatch.setattr(plan, "COMMAND", (sys.executable, "-c", code))
    return lambda: msgspec.json.decode(file.read_bytes(), type=Evaluate)


@pytest.mark.slow
def test_through_the_real_process(
    evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plots = tmp_path / "found.json", tmp_path / "plots"
    choices = (
        "--choice cuboid-mean --choice mean:share=1 --choice oracle --choice dense --share 1/2"
    )
    needles = "--needles 1 --needle-depths 1"
    files = f"--output {file} --plots {plots}"
    assert evaluate(f"{ROOM_FOR_NEEDLES} {choices} {needles} {files} -o json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    plain = json.loads(out)
    assert plain == json.loads(file.read_text())
    assert plain["command"].split()[0] == "sparsed"
    assert {"sparsed", "python", "torch"} <= plain["versions"].keys()
    found = msgspec.convert(plain, type=EvaluationReport)
    dense, ranked, whole, oracle = found.quality
    assert (dense.choice, dense.ratio) == (Choice(method=RankMethod.DENSE), 1.0)
    assert (whole.choice.share, whole.ratio, whole.recall_mean) == (1.0, 1.0, 1.0)
    assert whole.reads == dense.reads > 1 > ranked.reads == oracle.reads
    assert whole.perplexity == dense.perplexity
    assert ranked.recall_mean is not None and oracle.recall_mean is not None
    assert ranked.recall_mean < oracle.recall_mean < 1
    assert ranked.locality is not None and len(ranked.recall_by_head) == 30
    assert [score.num_asked for score in found.needles] == [1] * 4 * 3
    assert len(list(plots.glob("*.png"))) == 4


@pytest.mark.slow
def test_a_table_and_plain_words(evaluate: Eval, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(f"{QUICK} --choice quest:page_size=16 --choice mean-key --share 1/4") == 0
    out, err = capsys.readouterr()
    assert "loading weights" in err and "learning a basis of keys" in err
    assert "documentation, window 1: quest:share=1/4,page_size=16" in err
    assert "documentation, window 1: mean-key:share=1/4" in err
    for word in ("gap closed", "quest:page_size=16", "mean-key", "33 tokens scored after 256"):
        assert word in out
    assert "quest:page_size=16 at 1/4 (reads 0.2" in out.splitlines()[-1]


@pytest.mark.slow
def test_a_calibration_is_made_and_used(
    evaluate: Eval,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a gate that hardly learns: that takes longer than a test may."""
    code = (
        "from sparsed.engine.evaluate import distill; distill.STEPS = 1; "
        "from sparsed.engine.evaluate.__main__ import main; import sys; sys.exit(main())"
    )
    monkeypatch.setattr(plan, "COMMAND", (sys.executable, "-P", "-c", code))
    file = tmp_path / "calibration.safetensors"
    choice = "--choice mean:budgets=head,kept_dims=16 --choice gate --share 1/4"
    choice += f" --calibration {file}"
    assert evaluate(f"{QUICK} {choice} --calibrate") == 0
    assert file.stat().st_size > 0
    assert evaluate(f"{QUICK} {choice}") == 0
    capsys.readouterr()
    assert evaluate(f"{QUICK} {choice} --windows 2") == ExitCode.USAGE
    assert "might judge that part" in capsys.readouterr().err


def test_what_the_process_is_asked_for(
    evaluate: Eval,
    asked: Callable[[], Evaluate],
    smollm2: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate("--device cpu") == ExitCode.DATA
    assert "sparsed: the texts are too short" in capsys.readouterr().err
    wanted = asked()
    assert (wanted.model, wanted.device, wanted.dtype) == (str(smollm2), "cpu", "float32")
    assert (wanted.texts, wanted.context_tokens) == (("documentation", "prose"), 2048)
    plain = [MEAN_KEY, *(Choice(method=m) for m in (RankMethod.CUBOID_MEAN, RankMethod.ORACLE))]
    assert wanted.choices == tuple(
        replace(choice, share=share) for choice in plain for share in (1 / 8, 1 / 4)
    )
    assert (wanted.needles, wanted.calibration, wanted.calibrate) == (0, None, False)


def test_the_default_keeps_fewer_dims_of_small_heads() -> None:
    shape = replace(dummy_config("dummy:tiny").shape, head_dim=30)
    assert fit_default(MEAN_KEY, shape) == replace(MEAN_KEY, kept_dims=30)
    assert fit_default(MEAN_KEY, replace(shape, head_dim=64)) == MEAN_KEY
    given = replace(MEAN_KEY, kept_dims=39)  # not the default: as it was asked for
    assert fit_default(given, shape) == given


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--choice median", "method=median: allowed: one of dense"),
        ("--choice mean:page_size=24", "page_size=24: allowed: one of 8"),
        ("--share 2", "--share '2'"),
        ("--text /no/such/text", "--text /no/such/text: there is no such file"),
        ("--text poetry", "or one of prose, documentation, code, questions"),
        ("--context 8192", "the model has 8192 positions for both; give at most 8064"),
        ("--calibration /no/such/file", "there is no such file; make it with --calibrate"),
        ("--calibration /no/such/file --calibrate", "there is no such directory"),
        ("--calibrate", "name its file with --calibration"),
        ("--choice gate", "needs a calibration of this model"),
        ("--choice oracle:metadata=int4", "oracle takes no metadata; leave it out, or take one"),
        ("--choice quest:budgets=layer", "needs a calibration of this model"),
        ("--choice mean:dense_layers=4,share=1/8", "dense_layers=4 of 30 layers alone read"),
        ("--calibration / --calibrate", "--calibration /: is a directory"),
        ("--calibration /proc/made --calibrate", "--calibration /proc/made: cannot be written"),
        ("--choice quest:kept_dims=65", "kept_dims=65: keys of this model have 64 dims"),
        (
            f"--choice quest:kept_dims=65 --calibration {__file__}",
            "kept_dims=65: keys of this model have 64 dims",
        ),
        ("--device cuda:7", "this machine has"),
        ("--dtype int4", "--dtype: 'int4' is not one of"),
        ("--output /no/such/place/file.json", "no such directory"),
        ("--output /proc/file.json", "--output /proc/file.json: cannot be written"),
        ("--plots /proc", "--plots /proc: cannot be written to"),
        ("--plots /dev/null/plots", "--plots /dev/null/plots"),
        ("--windows 0", "--windows"),
        ("--no-such-flag", "--no-such-flag"),
    ],
)
def test_what_is_wrong_is_said_before_a_process_starts(
    arguments: str,
    words: str,
    evaluate: Eval,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plan, "COMMAND", ("/no/such/program",))
    assert evaluate(arguments) == ExitCode.USAGE
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_dummy_has_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--state-dir", str(tmp_path), "--device", "cpu"]
    assert run(["eval", "--model", "dummy:tiny", *place]) == ExitCode.USAGE
    assert "a dummy has no tokenizer" in capsys.readouterr().err


@pytest.mark.slow
def test_what_only_the_process_can_tell(
    evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("too short")
    binary.write_bytes(b"\xff\xfe")
    assert evaluate(f"--text {short} --device cpu") == ExitCode.USAGE
    shown = capsys.readouterr().err
    assert "take fewer or shorter ones, or a longer text" in shown
    assert "loading weights" not in shown
    assert evaluate(f"--text {binary} --device cpu") == ExitCode.DATA
    assert "is not UTF-8" in capsys.readouterr().err
    broken = f"{QUICK} --choice gate --calibration {short}"
    capsys.readouterr()
    assert evaluate(broken) == ExitCode.DATA
    shown = capsys.readouterr().err
    assert "cannot be read" in shown and "loading weights" not in shown


def test_it_does_not_run_beside_a_daemon(
    evaluate: Eval, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = resolve_state_dir(tmp_path / "state", environment={})
    with StateLock(place, verb="start"):
        assert evaluate("--device cpu") == ExitCode.TEMPORARY
    assert "`sparsed start`" in capsys.readouterr().err
    with StateLock(place, verb="eval"), pytest.raises(StartError, match="wait for it"):
        StateLock(place, verb="start")


def test_help_names_the_defaults() -> None:
    shown = CliRunner().invoke(app, ["eval", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    words = " ".join(shown.output.replace("│", " ").split())
    for default in ("documentation and prose", "mean-key; cuboid-mean; oracle", "2048"):
        assert default in words
