"""Page lists that outlive a step, against a dictionary of what each request selected last."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsed.kernels.keep import keep_pages

HEADS, ROWS, COLUMNS = 2, 5, 9


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[int, list[tuple[int, int, bool]]]]:
    """Of some steps the width, and the row, the count and whether it keeps of each request. A
    request keeps only as many pages as it selected last."""
    counts: dict[int, int] = {}
    found = []
    for _ in range(draw(st.integers(1, 6))):
        rows = draw(st.lists(st.integers(0, ROWS - 1), unique=True, max_size=ROWS))
        requests = []
        for row in rows:
            keeps = counts.get(row, 0) > 0 and draw(st.booleans())
            if not keeps:
                counts[row] = draw(st.integers(0, COLUMNS))
            requests.append((row, counts[row], keeps))
        widest = max((count for _, count, _ in requests), default=0)
        found.append((draw(st.integers(max(1, widest), COLUMNS + 3)), requests))
    return found


@given(steps=steps())
def test_who_keeps_gets_what_it_selected_last(
    steps: list[tuple[int, list[tuple[int, int, bool]]]],
) -> None:
    kept_RHC = torch.full((ROWS, HEADS, COLUMNS), -1, dtype=torch.int32)
    last: dict[int, list[list[int]]] = {}
    numbers = torch.Generator().manual_seed(0)
    for width, requests in steps:
        shape = (len(requests), HEADS, width)
        pages_BHK = torch.randint(0, 1000, shape, generator=numbers, dtype=torch.int32)
        for b, (_, count, keeps) in enumerate(requests):
            pages_BHK[b, :, 0 if keeps else count :] = -1
        before_BHK = pages_BHK.clone()
        columns = torch.tensor(requests, dtype=torch.int32).reshape(-1, 3).T.contiguous()
        rows_B, count_B, keeps_B = columns
        keep_pages(pages_BHK, kept_RHC, rows_B=rows_B, count_B=count_B, keeps_B=keeps_B)
        for b, (row, count, keeps) in enumerate(requests):
            if keeps:
                assert pages_BHK[b, :, :count].tolist() == last[row]
                assert (pages_BHK[b, :, count:] == -1).all()
            else:
                assert torch.equal(pages_BHK[b], before_BHK[b])
                last[row] = before_BHK[b, :, :count].tolist()
