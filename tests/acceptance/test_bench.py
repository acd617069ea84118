"""`sparsed bench serve` against the real daemon, each a process of its own."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow
API_KEY = "secret"
TRACE = Path(__file__).resolve().parents[2] / "examples" / "traces" / "conversation.jsonl"


@pytest.fixture(scope="module")
def served(daemon: Any) -> Any:
    return daemon("--api-key", API_KEY, "--served-model-name", "tiny", "--token-budget", "256")


def bench(served: Any, *arguments: str) -> dict[str, Any]:
    """What the verb printed as JSON; the vocabulary of the model has 512 tokens."""
    command = [sys.executable, "-m", "sparsed", "bench", "serve", "--url", served.url]
    command += ["--vocab-size", "512", "-o", "json", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"SPARSED_API_KEY": API_KEY},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def test_random_load(served: Any, tmp_path: Path) -> None:
    arguments = "--num-prompts 6 --request-rate 10 --input-len 300:500 --output-len 12 --warmup 1"
    slo = "--slo-ttft-ms 60000 --slo-tpot-ms 60000"
    result = bench(served, *arguments.split(), *slo.split(), "--output-dir", str(tmp_path))
    summary = result["summary"]
    assert (result["model"], result["server_version"]) == ("tiny", result["versions"]["sparsed"])
    assert (summary["num_complete"], summary["errors"], summary["num_short"]) == (6, {}, 0)
    assert summary["output_tokens"] == 6 * 12
    assert 6 * 300 <= summary["prompt_tokens"] <= 6 * 500
    assert summary["goodput_frac"] == 1.0
    assert 0 < summary["ttft"]["p50_ms"] < summary["e2e"]["p50_ms"]
    with (tmp_path / "requests.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["prompt_tokens"] == row["input_tokens"] for row in rows)
    assert _generated_tokens(served) >= 7 * 12


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_trace_with_sparse_attention(served: Any, endpoint: str) -> None:
    arguments = f"--trace {TRACE} --num-prompts 4 --time-scale 100 --max-input-len 700"
    more = f"--max-output-len 8 --token-budget 256 --endpoint {endpoint} --max-concurrency 2"
    result = bench(served, *arguments.split(), *more.split())
    assert (result["summary"]["num_complete"], result["summary"]["errors"]) == (4, {})
    assert (result["sparse"], result["workload"]["num_clipped"]) == ({"token_budget": 256}, 4)
    assert result["summary"]["output_tokens"] == 4 * 8


def _generated_tokens(served: Any) -> float:
    text = httpx.get(f"{served.url}/metrics").text
    found = re.search(r"^sparsed_generation_tokens_total\S* (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])
