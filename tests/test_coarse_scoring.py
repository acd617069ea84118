"""The benchmark of coarse-to-fine scoring: all of it on a CPU, small, and what its targets say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import coarse_scoring
import pytest
import torch
from coarse_scoring import Sizes, list_targets, make_input, select_coarse, select_flat

from sparsed.engine.measure.cases import Setting
from sparsed.engine.models.dummy import dummy_config


@pytest.mark.slow
def test_all_cases_in_one_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(coarse_scoring, "SHORT", 1024)
    monkeypatch.setattr(coarse_scoring, "LONG", 4096)
    file = tmp_path / "made" / "coarse.json"
    flags = "--device cpu --model dummy:tiny --contexts 1024 4096 --batches 1 2"
    flags += f" --num-supers 4 --budget 256 --output {file}"
    monkeypatch.setattr(sys, "argv", ["coarse_scoring.py", *flags.split()])
    coarse_scoring.main()
    result = json.loads(file.read_text())
    cases = [(row["dtype"], row["batch"], row["context"]) for row in result["rows"]]
    assert cases == [(d, b, c) for d in ("bf16", "int8") for b in (1, 2) for c in (1024, 4096)]
    assert all(row["flat_us"] > 0 and row["coarse_score_us"] > 0 for row in result["rows"])
    assert all(target["value"] > 0 for target in result["targets"])
    assert "scored bytes, 512k over 32k" in capsys.readouterr().out


@pytest.mark.parametrize("int8", [False, True])
def test_both_ways_select_the_same_of_few_super_pages(int8: bool) -> None:
    shape = dummy_config("dummy:tiny").shape
    setting = Setting(
        device=torch.device("cpu"),
        dtype=torch.float32,
        shape=shape,
        page_size=16,
        batches=(2,),
        contexts=(1024,),
    )
    sizes = Sizes(
        batch=2,
        heads=shape.num_kv_heads,
        dim=shape.head_dim,
        context=1024,
        page_size=16,
        super_tokens=256,
        num_supers=4,
        count=16,
        int8=int8,
    )
    x = make_input(setting, sizes)
    chosen = select_coarse(x, count=16, num_supers=4), select_flat(x, count=16)
    assert torch.equal(*(pages_BHK.sort(-1).values for pages_BHK in chosen))


def test_bytes_are_those_of_summaries_scales_rows_and_scores() -> None:
    sizes = {"heads": 8, "dim": 128, "page_size": 16, "super_tokens": 256, "num_supers": 32}
    case = Sizes(batch=2, context=32768, count=128, int8=False, **sizes)
    assert case.flat_bytes == 16 * (2048 * (512 + 4) + 256 * 8)
    assert case.coarse_bytes == 16 * (128 * (512 + 4 + 8) + 512 * (512 + 4) + 64 * 8)
    case = Sizes(batch=1, context=32768, count=128, int8=True, **sizes)
    assert case.flat_bytes == 8 * (2048 * (256 + 2 + 4) + 256 * 8)


def test_targets_are_met_or_missed_by_the_worst() -> None:
    rows = [
        {
            "dtype": "bf16",
            "batch": batch,
            "context": context,
            "bytes_frac": 0.3 + batch / 100,
            "coarse_bytes": context,
            "coarse_us": 5 + batch + context / 32768,
            "coarse_score_us": 1.0,
        }
        for batch in (1, 8)
        for context in (8192, 32768, 524288)
    ]
    assert [(t.value, t.meets(t.value, t.bound)) for t in list_targets(rows)] == [
        (0.38, False),
        (16.0, False),
        (22 / 7, True),
        (1.0, True),
    ]
    assert all(target.value is None for target in list_targets(rows[:1]))
