"""The benchmark of the dense engine: every part on a CPU, small, and what its targets look at."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import gpu_dense
import pytest
from gpu_dense import LOADS, list_targets, no_saves

from sparsed.engine.kvcache.order import Saved
from sparsed.engine.kvcache.transfer import Transfer

SMALL = {
    "long-prompt": {"prompt_tokens": 600, "output_tokens": 3},
    "short-prompts": {"prompt_tokens": 60, "output_tokens": 3, "count": 4},
    "long-prompts": {"prompt_tokens": 300, "output_tokens": 3, "count": 3},
}


@pytest.mark.slow
def test_all_parts_in_one_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loads = {name: replace(load, **SMALL[name]) for name, load in LOADS.items()}
    for name, value in (
        ("LOADS", loads),
        ("WARM_UP", replace(gpu_dense.WARM_UP, prompt_tokens=40, output_tokens=2)),
        ("POINTS", ((1, 200), (3, 200), (99, 200))),
        ("ATTENTION", (2, 200)),
    ):
        monkeypatch.setattr(gpu_dense, name, value)
    file = tmp_path / "made" / "dense.json"
    flags = "--device cpu --model dummy:tiny --kv-hbm-gib 0.1 --kv-dram-gib 0.1"
    flags += f" --prefill-chunk 256 --output {file}"
    monkeypatch.setattr(sys, "argv", ["gpu_dense.py", *flags.split()])
    gpu_dense.main()
    result = json.loads(file.read_text())
    assert [row["name"] for row in result["loads"]] == list(LOADS)
    assert [step["requests"] for step in result["steps"]] == [1, 3]
    assert result["saves"]["ratio"] > 0 and result["attention"]["ratio"] > 0
    parts = {"start", "warm-up", "steps", "saves", "attention", *LOADS}
    assert set(result["seconds"]) == parts and result["versions"]["torch"]
    (unknown,) = (target for target in result["targets"] if target["value"] is None)
    assert "host time not hidden" in unknown["words"], "a CPU has no graphs"
    assert "not measured (<= 0.3)" in capsys.readouterr().out


def test_targets_are_met_or_missed() -> None:
    steps = [
        {"requests": requests, "graph_ms": 5.0, "not_hidden_ms": late_ms}
        for requests, late_ms in ((1, 0.1), (1, 0.2), (8, 0.9))
    ]
    load = {"name": "long-prompt", "mean_ttft_s": 1.3, "mean_tpot_ms": 7.9}
    targets = list_targets({"loads": [load], "steps": steps, "saves": {"ratio": 1.02}})
    met = [None if t.value is None else t.meets(t.value, t.bound) for t in targets]
    assert met == [False, True, None, None, True, None, True]
    assert targets[4].value == 0.2, "the worse of batch 1, and no other"


def test_saves_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transfer, "__init__", lambda self: None)
    transfer = Transfer()  # type: ignore[call-arg]  # made of nothing
    with no_saves(transfer):
        assert transfer.save() == transfer.save_blocks() == Saved()  # type: ignore[call-arg]  # replaced
    assert transfer.save.__func__ is Transfer.save  # type: ignore[attr-defined]  # a method again
