from dataclasses import replace
from typing import Any

import pytest

from sparsed.core import AddRequest, FinishReason, SparseMode
from sparsed.engine.models.config import GenerationDefaults
from sparsed.engine.models.dummy import dummy_config

pytestmark = pytest.mark.anyio
PATH = "/v1/completions"


async def test_whole_answer(open_edge: Any, engine: Any) -> None:
    async with open_edge() as edge:
        answer = await edge.post(PATH, model="tiny", prompt="Say", max_tokens=5)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "length"}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
        "sparse_details": {
            "method": "quest",
            "token_budget": 1024,
            "decode_steps": 4,
            "sparse_steps": 2,
            "tokens_read": 300,
            "tokens_dense": 400,
            "coverage": 0.9,
            "replayed": False,
        },
    }
    assert engine.received[0].prompt_tokens == tuple(b"Say")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [b"ab"]),
        ([97, 98], [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
    ],
)
async def test_forms_of_prompts(
    prompt: object, expected: list[bytes], open_edge: Any, engine: Any
) -> None:
    async with open_edge() as edge:
        answer = await edge.post(PATH, prompt=prompt, max_tokens=2, echo=True)
    assert [bytes(request.prompt_tokens) for request in engine.received] == expected
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [item.decode() + "He" for item in expected]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_stream_equals_whole_answer(open_edge: Any, engine: Any) -> None:
    engine.text = "Größe 🙂 東京"
    async with open_edge() as edge:
        whole = await edge.post(PATH, prompt="x", echo=True)
        events = await edge.events(
            PATH, prompt="x", echo=True, stream_options={"include_usage": True}
        )
    *chunks, last = events
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "x" + engine.text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (
        len(chunks) - 1
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert not any("usage" in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in events}) == 1


