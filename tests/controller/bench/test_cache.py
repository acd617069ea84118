"""``sparsed bench cache`` from recordings to its files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsed.controller.bench.cache import LinkShape
from sparsed.controller.cli.bench_cache import parse_policies, parse_residencies
from sparsed.controller.cli.main import run
from sparsed.core import CachePolicy, ExitCode, InputError
from sparsed.engine.evaluate.recording import Recording, RecordingHeader, write_recording

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "benchmarking.md"
STEPS, LANES, RANKS = 80, 4, 30
Record = Callable[..., Path]
Bench = Callable[..., int]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Write a recording of drifting scores: budget of 8 pages of 16 tokens, 30 ranks."""

    def write(name: str = "words", *, seed: int = 0, steps: int = STEPS, **header: Any) -> Path:
        values = {"model": "tiny", "page_size": 16, "token_budget": 128, **header}
        rng = np.random.default_rng(seed)
        scores_LP = rng.normal(size=(LANES, 60))
        ranked_SLR = np.empty((steps, LANES, RANKS), dtype=np.int32)
        for step in range(steps):
            ranked_SLR[step] = np.argsort(-scores_LP, axis=1)[:, :RANKS]
            scores_LP += 0.3 * rng.normal(size=scores_LP.shape)
        recording = Recording(
            header=RecordingHeader(
                text=name,
                method="quest",
                commit="0123abc",
                context_tokens=960,
                sink_pages=1,
                recent_pages=1,
                num_kv_heads=2,
                dense_layers=0,
                **values,
            ),
            ranked_SLR=ranked_SLR,
        )
        write_recording(tmp_path / f"{name}.npz", recording)
        return tmp_path / f"{name}.npz"

    return write


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    def run_verb(*arguments: object) -> int:
        place = ["--state-dir", str(tmp_path / "state")]
        return run(["bench", "cache", *map(str, arguments), *place])

    return run_verb


