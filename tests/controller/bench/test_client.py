"""Times and failures of single requests, against a server whose delays are known."""

from __future__ import annotations

import asyncio
import socket
import time
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from sparsed.controller.bench.client import LoadOptions, LoadResult, PreparedRequest, run_load
from sparsed.controller.bench.connection import parse_server
from sparsed.controller.bench.records import RequestRecord, Usage
from sparsed.controller.bench.token_stream import StreamFailed, TokenStream, error_message
from sparsed.core import InputError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# How much later than it was sent a chunk may be seen; machines with two cores are busy at times.
SLACK_S = 0.25


def prepared(
    number: int, *, arrival_s: float = 0.0, max_tokens: int = 6, num_prompt: int = 3
) -> PreparedRequest:
    record = RequestRecord(
        number=number, arrival_s=arrival_s, input_tokens=num_prompt, max_tokens=max_tokens
    )
    body = {"prompt": [7] * num_prompt, "max_tokens": max_tokens}
    return PreparedRequest(record=record, body=msgspec.json.encode(body))


def load(
    url: str, requests: Sequence[PreparedRequest], *, path: str = COMPLETIONS, **more: Any
) -> LoadResult:
    options = LoadOptions(server=parse_server(url), path=path, **({"timeout_s": 20.0} | more))
    return asyncio.run(run_load(requests, options=options))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("is_chunked", [True, False])
def test_known_delays_are_found_again(
    server: Any, make_script: Any, path: str, is_chunked: bool
) -> None:
    server.default = make_script(first_s=0.2, gap_s=0.03, is_chunked=is_chunked)
    start_s = time.perf_counter()
    (record,) = load(server.url, [prepared(0)], path=path).records
    (sent_s,) = server.sent_s
    assert record.error is None, record.detail
    assert record.sent_s is not None and record.ttft_s is not None
    assert 0.2 <= record.ttft_s <= 0.2 + SLACK_S
    assert record.tpot_s == pytest.approx((sent_s[-1] - sent_s[0]) / 5, abs=SLACK_S / 5)
    assert len(record.chunks_s) == len(sent_s) == 6
    assert sum(record.itl_s) == pytest.approx(sent_s[-1] - sent_s[0], abs=SLACK_S)
    assert record.ended_s is not None and record.ended_s <= time.perf_counter() - start_s
    assert record.usage == Usage(prompt_tokens=3, completion_tokens=6, cached_tokens=1)


def test_tokens_are_counted_as_the_server_says_or_by_chunks(server: Any, make_script: Any) -> None:
    server.scripts = [
        make_script(tokens_per_chunk=3, gap_s=0.01),
        make_script(tokens_per_chunk=3, gap_s=0.01, has_usage=False),
    ]
    requests = [prepared(0), prepared(1, arrival_s=0.2)]
    told, guessed = load(server.url, requests).records
    assert (told.output_tokens, len(told.chunks_s)) == (6, 2)
    assert (guessed.output_tokens, guessed.prompt_tokens) == (2, 3)


@pytest.mark.parametrize(
    ("script", "kind", "detail"),
    [
        ({"status": 503}, "http_503", "status 503, as told"),
        ({"status": 400}, "http_400", "as told"),
        ({"ending": "cut"}, "disconnected", "the server closed the connection"),
        ({"ending": "close"}, "disconnected", "the server closed the connection"),
        ({"ending": "no-end"}, "disconnected", "without a finish reason"),
        ({"ending": "error"}, "stream_error", "out of frames"),
        ({"ending": "garbage"}, "bad_answer", ""),
        ({"ending": "not-http"}, "bad_answer", "SSH"),
        ({"ending": "no-end", "num_tokens": 0}, "bad_answer", "no token"),
        ({"ending": "hang"}, "timeout", ""),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_failures_have_their_kind_and_harm_nobody_else(
    server: Any, make_script: Any, script: dict[str, Any], kind: str, detail: str
) -> None:
    server.scripts = [make_script(), make_script(**script), make_script()]
    requests = [prepared(number, arrival_s=0.1 * number) for number in range(3)]
    result = load(server.url, requests, timeout_s=1.5)
    before, failed, after = result.records
    assert before.error is after.error is None
    assert failed.error == kind
    assert detail in failed.detail
    if "ending" in script and "num_tokens" not in script and kind != "bad_answer":
        assert len(failed.chunks_s) == (0 if script["ending"] == "close" else 6)


def test_nobody_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        (record,) = load(url, [prepared(0)]).records
    assert record.error == "connect"


def test_requests_are_sent_when_they_are_due(server: Any) -> None:
    requests = [prepared(number, arrival_s=0.1 * number) for number in range(5)]
    for record in load(server.url, requests).records:
        assert record.sent_s is not None
        assert record.arrival_s <= record.sent_s <= record.arrival_s + SLACK_S


def test_concurrency_is_bounded(server: Any, make_script: Any) -> None:
    server.default = make_script(first_s=0.05)
    result = load(server.url, [prepared(number) for number in range(9)], max_concurrency=3)
    assert all(record.is_complete for record in result.records)
    assert server.max_open == 3
    late_s = [record.sent_s or 0.0 for record in result.records]
    assert max(late_s) >= 0.1
    assert all((record.ttft_s or 0.0) < 0.05 + SLACK_S for record in result.records)


@pytest.mark.slow
def test_hundreds_of_streams(server: Any, make_script: Any) -> None:
    server.default = make_script(first_s=0.5, gap_s=0.05)
    requests = [prepared(number, max_tokens=20) for number in range(250)]
    result = load(server.url, requests)
    assert [record.error for record in result.records] == [None] * 250
    assert server.max_open > 200
    assert all(len(record.chunks_s) == 20 for record in result.records)
    assert result.lags_s


def test_a_cancelled_run_keeps_what_it_has(server: Any, make_script: Any) -> None:
    server.scripts = [make_script(), make_script(gap_s=10.0)]
    requests = [prepared(0), prepared(1, arrival_s=0.1), prepared(2, arrival_s=60.0)]

    async def run() -> LoadResult:
        options = LoadOptions(server=parse_server(server.url), path=COMPLETIONS, timeout_s=20.0)
        task = asyncio.create_task(run_load(requests, options=options))
        await asyncio.sleep(0.6)
        task.cancel()
        return await task

    result = asyncio.run(run())
    assert result.is_interrupted
    complete, cut_off, unsent = result.records
    assert [record.error for record in result.records] == [None, "interrupted", "interrupted"]
    assert complete.is_complete
    assert cut_off.sent_s is not None and len(cut_off.chunks_s) == 1
    assert unsent.sent_s is None


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, ""),
        ("localhost:9", "localhost", 9, ""),
        ("http://gpu.example/v1/", "gpu.example", 80, ""),
        ("https://example.org/openai/v1", "example.org", 443, "/openai"),
        ("http://[::1]:8000", "::1", 8000, ""),
    ],
)
def test_urls(url: str, host: str, port: int, path: str) -> None:
    found = parse_server(url)
    assert (found.host, found.port, found.base_path) == (host, port, path)
    assert (found.tls is not None) is url.startswith("https")


