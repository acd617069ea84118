"""Every message survives the wire unchanged; anything else is refused with a reason."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed import core
from sparsed.core import PAGE_SIZES, Knobs, Shutdown, SparseMethod
from sparsed.engine.wire import Message, WireError, decode, encode

finite = st.floats(allow_nan=False)
int64 = st.integers(min_value=-(2**63), max_value=2**63 - 1)


@st.composite
def knobs(draw: st.DrawFn) -> Knobs:
    num_seqs = draw(st.integers(1, 1024))
    budget = draw(st.integers(512, 8192))
    return Knobs(
        token_budget=budget,
        hbm_budget=draw(st.none() | st.integers(budget, 32768)),
        max_num_active_seqs=draw(st.integers(1, num_seqs)),
        prefill_chunk=draw(st.integers(16, 32768)),
        page_size=draw(st.sampled_from(PAGE_SIZES)),
        sparse_method=draw(st.sampled_from([method.value for method in SparseMethod])),
        dense_layers=draw(st.integers(0, 256)),
        max_num_seqs=num_seqs,
        kv_hbm_gib=draw(st.floats(0.001, 4096)),
        kv_dram_gib=draw(st.floats(0.001, 65536)),
        max_model_len=draw(st.integers(128, 16_777_216)),
    )


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type as it is written in the vocabulary."""
    if hint is Knobs:
        return knobs()
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints = get_type_hints(hint)
        return st.builds(hint, **{name: values(kind) for name, kind in hints.items()})
    if get_origin(hint) is UnionType:
        return st.one_of(*map(values, get_args(hint)))
    if get_origin(hint) is Mapping:
        return st.dictionaries(*map(values, get_args(hint)), max_size=3)
    if get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis:
        return st.lists(values(get_args(hint)[0]), max_size=3).map(tuple)
    if get_origin(hint) is tuple:
        return st.tuples(*map(values, get_args(hint)))
    return {int: int64, float: finite}.get(hint, st.from_type(hint))


@settings(max_examples=30)
@pytest.mark.parametrize("kind", get_args(Message), ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_messages_round_trip(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(values(kind))
    decoded = decode(encode(message))
    assert decoded == message
    assert type(decoded) is kind
    assert repr(decoded) == repr(message)  # equal is not enough: 1 == 1.0, "auto" == Mode.AUTO


def test_no_message_of_the_vocabulary_is_forgotten() -> None:
    section = inspect.getsource(core).split("# Requests and tokens")[1].split("# Telemetry")[0]
    parts = {
        core.SamplingParams,
        core.SparseOptions,
        core.TokenLogprob,
        core.SparseDetails,
        core.TokenOutput,
    }
    known = set(get_args(Message)) | parts
    for name, value in vars(core).items():
        if dataclasses.is_dataclass(value) and f"class {name}:" in section:
            assert value in known, f"{name} is no message of the wire"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "truncated"),
        (b"\x01", "Expected `array`"),
        (encode(Shutdown())[:-1], "truncated"),
        (msgspec.msgpack.encode(("Nonsense", {})), "unknown message 'Nonsense'"),
        (msgspec.msgpack.encode(("EngineSpec", {})), "missing required field `model`"),
        (msgspec.msgpack.encode(("AbortRequest", {"request_id": 7})), "Expected `str`, got `int`"),
    ],
)
def test_other_bytes_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(WireError, match=words):
        decode(data)


@given(message=values(core.ApplyKnobs))
def test_impossible_knobs_are_refused(message: core.ApplyKnobs) -> None:
    good = dataclasses.asdict(message)
    good["knobs"]["page_size"] = 7
    with pytest.raises(WireError, match="page_size=7"):
        decode(msgspec.msgpack.encode(("ApplyKnobs", good)))
