"""What a report says: the gap to the oracle, tables, plain words, JSON and plots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import exp
from pathlib import Path

import pytest

from sparsed.controller.cli.output import to_json
from sparsed.controller.evaluate.choices import parse_choice
from sparsed.controller.evaluate.gaps import gap_closed
from sparsed.controller.evaluate.plots import write_plots
from sparsed.controller.evaluate.report import (
    HEADERS,
    in_plain_words,
    needle_headers,
    needle_rows,
    quality_rows,
    to_plain,
)
from sparsed.core import RESIDENCIES, EvaluationReport, Locality, NeedleScore, Quality

PNG = b"\x89PNG\r\n\x1a\n"
LOCALITY = Locality(
    num_steps=96,
    overlap_frac=0.8,
    window_ratio=1.7,
    first_touch_frac=0.01,
    miss_fracs=tuple(0.2 / residency for residency in RESIDENCIES),
    worst_miss_frac=0.15,
)


def row(spec: str, loss: float, *, text: str = "prose") -> Quality:
    choice = parse_choice(spec).choice
    is_dense = spec == "dense"
    return Quality(
        text=text,
        choice=choice,
        num_tokens=128,
        perplexity=9 * exp(loss),
        ratio=exp(loss),
        ratio_low=exp(loss - 0.01),
        ratio_high=exp(loss + 0.01),
        reads=1.05 if is_dense else choice.share,
        metadata_bytes=0.0 if is_dense else 720.0,
        recall_mean=None if is_dense else 0.8125,
        recall_p10=None if is_dense else 0.5,
        recall_p01=None if is_dense else 0.25,
        error_mean=None if is_dense else 0.125,
        recall_by_head=() if is_dense else ((0.5, 0.75), (0.25, 1.0)),
        locality=None if is_dense else LOCALITY,
    )


def report(*rows: Quality, needles: tuple[NeedleScore, ...] = ()) -> EvaluationReport:
    return EvaluationReport(
        model="/models/small",
        device_name="cpu",
        dtype="float32",
        versions={"torch": "2"},
        context_tokens=2048,
        scored_tokens=128,
        num_windows=1,
        quality=rows,
        needles=needles,
        seconds={"load": 1.0},
    )


def needle_scores() -> Iterator[NeedleScore]:
    specs = ("dense", "mean:share=1/8")
    for spec, length, depth in product(specs, (1024, 512), (0.25, 0.75)):
        yield NeedleScore(
            choice=parse_choice(spec).choice,
            length=length,
            depth=depth,
            num_found=2 if spec == "dense" else int(depth > 0.5),
            num_asked=2,
        )


# -- the gap ---------------------------------------------------------------------------------


def test_the_gap_is_between_cuboid_mean_and_the_oracle() -> None:
    start, end = row("cuboid-mean:share=1/8", 0.10), row("oracle:share=1/8", 0.02)
    half, worse = row("mean:share=1/8,page_size=16", 0.06), row("quest:share=1/8", 0.12)
    rows = [row("dense", 0.0), start, end, half, worse]
    found = [gap_closed(item, rows) for item in rows]
    assert found == [None, *(pytest.approx(x) for x in (0.0, 1.0, 0.5, -0.25))]


def test_the_gap_is_of_the_same_text_and_share() -> None:
    start, end = row("cuboid-mean:share=1/8", 0.10), row("oracle:share=1/8", 0.02)
    other_share = row("mean:share=1/4", 0.06)
    other_text = row("mean:share=1/8", 0.06, text="code")
    rows = [start, end, other_share, other_text]
    assert gap_closed(other_share, rows) is None
    assert gap_closed(other_text, rows) is None
    assert gap_closed(row("mean:share=1/8", 0.06), [start]) is None
    assert gap_closed(start, [start, row("oracle:share=1/8", 0.2)]) is None  # no gap to close


def test_the_gap_is_of_pages_of_32_tokens_before_those_of_the_row() -> None:
    small = [
        row("cuboid-mean:share=1/8,page_size=16", 0.08),
        row("oracle:share=1/8,page_size=16", 0.00),
    ]
    usual = [row("cuboid-mean:share=1/8", 0.10), row("oracle:share=1/8", 0.02)]
    item = row("mean:share=1/8,page_size=16", 0.06)
    assert gap_closed(item, small) == pytest.approx(0.25)
    assert gap_closed(item, [*small, usual[0]]) == pytest.approx(0.25)  # no oracle at 32
    assert gap_closed(item, [*small, *usual]) == pytest.approx(0.5)
    assert gap_closed(row("mean:share=1/8,page_size=64", 0.06), small) is None


def test_the_oracle_is_the_better_one_and_the_start_a_plain_one() -> None:
    rows = [
        row("cuboid-mean:share=1/8", 0.10),
        row("cuboid-mean:share=1/8,metadata=int4", 0.30),
        row("oracle:share=1/8", 0.04),
        row("oracle:share=1/8,group_rule=softmax-sum", 0.02),
    ]
    assert gap_closed(row("mean:share=1/8", 0.06), rows) == pytest.approx(0.5)


# -- tables ----------------------------------------------------------------------------------


def test_rows_of_the_table() -> None:
    rows = list(
        quality_rows(
            report(
                row("dense", 0.0),
                row("cuboid-mean:share=1/8", 0.10),
                row("oracle:share=1/8", 0.02),
                row("mean:share=1/8,page_size=16", 0.06),
            )
        )
    )
    assert all(len(cells) == len(HEADERS) for cells in rows)
    assert rows[0][:5] == ("prose", "dense", None, "9.000", "1.0000")
    assert rows[0][8:] == (None,) * 6
    interval, values = "1.0513 to 1.0725", ("0.125", "720", "0.812", "0.500", "0.250", "0.125")
    head = ("prose", "mean:page_size=16", "1/8", "9.557", "1.0618", interval)
    assert rows[3] == (*head, *values, "5.00%", "50%")


def test_needles_in_a_table() -> None:
    found = report(needles=tuple(needle_scores()))
    assert needle_headers(found) == ("needles found", "share", "512 tokens", "1024 tokens")
    assert list(needle_rows(found)) == [
        ("dense", None, "4 of 4", "4 of 4"),
        ("mean", "1/8", "1 of 4", "1 of 4"),
    ]


def test_plain_words() -> None:
    rows = [
        row("dense", 0.0),
        row("oracle:share=1/8", 0.02),
        row("mean:share=1/4", 0.02),
        row("mean:share=1/8", 0.031),
        row("quest:share=1/8", 0.09),
        row("mean:share=1/8", -0.005, text="code"),
    ]
    assert in_plain_words(report(*rows)) == (
        "mean at 1/8 (reads 0.125): perplexity 3.1 % above dense on prose, "
        "0.5 % below dense (may be chance) on code"
    )
    assert in_plain_words(report(rows[0], rows[1])) is None


def test_plain_words_tell_what_was_read_rather_than_asked_for() -> None:
    wide = replace(row("mean-key:share=1/64", 0.02), reads=0.1875)
    words = in_plain_words(report(row("dense", 0.0), wide))
    assert words == "mean-key at 1/64 (reads 0.188): perplexity 2.0 % above dense on prose"


def test_json_has_the_report_the_command_and_versions() -> None:
    found = report(row("dense", 0.0), row("mean:share=1/8", 0.1))
    plain = to_plain(found, arguments=["eval", "--text", "my file"])
    assert plain["command"] == "sparsed eval --text 'my file'"
    versions = plain["versions"]
    assert isinstance(versions, dict) and {"sparsed", "python", "torch"} <= versions.keys()
    assert plain["quality"] == found.quality
    assert '"method": "mean"' in to_json(plain)


# -- plots -----------------------------------------------------------------------------------


def test_plots(tmp_path: Path) -> None:
    specs = ("cuboid-mean", "mean:page_size=16,group_rule=softmax-sum,metadata=int4,kept_dims=32")
    rows = [
        row(f"{spec}{',' if ':' in spec else ':'}share={share}", 0.1, text=text)
        for text, spec, share in product(("prose", "code"), specs, ("1/8", "1/4", "1/2"))
    ]
    found = report(row("dense", 0.0), *rows, needles=tuple(needle_scores()))
    paths = write_plots(found, tmp_path / "new")
    names = ["quality.png", "recall.png", "locality.png", "needles.png"]
    assert [path.name for path in paths] == names
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_what_is_not_there_is_not_drawn(tmp_path: Path) -> None:
    bare = replace(row("clusters:share=1/8", 0.1), locality=None, recall_by_head=())
    paths = write_plots(report(row("dense", 0.0), bare), tmp_path)
    assert [path.name for path in paths] == ["quality.png"]
    assert write_plots(report(row("dense", 0.0)), tmp_path) == ()
