"""What `sparsed tune` leaves behind: figures, a page that asks for nothing, data; and resuming."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparsed.controller.study_report import POLICY, StudyReport, to_plain, write_report
from sparsed.controller.study_resume import LAST, Question, check_space, find_study
from sparsed.core import (
    InputError,
    KnobValue,
    Objective,
    ProfileKey,
    Slo,
    TrialResult,
    TrialStatus,
    Workload,
    WorkloadRequest,
)
from sparsed.db.memory import InMemoryProfileStore
from sparsed.tuner.offline import StudyOutcome

KEY = ProfileKey(hardware="cpu:<b>x</b>", model="m", dtype="float32")
PNG = b"\x89PNG\r\n\x1a\n"


def trial(number: int, arm: str, score: float | None, **values: KnobValue) -> TrialResult:
    return TrialResult(
        number=number,
        arm=arm,
        values=values,
        status=TrialStatus.OK if score else TrialStatus.SLO_BROKEN,
        score=score,
        spread_frac=0.01 if score else None,
        metrics={"output_tokens_per_s": 10.0 + number, "tpot_p95_s": 0.01, "ttft_p95_s": 0.1},
        reason="" if score else "tpot_p95_s <script>",
    )


TRIALS = (
    trial(0, "default", 10.0, token_budget=2048),
    trial(1, "bayes", 12.0, token_budget=1024),
    trial(2, "random", None, token_budget=512),
)
OUTCOME = StudyOutcome(
    default=TRIALS[0],
    best={"default": TRIALS[0], "bayes": TRIALS[1]},
    winner=TRIALS[1],
    reason="accepted: +20 %",
    trials=TRIALS,
)
REPORT = StudyReport(
    study_id=3,
    key=KEY,
    workload="chat: 2 requests",
    objective=Objective.THROUGHPUT,
    slo=Slo(tpot_s=0.05),
    seed=0,
    outcome=OUTCOME,
    importance={"token_budget": 0.9},
    versions={"torch": "2"},
)


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_opens_without_a_network(tmp_path: Path) -> None:
    paths = write_report(REPORT, tmp_path / "new")
    assert [path.name for path in paths] == [
        "pareto.png",
        "importance.png",
        "report.html",
        "result.json",
    ]
    assert all(path.read_bytes().startswith(PNG) for path in paths[:2])
    page = Page()
    page.feed(paths[2].read_text())
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert sum(tag == "b" for tag, _ in page.tags) == 1  # ours: names are escaped
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    assert all(src is not None and src.startswith("data:image/png;base64,") for src in images)
    linked = [a for _, a in page.tags if "href" in a or ("src" in a and a["src"] not in images)]
    assert linked == []
    assert any(attributes.get("content") == POLICY for _, attributes in page.tags)
    for words in ("accepted: +20 %", "cpu:<b>x</b>", "tpot_p95_s <script>", "token_budget=1024"):
        assert words in page.text
    assert "50 ms" in page.text and "Jansen" in page.text


def test_the_data_holds_every_trial(tmp_path: Path) -> None:
    *_, data = write_report(REPORT, tmp_path)
    plain = json.loads(data.read_text())
    assert plain["format_version"] == 1 and plain["unit"] == "tokens/s"
    assert plain["winner"] == {"token_budget": 1024} and plain["default"] == {"token_budget": 2048}
    assert [item["status"] for item in plain["trials"]] == ["ok", "ok", "slo_broken"]
    assert plain["importance"] == {"token_budget": 0.9}
    assert plain.keys() == to_plain(REPORT).keys()


def test_a_study_that_measured_nothing_has_a_report_too(tmp_path: Path) -> None:
    failed = replace(TRIALS[0], score=None, metrics={}, status=TrialStatus.ENGINE_ERROR)
    outcome = StudyOutcome(
        default=failed, best={}, winner=None, reason="it failed", trials=(failed,)
    )
    paths = write_report(replace(REPORT, outcome=outcome, importance={}), tmp_path)
    assert all(path.stat().st_size for path in paths)
    assert json.loads(paths[3].read_text())["winner"] is None


# ---- going on ------------------------------------------------------------------------------

QUESTION = Question(
    key=KEY, workload="chat", objective=Objective.THROUGHPUT, slo=Slo(ttft_s=1.0), seed=1
)
SPACE: dict[str, list[KnobValue]] = {"token_budget": [2048, None, 512, 2048]}


def begun(store: InMemoryProfileStore) -> int:
    requests = (WorkloadRequest(arrival_s=0.0, input_tokens=8, output_tokens=4),)
    return store.start_study(
        KEY,
        workload=Workload(name="chat", requests=requests),
        objective=Objective.THROUGHPUT,
        slo=Slo(ttft_s=1.0),
        seed=1,
        space=SPACE,
        versions={},
        started_at=0.0,
    )


def test_a_study_is_found_by_its_number_and_as_the_last() -> None:
    store = InMemoryProfileStore()
    first, second = begun(store), begun(store)
    assert find_study(store, str(first), question=QUESTION).study_id == first
    assert find_study(store, LAST, question=QUESTION).study_id == second
    check_space(store.get_study(first), dict(SPACE))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key": replace(KEY, hardware="gpu:H100")}, "hardware cpu:.*, now gpu:H100"),
        ({"key": replace(KEY, model="n")}, "model m, now n"),
        ({"key": replace(KEY, dtype="bfloat16")}, "dtype float32, now bfloat16"),
        ({"workload": "mixed"}, "workload chat, now mixed"),
        ({"objective": Objective.LATENCY}, "objective throughput, now latency"),
        ({"slo": Slo()}, r"targets TTFT 1\.0 s.*now TTFT None"),
        ({"seed": 2}, "seed 1, now 2"),
    ],
)
def test_another_question_is_refused_with_what_differs(changes: dict[str, Any], words: str) -> None:
    store = InMemoryProfileStore()
    number = begun(store)
    question = replace(QUESTION, **changes)
    with pytest.raises(InputError, match=words) as caught:
        find_study(store, str(number), question=question)
    assert caught.value.field == "resume"
    with pytest.raises(InputError, match="leave --resume out"):
        find_study(store, LAST, question=question)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"token_budget": [2048, None, 512]}, "token_budget"),
        ({}, r"now None"),
        (SPACE | {"page_size": [32, None, 16]}, r"page_size None, now \[32"),
    ],
)
def test_another_space_is_refused(space: Mapping[str, list[KnobValue]], words: str) -> None:
    store = InMemoryProfileStore()
    with pytest.raises(InputError, match=words):
        check_space(store.get_study(begun(store)), space)


def test_a_study_of_an_earlier_version_is_refused() -> None:
    store = InMemoryProfileStore()
    study = replace(store.get_study(begun(store)), space=None)
    with pytest.raises(InputError, match="did not keep its search space"):
        check_space(study, SPACE)


@pytest.mark.parametrize("resume", ["", "x", "-1", "99"])
def test_what_is_no_study_is_refused(resume: str) -> None:
    store = InMemoryProfileStore()
    begun(store)
    with pytest.raises(InputError) as caught:
        find_study(store, resume, question=QUESTION)
    assert caught.value.field == "resume"