@pytest.mark.parametrize("url", ["http://me:p%40ss@host:8000/v1", "me:p%40ss@host:8000"])
def test_a_user_in_the_url_is_sent_and_not_shown(url: str) -> None:
    found = parse_server(url)
    assert (found.host, found.port) == ("host", 8000)
    assert found.headers == {"Authorization": f"Basic {b64encode(b'me:p@ss').decode()}"}
    assert "***@host:8000" in found.url
    assert "p%40ss" not in repr(found)
    with pytest.raises(InputError, match="one of them"):
        parse_server(url, api_key="key")
    with pytest.raises(InputError) as caught:
        parse_server(url + "?a=1")
    assert "p%40ss" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "ftp://host", "http://", "http://host:port", "http://h/?a=1"])
def test_bad_urls_are_named(url: str) -> None:
    with pytest.raises(InputError, match="--url"):
        parse_server(url)


def test_a_key_that_no_header_holds_is_refused_and_not_told() -> None:
    with pytest.raises(InputError, match="--api-key") as caught:
        parse_server("http://host", api_key="secret\r\nX: y")
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(parse_server("http://host", api_key="secret"))


class TestTokenStream:
    def test_events_may_be_cut_anywhere(self) -> None:
        whole = (
            b': comment\r\n\r\ndata: {"choices": [{"text": "a"}]}\r\n\r\n'
            b'data:{"choices": [{"text": "", "finish_reason": null}]}\n\n'
            b'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n'
            b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}\n\n'
            b"data: [DONE]\n\n"
        )
        for size in (1, 7, len(whole)):
            stream = TokenStream()
            for start in range(0, len(whole), size):
                stream.feed(whole[start : start + size], at_s=float(start + size))
            assert len(stream.chunks_s) == 2  # the finish reason alone is no token
            assert stream.last_s is not None and stream.last_s >= stream.chunks_s[-1]
            assert stream.usage == Usage(prompt_tokens=5, completion_tokens=3)
            assert stream.is_complete

    @pytest.mark.parametrize(
        ("delta", "count"),
        [
            ('{"role": "assistant", "content": ""}', 0),
            ('{"role": "assistant", "content": "a"}', 1),
            ('{"role": "assistant"}', 0),
            ('{"content": ""}', 1),
            ('{"reasoning_content": "hm", "content": null}', 1),
            ('{"reasoning": "hm"}', 1),
            ("{}", 0),
        ],
    )
    def test_which_deltas_of_a_chat_are_tokens(self, delta: str, count: int) -> None:
        stream = TokenStream()
        stream.feed(b'data: {"choices": [{"delta": %s}]}\n' % delta.encode(), at_s=1.0)
        assert len(stream.chunks_s) == count
        assert stream.first_s == (1.0 if count else None)

    def test_errors_in_the_stream(self) -> None:
        with pytest.raises(StreamFailed, match="out of memory"):
            TokenStream().feed(b'data: {"error": {"message": "out of memory"}}\n', at_s=0.0)
        TokenStream().feed(b'data: {"error": null, "choices": null}\n', at_s=0.0)

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b'{"error": {"message": "m"}}', "m"),
            (b'{"error": "m"}', "m"),
            (b'{"detail": "m"}', "m"),
            (b"<html>", "<html>"),
            (b"\xff", "\ufffd"),
            (b"", ""),
        ],
    )
    def test_the_message_of_an_error(self, body: bytes, message: str) -> None:
        assert error_message(body) == message


def test_records_of_a_run_keep_the_order_of_the_plan(server: Any, make_script: Any) -> None:
    server.scripts = [make_script(first_s=0.2), make_script()]
    requests = [prepared(0), prepared(1, arrival_s=0.05)]
    result = load(server.url, requests)
    plain = [replace(record, usage=None).number for record in result.records]
    assert plain == [0, 1]
    assert (result.records[0].ended_s or 0) > (result.records[1].ended_s or 0)
