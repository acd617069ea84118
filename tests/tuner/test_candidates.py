"""What is verified: the recommendation first, then the next best, never what broke a limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sparsed.core import Knobs, TrialResult, TrialStatus
from sparsed.tuner.candidates import pick_candidates
from sparsed.tuner.space import build_space

DEFAULT = {"token_budget": 2048}
SPACE = build_space(
    Knobs(
        token_budget=2048,
        hbm_budget=None,
        max_num_active_seqs=16,
        prefill_chunk=2048,
        page_size=32,
        sparse_method="mean-key",
        dense_layers=0,
        max_num_seqs=16,
        kv_hbm_gib=1.0,
        kv_dram_gib=1.0,
        max_model_len=8192,
    ),
    auto_hbm_budget=5000,
)


def trial(number: int, budget: int, score: float | None) -> TrialResult:
    return TrialResult(
        number=number,
        arm="bayes",
        values={"token_budget": budget},
        status=TrialStatus.OK if score is not None else TrialStatus.SLO_BROKEN,
        score=score,
        spread_frac=None,
        metrics={},
    )


def picked(*pairs: tuple[int, float | None], recommended: int, busy: int = 0) -> list[int]:
    """Budgets, of trials with these scores; the link is too busy at a budget of ``busy``."""
    trials = [trial(number, *pair) for number, pair in enumerate(pairs)]
    found = pick_candidates(
        trials,
        space=SPACE,
        default=DEFAULT,
        recommended=SPACE.default_values | {"token_budget": recommended},
        keeps_limits=lambda one: one.values["token_budget"] != busy,
        most=3,
    )
    return [int(one.values["token_budget"] or 0) for one in found]


def test_one_lucky_window_does_not_beat_repeats() -> None:
    pairs = ((2048, 10.0), (512, 20.0), (512, 11.0), (512, 12.0), (1024, 14.0), (1024, 15.0))
    assert picked(*pairs, recommended=1024) == [1024, 512]
    assert picked(*pairs, recommended=2048) == [1024, 512], "14.5 by the median, not 20 before 15"


def test_the_recommended_one_is_first_though_it_scored_below_the_default_once() -> None:
    pairs = ((2048, 10.0), (512, 9.9), (256, 13.0), (1024, 9.0))
    assert picked(*pairs, recommended=512) == [512, 256]


def test_what_broke_a_limit_once_is_none() -> None:
    pairs = ((2048, 10.0), (512, 20.0), (512, None), (1024, 15.0), (256, 30.0))
    assert picked(*pairs, recommended=512, busy=256) == [1024]


def test_nothing_is_left_where_nothing_is_better() -> None:
    assert picked((2048, 10.0), (512, 9.0), recommended=2048) == []


budgets = st.sampled_from((256, 512, 768, 1024, 1536, 2048))


@given(
    pairs=st.lists(st.tuples(budgets, st.none() | st.floats(1.0, 9.0)), max_size=20),
    recommended=budgets,
)
def test_at_most_three_each_once_and_never_the_default(
    pairs: list[tuple[int, float | None]], recommended: int
) -> None:
    found = picked((2048, 5.0), *pairs, recommended=recommended)
    assert len(found) <= 3 and len(set(found)) == len(found) and 2048 not in found
    sound = [budget for budget, _ in pairs if (budget, None) not in pairs]
    assert set(found) <= set(sound)
    if recommended in sound and recommended != 2048:
        assert found[0] == recommended
