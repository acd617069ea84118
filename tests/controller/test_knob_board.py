"""The knob board: hot values now, others after a restart, nothing on a refusal."""

from __future__ import annotations

import pytest

from sparsed.controller.control import KnobSource, KnobState
from sparsed.controller.knob_board import KnobBoard
from sparsed.core import KNOB_SPECS, InputError, Knobs

KNOBS = Knobs(
    token_budget=1024,
    hbm_budget=None,
    max_num_active_seqs=4,
    prefill_chunk=512,
    page_size=32,
    sparse_method="cuboid-mean",
    dense_layers=0,
    max_num_seqs=8,
    kv_hbm_gib=1.0,
    kv_dram_gib=2.0,
    max_model_len=4096,
)


@pytest.fixture
def board() -> KnobBoard:
    return KnobBoard(KNOBS, sources={spec.name: KnobSource.DEFAULT for spec in KNOB_SPECS})


def find(states: tuple[KnobState, ...], name: str) -> KnobState:
    (state,) = (state for state in states if state.spec.name == name)
    return state


def test_a_chunk_that_memory_has_no_room_for_is_refused_whoever_asks() -> None:
    sources = {spec.name: KnobSource.DEFAULT for spec in KNOB_SPECS}
    board = KnobBoard(KNOBS, sources=sources, max_prefill_chunk=1024)
    assert board.resolve({"prefill_chunk": 1024}).knobs.prefill_chunk == 1024
    with pytest.raises(InputError, match="restart with --prefill-chunk 1025") as raised:
        board.resolve({"prefill_chunk": 1025})
    assert raised.value.field == "prefill_chunk"
    with pytest.raises(InputError, match="chunks of 1024 tokens"):
        board.ask(KNOBS.with_values({"prefill_chunk": 2048}))
    assert board.wanted == KNOBS, "it was not asked for"


def test_hot_values_are_for_now_and_others_wait(board: KnobBoard) -> None:
    change = board.resolve({"token_budget": 2048, "page_size": 16})
    assert change.knobs.token_budget == 2048
    assert change.knobs.page_size == 32
    assert change.pending == {"page_size": 16}
    assert find(board.states(), "token_budget").value == 1024  # nothing has happened yet
    board.take(change.knobs)
    board.keep(change.pending)
    budget, page = find(board.states(), "token_budget"), find(board.states(), "page_size")
    assert (budget.value, budget.source) == (2048, KnobSource.LIVE)
    assert (page.value, page.source, page.pending) == (32, KnobSource.DEFAULT, 16)


def test_the_preview_is_what_comes_true(board: KnobBoard) -> None:
    change = board.resolve({"token_budget": 2048, "max_num_seqs": 16})
    preview = board.states(change)
    board.take(change.knobs)
    board.keep(change.pending)
    assert board.states() == preview


def test_a_change_begins_from_what_was_asked_for_last(board: KnobBoard) -> None:
    first = board.resolve({"token_budget": 2048}).knobs
    first_id = board.ask(first)
    second = board.resolve({"prefill_chunk": 64}).knobs
    assert (second.token_budget, second.prefill_chunk) == (2048, 64)
    second_id = board.ask(second)
    assert first_id != second_id and board.wanted == second and board.knobs == KNOBS
    board.answered(second_id)  # refused
    assert board.wanted == first
    board.answered(first_id)
    board.take(first)
    assert board.wanted == board.knobs == first
    board.ask(second)
    board.forget_asked()
    assert board.wanted == first
    board.answered(first_id)  # a late word changes nothing


def test_a_value_that_was_overtaken_is_told(board: KnobBoard) -> None:
    board.take(board.resolve({"token_budget": 2048}).knobs)
    board.check_in_force({"token_budget": "2048", "page_size": 16})
    with pytest.raises(InputError, match="token_budget is 2048: another change") as caught:
        board.check_in_force({"token_budget": 512})
    assert caught.value.field == "token_budget"
    with pytest.raises(InputError, match="hbm_budget is auto"):
        board.check_in_force({"hbm_budget": 4096})


def test_waiting_values_add_up_and_can_be_taken_back(board: KnobBoard) -> None:
    board.keep(board.resolve({"page_size": 16}).pending)
    board.keep(board.resolve({"max_num_seqs": 16}).pending)
    assert board.resolve({"page_size": 32}).pending == {"max_num_seqs": 16}


@pytest.mark.parametrize(
    "values",
    [
        {"max_num_active_seqs": 9},  # above the capacity of now
        {"max_num_seqs": 2},  # the next start would refuse it
        {"page_size": 24},
        {"unheard_of": 1},
    ],
)
def test_a_refusal_changes_nothing(board: KnobBoard, values: dict[str, int]) -> None:
    before = board.states()
    with pytest.raises(InputError) as caught:
        board.resolve(values)
    assert caught.value.field
    assert board.states() == before


def test_what_one_restart_was_told_the_next_is_told_again() -> None:
    sources = {spec.name: KnobSource.DEFAULT for spec in KNOB_SPECS}
    board = KnobBoard(KNOBS, sources=sources | {"page_size": KnobSource.LIVE})
    board.take(KNOBS.with_values({"token_budget": 2048}))  # hot: of this process alone
    assert board.for_next_start({"max_num_seqs": 16}) == {"page_size": 32, "max_num_seqs": 16}