async def test_usage_in_every_chunk(open_edge: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with open_edge() as edge:
        events = await edge.events(PATH, prompt="x", max_tokens=3, stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]


async def test_choices_have_their_own_seed_and_text(open_edge: Any, engine: Any) -> None:
    engine.text = lambda request: f"seed {request.sampling.seed}"
    async with open_edge() as edge:
        answer = await edge.post(PATH, prompt=["a", "b"], n=2, best_of=2, seed=2**63 - 1)
        events = await edge.events(PATH, prompt=["a", "b"], n=2, seed=5)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [f"seed {2**63 - 1}", "seed 0"] * 2
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["sparse_details"]["tokens_read"] == 1200
    streamed = ["", "", "", ""]
    for event in events:
        streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert streamed == ["seed 5", "seed 6"] * 2


async def test_scoring_as_evaluation_clients_do(open_edge: Any, engine: Any) -> None:
    """Token lists, echo and logprobs: offsets count characters, tokens carry the prompt's."""
    body = {"prompt": [list(b"abc")], "echo": True, "logprobs": 1, "temperature": 0}
    async with open_edge() as edge:
        scored = await edge.post(PATH, **body, max_tokens=0)
        drawn = await edge.post(PATH, **body, max_tokens=1)
    assert scored["choices"] == [
        {
            "index": 0,
            "text": "abc",
            "finish_reason": "length",
            "logprobs": {
                "tokens": ["a", "b", "c"],
                "token_logprobs": [None, -0.5, -1.5],
                "top_logprobs": [None, {"b": -0.5}, {"X": -0.5, "c": -1.5}],
                "text_offset": [0, 1, 2],
            },
        }
    ]
    assert scored["usage"]["completion_tokens"] == 0
    assert engine.received[0].sampling.max_tokens == 1
    assert engine.received[0].sampling.prompt_logprobs == 1
    assert drawn["choices"][0]["text"] == "abcH"
    assert drawn["choices"][0]["logprobs"]["tokens"] == ["a", "b", "c", "H"]
    assert drawn["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5, -1.5, -0.5]


async def test_logprobs_run_on_through_a_stream(open_edge: Any, engine: Any) -> None:
    engine.text = "é!"
    async with open_edge() as edge:
        events = await edge.events(PATH, prompt="a", logprobs=2, echo=True)
    parts = [event["choices"][0]["logprobs"] for event in events]
    tokens = [token for part in parts for token in part["tokens"]]
    assert tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert [offset for part in parts for offset in part["text_offset"]] == [0, 1, 1, 2]
    assert parts[-1]["top_logprobs"] == [{"X": -0.5, "bytes:\\xe2": -1.0, "!": -1.5}]


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_ends_the_request(stream: bool, open_edge: Any, engine: Any) -> None:
    async def text(**body: object) -> tuple[str, str]:
        if not stream:
            answer = await edge.post(PATH, prompt="x", **body)
            assert answer["usage"]["sparse_details"]["decode_steps"] == 4
            return answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
        choices = [event["choices"][0] for event in await edge.events(PATH, prompt="x", **body)]
        return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]

    async with open_edge() as edge:
        assert await text(stop=["lo, w", "never"]) == ("Hel", "stop")
        assert await text(stop="o", include_stop_str_in_output=True) == ("Hello", "stop")
        assert len(engine.aborted) == 2


async def test_stop_tokens(open_edge: Any, engine: Any) -> None:
    engine.text, engine.finish_reason = "Hi!", FinishReason.STOP
    model = dummy_config("dummy:tiny")
    async with open_edge(model=replace(model, eos_token_ids=(33, 500))) as edge:
        hidden = await edge.post(PATH, prompt="x", stop_token_ids=[7])
        shown = await edge.post(PATH, prompt="x", include_stop_str_in_output=True)
        await edge.post(PATH, prompt="x", ignore_eos=True)
    assert hidden["choices"][0]["text"] == "Hi"
    assert hidden["choices"][0]["finish_reason"] == "stop"
    assert hidden["usage"]["completion_tokens"] == 3
    assert shown["choices"][0]["text"] == "Hi!"
    sampling = [request.sampling for request in engine.received]
    assert [item.stop_token_ids for item in sampling] == [(7, 33, 500), (33, 500), ()]
    assert [item.ignore_eos for item in sampling] == [False, False, True]


async def test_sampling_fields_reach_the_engine(open_edge: Any, engine: Any) -> None:
    async with open_edge() as edge:
        await edge.post(
            PATH,
            prompt="x",
            max_tokens=9,
            temperature=0.5,
            top_p=0.25,
            top_k=-1,
            min_p=0.125,
            seed=3,
            repetition_penalty=1.5,
            presence_penalty=-1,
            frequency_penalty=2,
            logit_bias={"65": -100, "511": 1.5},
            logprobs=0,
            sparse={"mode": "auto", "token_budget": 512},
        )
    request: AddRequest = engine.received[0]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (9, 0.5, 0.25)
    assert (sampling.top_k, sampling.min_p, sampling.seed) == (0, 0.125, 3)
    assert sampling.repetition_penalty == 1.5
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 2)
    assert sampling.logit_bias == ((65, -100), (511, 1.5))
    assert (sampling.logprobs, sampling.prompt_logprobs) == (0, None)
    assert (request.sparse.mode, request.sparse.token_budget) == (SparseMode.AUTO, 512)


async def test_model_defaults_unless_the_body_says_otherwise(open_edge: Any, engine: Any) -> None:
    defaults = GenerationDefaults(temperature=0.2, top_p=0.8, top_k=20, max_new_tokens=50)
    model = replace(dummy_config("dummy:tiny"), generation=defaults)
    async with open_edge(model=model) as edge:
        await edge.post(PATH, prompt="x")
        await edge.post(PATH, prompt="x", temperature=0, top_k=0, max_tokens=60)
    first, second = (request.sampling for request in engine.received)
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens) == (0.2, 0.8, 20, 50)
    assert (second.temperature, second.top_p, second.top_k, second.max_tokens) == (0, 0.8, 0, 60)


async def test_default_length_is_the_room_left(open_edge: Any, engine: Any) -> None:
    async with open_edge() as edge:
        await edge.post(PATH, prompt="x" * 990)
    assert engine.received[0].sampling.max_tokens == 10
