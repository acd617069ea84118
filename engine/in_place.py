"""Whether requests that are wholly hot attend to all their tokens in place, or select.

Selecting reads less, and takes a time of its own to rank, select and look up in every layer: for
few or short requests more than it saves. Free of torch.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from sparsed.engine.step_graphs import GraphKey

MARGIN: Final = 0.03  # of a step's attention that another way must save before it is taken


class Overhead(NamedTuple):
    """Seconds that a step of padding takes longer if it selects, with ``few`` and with ``many``
    full pages a request."""

    few_pages: int
    few_s: float
    many_pages: int
    many_s: float

    def at(self, pages: float) -> float:
        """With so many full pages a request, on the line through both."""
        slope = (self.many_s - self.few_s) / max(1, self.many_pages - self.few_pages)
        return max(0.0, self.few_s + slope * (pages - self.few_pages))


class InPlaceRule:
    """``token_bytes`` of K and V of a token in all layers, ``summary_bytes`` of a page in all
    layers; ``bytes_per_s`` of a copy in device memory.

    It stays with what it has chosen until the other way saves more than a margin. One thread.
    """

    def __init__(
        self,
        *,
        token_bytes: int,
        summary_bytes: float,
        page_size: int,
        bytes_per_s: float,
    ) -> None:
        assert bytes_per_s > 0
        self._overheads: dict[GraphKey, Overhead] = {}
        self._token_s = token_bytes / bytes_per_s
        self._summary_s = summary_bytes / bytes_per_s
        self._page_size = page_size
        self._in_place = True

    def learn(self, key: GraphKey, overhead: Overhead) -> None:
        """Of steps that are this graph; what was known of it before is forgotten."""
        self._overheads[key] = overhead

    def choose(self, key: GraphKey, *, num_selecting: int, tokens: int, selected: int) -> bool:
        """Whether in place is the better way for a step that would else be the graph ``key``, of
        requests of which ``num_selecting`` have ``tokens`` in all and would read ``selected`` of
        them. They select where nothing like it is known."""
        overhead = self._overhead_of(key)
        if overhead is None:
            return False
        pages = tokens / self._page_size
        select_s = overhead.at(pages / max(1, num_selecting))
        select_s += selected * self._token_s + pages * self._summary_s
        in_place_s = tokens * self._token_s
        mine, other = (in_place_s, select_s) if self._in_place else (select_s, in_place_s)
        if other < (1 - MARGIN) * mine:
            self._in_place = not self._in_place
        return self._in_place

    def _overhead_of(self, key: GraphKey) -> Overhead | None:
        """Until a graph is there and timed, as of the one nearest to it."""
        if key in self._overheads:
            return self._overheads[key]
        like = [known for known in self._overheads if known.in_place == key.in_place]
        if not like:
            return None
        nearest = min(like, key=lambda k: (abs(k.size - key.size), abs(k.pages - key.pages)))
        return self._overheads[nearest]
