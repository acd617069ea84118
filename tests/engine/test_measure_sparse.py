"""What is measured of the kernels of sparse steps: bytes, and inputs as a decode leaves them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sparsed.core import Ceiling
from sparsed.engine.measure.cases import Setting
from sparsed.engine.measure.clock import MAX_RUNS, Clock
from sparsed.engine.measure.kernels import measure_case
from sparsed.engine.measure.resolve_cases import ResolveSteps, lane_slots, resolve_cases
from sparsed.engine.measure.sparse_cases import hits_case, rest_case, sparse_cases
from sparsed.engine.measure.sparse_step import SparseStep
from sparsed.engine.models.dummy import dummy_config


def setting_of(context: int) -> Setting:
    return Setting(
        device=torch.device("cpu"),
        dtype=torch.float32,
        shape=dummy_config("dummy:tiny").shape,
        page_size=16,
        batches=(2,),
        contexts=(context,),
    )


def test_cases_of_sparse_steps_move_what_their_names_say() -> None:
    """Two requests with 18 full pages of 16 in two lanes each, and 10 bytes for a mean key."""
    setting = setting_of(300)
    step = SparseStep(setting, 2)
    cases = [*sparse_cases(setting), hits_case(step), rest_case(step)]
    amounts = {(case.kernel, case.words): case.amount for case in cases}
    assert amounts == {
        ("select_by_mean_keys", "2 x 300, 18 of 18 pages"): 4 * 18 * 10 + 2 * 16 * 16 * 4,
        ("resolve_pages", "2 x 18 pages in 24 slots, 0 new"): 4 * (24 + 3 + 4 * 18) * 4 + 2 * 3 * 4,
        ("attend_hits", "2 x 18 pages of 16"): 4 * (18 * 16 * 2 * 16 * 4 + 2 * 2 * 17 * 4),
        ("attend_rest", "2 x 18 hits and a page of 16"): 4
        * (2 * (2 * 17 * 4 + 17 * 4) + 16 * 2 * 16 * 4),
        ("summarise_pages", "8 pages of 16, 4 lanes"): 8 * (16 * 16 * 4 + 10) + 4 * 16 * 17 * 4,
        ("summarise_pages", "64 pages of 16, 2 lanes"): 64 * (16 * 16 * 4 + 10) + 2 * 16 * 17 * 4,
    }


def test_some_pages_are_new_where_the_hot_tier_is_smaller() -> None:
    """127 pages are selected; 4 of them are 3 %."""
    step = SparseStep(setting_of(32768), 2)
    lanes = 4
    old, new = resolve_cases(step)
    assert new.words == "2 x 127 pages in 512 slots, 4 new"
    assert new.amount == old.amount + lanes * 4 * 8 * 4


def test_attention_to_hits_and_its_merge_run() -> None:
    step = SparseStep(setting_of(300), 2)
    for case in (hits_case(step), rest_case(step)):
        speed = measure_case(
            case, clock=Clock(torch.device("cpu")), ceilings=dict.fromkeys(Ceiling, 1e9)
        )
        assert speed is not None and speed.rate > 0
    work = rest_case(step).make()[0]
    assert isinstance(work, partial)
    out_BHGD, lse_BHG = work.keywords["out_BHGD"], work.keywords["lse_BHG"]
    lse_BHG.fill_(float("nan"))
    work()
    assert out_BHGD.isfinite().all() and lse_BHG.isfinite().all()


@pytest.mark.parametrize("num_new", [0, 4])
def test_steps_go_over_full_hot_tiers(num_new: int) -> None:
    """Every lane misses its new pages, and each takes the slot of another page."""
    step, layers, lanes = SparseStep(setting_of(32768), 2), 3, 4
    steps = ResolveSteps(step, layers=layers, num_new=num_new)
    slots = layers * lanes * lane_slots(step)
    assert (steps.tables.slot_page_N >= 0).sum() == slots == len(steps.tables.slot_page_N)
    for now in range(1, MAX_RUNS + 1):
        steps.advance()
        for layer in range(layers):
            steps.resolve(layer)
        assert (steps.out.slots_BHK >= 0).all() and (steps.out.tail_slots_BH >= 0).all()
        assert (steps.out.num_hits_BH == step.num_selected - num_new).all()
        calls = now * layers * lanes
        misses = calls * num_new
        assert steps.out.counters_4.tolist() == [calls * step.num_selected, misses, misses, 0]
