"""What must not happen while a graph is recorded."""

from __future__ import annotations

import gc

from sparsed.engine.recorder import _uncollected


def test_nothing_is_collected_within_and_the_collector_comes_back() -> None:
    assert gc.isenabled()
    with _uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with _uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
