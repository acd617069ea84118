"""The soak of ``benchmarks/soak.py``, short; and that it finds what it is there to find."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from soak import MakeRunner, Result, load_runner, run_soak
from soak_load import SoakOptions
from torch import Tensor

from sparsed.core import EngineSpec
from sparsed.engine.kvcache.tables import PageTables
from sparsed.engine.kvcache.transfer import Transfer
from sparsed.engine.runner import Runner
from sparsed.kernels.copy import copy_pages

STEPS = 150  # enough for one of each that is asserted of a run


class AheadRunner(Runner):
    """Runs ahead on a CPU too: tokens are fed from the runner's own memory of them."""

    @property
    def runs_ahead(self) -> bool:
        return True


def ahead(spec: EngineSpec) -> Runner:
    """Resident rows take the way of a CUDA device, without graphs."""
    return AheadRunner(replace(spec, enforce_eager=True), on_progress=lambda *_: None)


def ahead_over_tiers(spec: EngineSpec) -> Runner:
    """No row takes the way of resident ones."""
    runner = ahead(spec)
    runner.steps = None
    return runner


def soak(*, make_runner: MakeRunner = load_runner, **options: Any) -> Result:
    values = {"steps": STEPS, "num_compared": 8, "check_steps": 10, **options}
    return run_soak(SoakOptions(**values), make_runner=make_runner)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_runner", "options"),
    [
        (load_runner, {"seed": 11}),
        (ahead, {"seed": 11}),
        (ahead_over_tiers, {"seed": 11}),
        (ahead, {"seed": 12, "page_size": 8, "sparse_method": "quest", "lane_blocks": 9}),
        (
            ahead_over_tiers,
            {"seed": 13, "page_size": 64, "dense_layers": 1, "num_frames": 25, "steps": 200},
        ),
        (ahead, {"seed": 15, "page_size": 128, "lane_blocks": 3, "steps": 300}),
        (load_runner, {"seed": 16, "sparse_method": "cuboid-mean", "lane_blocks": 6}),
        (load_runner, {"seed": 20, "retrieval_strides": (5,)}),
        (
            ahead_over_tiers,
            {"seed": 18, "retrieval_strides": (1, 3, 9), "lane_blocks": 6, "steps": 300},
        ),
    ],
)
def test_nothing_is_lost_or_wrong(make_runner: MakeRunner, options: dict[str, Any]) -> None:
    result = soak(make_runner=make_runner, **options)
    assert result.problems() == []
    assert result.sent_again > 0 and result.reasons["abort"] > 0 and result.knob_changes > 0
    assert result.texts_compared > 5


@pytest.mark.slow
def test_only_what_is_too_long_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert soak(seed=5).reasons["error"] == 1
    monkeypatch.setattr("soak.is_too_long", lambda request: False)
    with pytest.raises(AssertionError, match=r"reason=<FinishReason\.ERROR"):
        soak(seed=5)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("page_size", [8, 128])
@pytest.mark.parametrize("strides", [(1,), (5,), (1, 3, 9)])
def test_nothing_is_lost_or_wrong_on_a_gpu(
    dtype: str, enforce_eager: bool, page_size: int, strides: tuple[int, ...]
) -> None:
    result = soak(
        device="cuda:0",
        dtype=dtype,
        enforce_eager=enforce_eager,
        page_size=page_size,
        retrieval_strides=strides,
        steps=600,
        seed=21,
    )
    print(result)
    assert result.problems() == []


# -- the soak fails when it should ---------------------------------------------------------------


def copy_wrongly(dst_RX: Tensor, src_RX: Tensor, **rows: Any) -> None:
    """Spoils a page of every copy."""
    copy_pages(dst_RX, src_RX, **rows)
    count, wanted_M = rows.get("count"), rows["src_rows_M"] >= 0
    wanted_M = wanted_M if count is None else wanted_M[: int(count)]
    dst_RX[rows["dst_rows_M"][: len(wanted_M)][wanted_M][:1]] += 1.0


@pytest.mark.parametrize(("check_steps", "words"), [(10, "tiers differ"), (10**6, "was saved")])
def test_a_page_that_arrives_changed_is_found(
    check_steps: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By comparing the tiers between steps, and without that by verifying copies."""
    monkeypatch.setitem(Transfer.__init__.__kwdefaults__, "copy_rows", copy_wrongly)
    with pytest.raises(AssertionError, match=words):
        assert not soak(seed=11, check_steps=check_steps, num_compared=0).problems()


def test_slots_that_an_ended_request_keeps_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageTables, "release", lambda *args, **options: None)
    with pytest.raises(AssertionError, match="slot"):
        soak(seed=11)


def test_a_token_that_the_device_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row's last token is that of whoever had the row before."""
    monkeypatch.setattr(Runner, "_keep_tokens", lambda *args: None)
    problems = soak(make_runner=ahead_over_tiers, seed=11).problems()
    assert problems and all("request-" in problem for problem in problems)
