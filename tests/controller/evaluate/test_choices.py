"""Choices as they are written: what is read, what is refused, and that both forms agree."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsed.controller.evaluate.choices import (
    TAKES,
    cross,
    parse_choice,
    parse_share,
)
from sparsed.core import (
    MEAN_KEY,
    PAGE_SIZES,
    BudgetRule,
    Choice,
    GroupRule,
    InputError,
    MetadataFormat,
    RankMethod,
    format_share,
)

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "benchmarking.md"


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("cuboid-mean", Choice(method=RankMethod.CUBOID_MEAN)),
        ("mean-key", MEAN_KEY),
        ("mean-key:kept_dims=16,share=1/8", replace(MEAN_KEY, kept_dims=16, share=1 / 8)),
        (" oracle ", Choice(method=RankMethod.ORACLE)),
        ("mean:share=1/4", Choice(method=RankMethod.MEAN, share=0.25)),
        ("mean:share=1", Choice(method=RankMethod.MEAN, share=1.0)),
        (
            "mean:page_size=16,group_rule=softmax-sum,metadata=int4,kept_dims=32",
            Choice(
                method=RankMethod.MEAN,
                page_size=16,
                group_rule=GroupRule.SOFTMAX_SUM,
                metadata=MetadataFormat.INT4,
                kept_dims=32,
            ),
        ),
        (
            "quest: super_pages=8, coarse=2.5, budgets=head, dense_layers=2, grain=8",
            Choice(
                method=RankMethod.QUEST,
                super_pages=8,
                coarse=2.5,
                budgets=BudgetRule.HEAD,
                dense_layers=2,
                grain=8,
            ),
        ),
        (
            "variance:variance_weight=1,estimated=1/8,sink_pages=0,recent_pages=2",
            Choice(
                method=RankMethod.VARIANCE,
                variance_weight=1.0,
                estimated=0.125,
                sink_pages=0,
                recent_pages=2,
            ),
        ),
    ],
)
def test_what_is_read(text: str, choice: Choice) -> None:
    assert parse_choice(text) == (choice, "share" in text)


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("median", "method", "method=median: allowed: one of dense, oracle"),
        ("", "method", "allowed: one of dense"),
        ("medial", "method", "gate, mean-key"),
        ("mean:", "choice", "unknown key ''"),
        ("mean:pages=16", "choice", "unknown key 'pages'; allowed: share, page_size"),
        ("mean:method=quest", "choice", "unknown key 'method'"),
        ("mean:share", "share", "share has no value"),
        ("mean:share=", "share", "share has no value"),
        ("mean:share=0", "share", "share=0.0: allowed: more than 0, at most 1"),
        ("mean:share=3/2", "share", "share=1.5: allowed"),
        ("mean:share=1/0", "share", "share=1/0: allowed: numbers"),
        ("mean:share=nan", "share", "share=nan: allowed: numbers"),
        ("mean:share=1/8,share=1/4", "share", "share is given twice"),
        ("mean:page_size=24", "page_size", "page_size=24: allowed: one of 8, 16, 32, 64, 128"),
        ("mean:page_size=-8", "page_size", "page_size=-8: allowed: whole numbers"),
        ("mean:page_size=1.5", "page_size", "allowed: whole numbers"),
        ("mean:page_size=²", "page_size", "allowed: whole numbers"),
        ("mean:grain=2", "grain", "grain=2: allowed: powers of two from 4"),
        ("mean:grain=12", "grain", "grain=12: allowed"),
        ("mean:grain=64", "grain", "grain=64 is more than page_size=32"),
        ("mean:group_rule=vote", "group_rule", "allowed: one of mean, max, softmax-sum"),
        ("mean:metadata=int2", "metadata", "metadata=int2: allowed: one of fp32, bf16"),
        ("mean:kept_dims=0", "kept_dims", "kept_dims=0: allowed: 1 or more"),
        ("mean:budgets=lane", "budgets", "allowed: one of equal, layer, head"),
        ("mean:super_pages=6", "super_pages", "allowed: 0 or a power of two"),
        ("mean:super_pages=4,coarse=0.5", "coarse", "coarse=0.5: allowed: 1 or more"),
        ("mean:estimated=2", "estimated", "allowed: from 0 to 1"),
        ("variance:variance_weight=-1", "variance_weight", "allowed: 0 or more"),
        ("mean:variance_weight=1", "variance_weight", "take one that does: variance"),
        ("mean-key:variance_weight=1", "variance_weight", "mean takes no variance_weight"),
        ("dense:share=1/2", "share", "dense takes no share; leave it out"),
        ("mean:coarse=2", "coarse", "does nothing without super_pages; give super_pages=16"),
        ("mean:coarse=2,super_pages=0", "coarse", "does nothing without super_pages"),
    ],
)
def test_what_is_refused(text: str, field: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_choice(text)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"--choice {text!r}: ")
    assert caught.value.field == field


def positive(most: float) -> st.SearchStrategy[float]:
    return st.floats(min_value=1e-6, max_value=most)


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    page_size = draw(st.sampled_from(PAGE_SIZES))
    grains = [size for size in (4, *PAGE_SIZES) if size <= page_size]
    method = draw(st.sampled_from(RankMethod))
    super_pages = draw(st.sampled_from([0, 1, 2, 16, 64]))
    values = {
        "share": draw(positive(1) | st.integers(1, 512).map(lambda n: 1 / n)),
        "page_size": page_size,
        "grain": draw(st.sampled_from([None, *grains])),
        "group_rule": draw(st.sampled_from(GroupRule)),
        "metadata": draw(st.sampled_from(MetadataFormat)),
        "kept_dims": draw(st.none() | st.integers(1, 256)),
        "variance_weight": draw(st.floats(0, 1e6)),
        "budgets": draw(st.sampled_from(BudgetRule)),
        "dense_layers": draw(st.integers(0, 80)),
        "super_pages": super_pages,
        "coarse": draw(st.floats(1, 1e6)) if super_pages else 4.0,
        "estimated": draw(st.just(0.0) | positive(1)),
        "sink_pages": draw(st.integers(0, 9)),
        "recent_pages": draw(st.integers(0, 9)),
    }
    return Choice(method=method, **{key: values[key] for key in values.keys() & TAKES[method]})


@given(choices() | st.floats(0.001, 1).map(lambda share: replace(MEAN_KEY, share=share)))
def test_what_is_written_is_read_back(choice: Choice) -> None:
    has_share = choice.method is not RankMethod.DENSE
    assert parse_choice(str(choice)) == (choice, has_share)
    assert parse_choice(choice.written(share=False)) == (replace(choice, share=1 / 16), False)


def test_names() -> None:
    assert str(MEAN_KEY) == "mean-key:share=1/16"
    assert MEAN_KEY.written(share=False) == "mean-key"
    other = replace(MEAN_KEY, kept_dims=32)
    keys = "page_size=8,group_rule=softmax-sum,metadata=int4,kept_dims=32,recent_pages=8"
    assert str(other) == f"mean:share=1/16,{keys}"


VALUES = {  # other than the defaults
    "share": "1/4",
    "page_size": "8",
    "grain": "8",
    "group_rule": "max",
    "metadata": "int4",
    "kept_dims": "4",
    "variance_weight": "3",
    "budgets": "head",
    "dense_layers": "1",
    "super_pages": "2",
    "coarse": "1",
    "estimated": "1/4",
    "sink_pages": "3",
    "recent_pages": "4",
}


@pytest.mark.parametrize(("method", "key"), list(product(RankMethod, VALUES)))
def test_a_key_without_effect_is_refused(method: RankMethod, key: str) -> None:
    text = f"{method}:{key}={VALUES[key]}" + ",super_pages=2" * (key == "coarse")
    if key in TAKES[method]:
        assert getattr(parse_choice(text).choice, key) != getattr(Choice(method=method), key)
        return
    with pytest.raises(InputError, match=f"{method} takes no {key}; leave it out") as caught:
        parse_choice(text)
    assert caught.value.field == key
    takers = str(caught.value).partition("does: ")[2].split(", ")
    assert takers == [other for other in RankMethod if key in TAKES[other]]


def test_shares_in_words() -> None:
    assert [format_share(x) for x in (1 / 16, 1.0, 1 / 3, 0.375)] == ["1/16", "1", "1/3", "3/8"]
    assert parse_share("1/16") == parse_share(" .0625 ") == 1 / 16
    for wrong in ("0", "2", "-1", "x", "1/", "", "inf", "1/2/4"):
        with pytest.raises(InputError, match="--share"):
            parse_share(wrong)


def test_a_share_of_its_own_is_not_crossed() -> None:
    given = [parse_choice(text) for text in ("dense", "mean", "quest:share=1/2", "mean")]
    assert cross(given, [1 / 8, 1 / 4]) == (
        Choice(method=RankMethod.MEAN, share=1 / 8),
        Choice(method=RankMethod.MEAN, share=1 / 4),
        Choice(method=RankMethod.QUEST, share=1 / 2),
    )


def test_the_guide_names_every_method_and_key() -> None:
    text = GUIDE.read_text()
    keys = [item.name for item in fields(Choice) if item.name != "method"]
    missing = [name for name in (*RankMethod, *keys) if f"`{name}`" not in text]
    assert missing == []


def test_the_guide_tells_who_takes_what() -> None:
    rows = re.findall(
        r"^\| `(\w+)`[^|]*\|[^|]*\|[^|]*\| ([^|]+) \|$", GUIDE.read_text(), re.MULTILINE
    )
    told = dict(rows)
    told["recent_pages"] = told["sink_pages"]
    for key in VALUES:
        named = set(re.findall(r"`([a-z-]+)`", told[key]))
        others = set(RankMethod) - {RankMethod.DENSE}
        takers = named if told[key].startswith("all but") else others - named
        assert takers == {method for method in RankMethod if key in TAKES[method]}, key
    assert VALUES.keys() == {item.name for item in fields(Choice)} - {"method"}