def keys_of(value: object) -> Iterator[str]:
    """All keys of JSON data, but for the residencies that quotas are listed by."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not re.fullmatch(r"[\d.]+", key):
                yield key
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def test_tables_and_files(
    record: Record, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "made" / "here"
    assert bench(record(), "--output-dir", place) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    rows = [line for line in lines if line and re.fullmatch(r"[\d.]+x", line[0])]
    assert len(rows) == 7 * 3
    assert rows[0][:4] == ["1x", "lru", "equal", "7"]
    assert "48 steps of words counted" in text
    assert "dummy:llama-3.1-8b, 256 lanes, pages of 8 KiB (bfloat16), over a link of 50" in text
    assert (place / "misses.png").read_bytes().startswith(b"\x89PNG")
    plain = json.loads((place / "result.json").read_text())
    assert plain["rows"][0]["miss_frac"] == pytest.approx(float(rows[0][5][:-1]) / 100, abs=5e-5)
    assert plain["rows"][0]["miss_ms"] == pytest.approx(float(rows[0][7]), abs=5e-4)


def test_json_holds_what_the_guide_says(
    record: Record, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    files = record("prose"), record("code", seed=1)
    options = "--quotas uneven --prefetch 4 --residency 3,2 --policy bucketed,belady -o json"
    assert bench(*files, *options.split()) == 0
    plain = json.loads(capsys.readouterr().out)
    section = GUIDE.read_text().split("## Hot tiers")[1].split("## Quality")[0]
    assert set(keys_of(plain)) == set(re.findall(r"`(\w+)`", _keys_table(section)))
    assert [one["text"] for one in plain["recordings"]] == ["prose", "code"]
    assert [one["first_step"] for one in plain["recordings"]] == [STEPS // 2] * 2
    assert plain["study"]["residencies"] == [2.0, 3.0]
    assert [row["quotas"] for row in plain["rows"]] == ["equal", "uneven"] * 4
    assert set(plain["uneven_slots"]) == {"2", "3"}
    assert sum(plain["uneven_slots"]["2"]) == LANES * 14


def _keys_table(section: str) -> str:
    """The first column, and what the rows of nested values list in their second."""
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    nested = ("`command`", "`recordings`", "`study`", "`link`")
    return " ".join(row[1] + (row[2] if row[1].strip().startswith(nested) else "") for row in rows)


def test_costs_are_those_of_the_model(
    record: Record, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--model dummy:tiny --residency 2 --policy lru --prefetch 3 --link-gb-per-s 0.5"
    assert bench(record(), "--page-size", "32", "--token-budget", "256", *options.split()) == 0
    assert "wasted MB" in capsys.readouterr().out
    assert bench(record(), *options.split(), "-o", "json") == 0
    plain = json.loads(capsys.readouterr().out)
    (row,) = plain["rows"]
    lanes, page_bytes = 2 * 2, 16 * 2 * 16 * 2  # K and V of 16 dims in bfloat16
    assert (plain["link"]["num_lanes"], plain["link"]["page_bytes"]) == (lanes, page_bytes)
    selected_bytes = 7 * lanes * page_bytes
    assert plain["mean_selected_pages"] == 7
    assert row["hot_bytes"] == 2 * selected_bytes
    assert row["miss_bytes"] == pytest.approx(row["miss_frac"] * selected_bytes)
    assert row["miss_ms"] == pytest.approx(row["miss_bytes"] / 0.5e9 * 1e3)
    assert row["worst_miss_ms"] == pytest.approx(row["worst_miss_frac"] * selected_bytes / 0.5e6)
    prefetched_bytes = row["prefetched_frac"] * selected_bytes
    assert row["prefetch_ms"] == pytest.approx(prefetched_bytes / 0.5e6)
    assert row["wasted_bytes"] == pytest.approx(prefetched_bytes * (1 - row["used_frac"]))
    assert 0 < row["used_frac"] < 1


def test_a_link_takes_bytes_over_its_rate() -> None:
    link = LinkShape(model="m", dtype="bfloat16", num_lanes=256, page_bytes=4096, gb_per_s=50)
    assert link.time_ms(10) == pytest.approx(256 * 10 * 4096 / 50e9 * 1e3)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("--token-budget 500", ExitCode.USAGE, "token_budget=500 must be a multiple of page_size"),
        ("--token-budget 512", ExitCode.USAGE, "from 48 to 496; more needs a recording of more"),
        ("--page-size 24", ExitCode.USAGE, "page_size=24 is no multiple of 16"),
        ("--page-size 0", ExitCode.USAGE, "--page-size"),
        ("--prefetch 24", ExitCode.USAGE, "prefetch=24: the recording ranks 23 pages"),
        ("--policy fifo", ExitCode.USAGE, "--policy 'fifo': allowed are lru, bucketed, belady"),
        ("--residency 0.5", ExitCode.USAGE, "--residency '0.5': allowed are numbers from 1 up"),
        ("--link-gb-per-s 0", ExitCode.USAGE, "--link-gb-per-s 0: give a rate of more than 0"),
        ("--link-gb-per-s nan", ExitCode.USAGE, "--link-gb-per-s nan"),
        ("--quotas some", ExitCode.USAGE, "--quotas"),
        ("--model dummy:none", ExitCode.USAGE, "unknown dummy shape 'none'"),
        ("--output-dir /proc/none", ExitCode.USAGE, "--output-dir /proc/none"),
    ],
)
def test_wrong_options_name_themselves_and_a_remedy(
    record: Record,
    bench: Bench,
    arguments: str,
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench(record(), *arguments.split()) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, ExitCode.USAGE, "is no file"),
        (b"no recording", ExitCode.DATA, "no whole .npz"),
    ],
)
def test_what_is_no_recording_is_refused(
    bench: Bench,
    tmp_path: Path,
    content: bytes | None,
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "other.npz"
    if content is not None:
        file.write_bytes(content)
    assert bench(file) == code
    assert re.search(rf"{file}.*{words}", capsys.readouterr().err)


def test_another_archive_is_no_recording(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "other.npz", pages=np.zeros(3))
    assert bench(tmp_path / "other.npz") == ExitCode.DATA
    assert "array header is missing; record it again" in capsys.readouterr().err


def test_recordings_that_do_not_agree_need_an_option(
    record: Record, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    files = record("prose"), record("code", token_budget=256)
    assert bench(*files) == ExitCode.USAGE
    assert "different token_budget: 128, 256; give --token-budget" in capsys.readouterr().err
    assert bench(*files, "--token-budget", "128") == 0
    assert bench(record("short", steps=20)) == ExitCode.USAGE
    assert "'short' has 20 steps, equal quotas need 33 or more" in capsys.readouterr().err


def test_lists_are_parsed() -> None:
    assert parse_policies("belady, lru,belady") == (CachePolicy.BELADY, CachePolicy.LRU)
    assert parse_residencies("4,1.5, 4") == (1.5, 4.0)
    for text in ("", ",", "x", "2,nan", "inf", "0.99"):
        with pytest.raises(InputError) as caught:
            parse_residencies(text)
        assert caught.value.field == "residency"
    with pytest.raises(InputError) as caught:
        parse_policies("")
    assert caught.value.field == "policy"
