"""Exported texts, word for word, and their way back."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.core import InputError, Objective, Profile, ProfileKey, ProfileStatus
from sparsed.tuner.export import (
    DeviceMemory,
    mismatch,
    parse_profile,
    render_profile,
    sglang_flags,
    vllm_flags,
)

PROFILE = Profile(
    key=ProfileKey(hardware='gpu:NVIDIA "H100":80GiB', model="org/m-8b", dtype="bfloat16"),
    values={
        "page_size": 16,
        "token_budget": 1024,
        "hbm_budget": None,
        "max_num_active_seqs": 24,
        "prefill_chunk": 2048,
    },
    status=ProfileStatus.VERIFIED,
    workload="chat",
    objective=Objective.THROUGHPUT,
    default_scores=(10.0, 11.0),
    winner_scores=(12.1, 12.0),
    versions={"torch": "2.13.0", "an odd name": "1"},
    created_at=1.5e9,
    pinned=True,
    profile_id=7,
)
MEMORY = DeviceMemory(device_bytes=80, weights_bytes=16, workspace_bytes=6, kv_bytes=50)
HEADER = """\
# sparsed profile 7 (verified), throughput on chat: +10.0% over the default
# tuned on gpu:NVIDIA "H100":80GiB for org/m-8b, bfloat16
"""
LOSSES = """\
# flag names change between versions: compare with --help of the installed one
# the gain was measured with sparsed, and says nothing about this engine
# lost, no counterpart for a densely trained model: token_budget, hbm_budget
"""
TOML = f"""\
{HEADER}config_version = 1
page_size = 16
token_budget = 1024
hbm_budget = "auto"
max_num_active_seqs = 24
prefill_chunk = 2048

# Where the values come from; a start elsewhere says what differs.
[tuned_for]
hardware = "gpu:NVIDIA \\"H100\\":80GiB"
model = "org/m-8b"
dtype = "bfloat16"
status = "verified"
workload = "chat"
objective = "throughput"
default_scores = [10.0, 11.0]
winner_scores = [12.1, 12.0]
created_at = 1500000000.0
[tuned_for.versions]
torch = "2.13.0"
"an odd name" = "1"
"""
VLLM = f"""\
{HEADER}{LOSSES}vllm serve org/m-8b \\
  --dtype bfloat16 \\
  --block-size 16 \\
  --max-num-seqs 24 \\
  --max-num-batched-tokens 2072 \\
  --gpu-memory-utilization 0.9
"""
VLLM_YAML = f"""\
{HEADER}{LOSSES}model: "org/m-8b"
dtype: "bfloat16"
block-size: 16
max-num-seqs: 24
max-num-batched-tokens: 2072
gpu-memory-utilization: 0.9
"""
SGLANG = f"""\
{HEADER}{LOSSES}python -m sglang.launch_server --model-path org/m-8b \\
  --dtype bfloat16 \\
  --page-size 16 \\
  --max-running-requests 24 \\
  --chunked-prefill-size 2048 \\
  --mem-fraction-static 0.825
"""


@pytest.mark.parametrize(
    ("format", "text"),
    [("toml", TOML), ("vllm", VLLM), ("vllm-yaml", VLLM_YAML), ("sglang", SGLANG)],
)
def test_golden_texts(format: str, text: str) -> None:
    assert render_profile(PROFILE, format=format, memory=MEMORY) == text


def test_a_draft_claims_no_gain() -> None:
    profile = replace(PROFILE, status=ProfileStatus.DRAFT, winner_scores=(), profile_id=None)
    first, *_ = render_profile(profile, format="toml").splitlines()
    words = "throughput on chat: no gain proved over the default"
    assert first == f"# sparsed profile (draft), {words}"


@pytest.mark.parametrize(("page_size", "block_size"), [(8, None), (16, 16), (32, 32), (64, None)])
def test_vllm_gets_only_blocks_that_it_takes(page_size: int, block_size: int | None) -> None:
    profile = replace(PROFILE, values=PROFILE.values | {"page_size": page_size})
    assert vllm_flags(profile, memory=MEMORY).get("block-size") == block_size
    for format in ("vllm", "vllm-yaml"):
        text = render_profile(profile, format=format, memory=MEMORY)
        assert (f"# page_size {page_size} is left out" in text) == (block_size is None)
    assert "is left out" not in render_profile(profile, format="sglang", memory=MEMORY)


@pytest.mark.parametrize(
    ("page_size", "chunk", "expected"),
    [(128, 192, 128), (128, 96, 128), (64, 192, 192), (None, 100, 100), (32, None, None)],
)
def test_sglang_gets_chunks_of_whole_pages(
    page_size: int | None, chunk: int | None, expected: int | None
) -> None:
    values = {"page_size": page_size, "prefill_chunk": chunk}
    given = {name: value for name, value in values.items() if value is not None}
    flags = sglang_flags(replace(PROFILE, values=given), memory=MEMORY)
    assert flags.get("chunked-prefill-size") == expected


@pytest.mark.parametrize("format", ["vllm", "sglang"])
def test_without_a_gpu_there_is_no_fraction(format: str) -> None:
    text = render_profile(PROFILE, format=format)
    assert "gpu-memory-utilization" not in text and "mem-fraction-static" not in text
    assert "# no memory fraction" in text


@pytest.mark.parametrize("format", ["toml", "json"])
@settings(max_examples=50)
@given(
    values=st.fixed_dictionaries(
        {"token_budget": st.integers(256, 8192)},
        optional={
            "hbm_budget": st.one_of(st.none(), st.integers(256, 32768)),
            "kv_hbm_gib": st.floats(0.001, 4096),
            "sparse_method": st.sampled_from(("dense", "quest")),
        },
    ),
    words=st.text(st.characters(codec="utf-8"), max_size=20),
    scores=st.lists(st.floats(1e-9, 1e9), max_size=3),
)
def test_import_gives_the_same_profile(
    format: str, values: dict[str, object], words: str, scores: list[float]
) -> None:
    profile = replace(
        PROFILE,
        values=values,
        key=replace(PROFILE.key, model=words),
        versions={words: words},
        winner_scores=tuple(scores),
    )
    again = parse_profile(render_profile(profile, format=format))
    assert again == replace(profile, profile_id=None, pinned=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "config_version is None"),
        ("{", "neither JSON nor TOML"),
        ("a = = b", "neither JSON nor TOML"),
        ("config_version = 1\ntoken_budget = 512", r"no table \[tuned_for\]"),
        (TOML.replace("config_version = 1", "config_version = 2"), "config_version is 2"),
        (TOML.replace('dtype = "bfloat16"', ""), "not a profile.*dtype"),
        (TOML.replace('"verified"', '"proven"'), "not a profile.*proven"),
        (TOML.replace("token_budget = 1024", "token_budget = 1"), "token_budget=1"),
        (TOML.replace("token_budget", "tocken_budget"), "unknown knob 'tocken_budget'"),
    ],
)
def test_a_text_that_is_no_profile_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_profile(text)


def test_names_cannot_leave_their_place() -> None:
    key = replace(PROFILE.key, model="m; rm -rf /", hardware="cpu\ntoken_budget = 1")
    profile = replace(PROFILE, key=key)
    assert parse_profile(render_profile(profile, format="toml")).values == PROFILE.values
    assert "vllm serve 'm; rm -rf /' " in render_profile(profile, format="vllm")


def test_unknown_format() -> None:
    with pytest.raises(InputError, match="not one of toml, json"):
        render_profile(PROFILE, format="xml")


def test_mismatch_names_what_differs() -> None:
    assert mismatch(PROFILE, PROFILE.key, versions=PROFILE.versions) == ()
    key = replace(PROFILE.key, hardware="cpu:x:2:4GiB", dtype="float32")
    assert mismatch(PROFILE, key, versions={"torch": "2.14.0", "triton": "3.9"}) == (
        'hardware: tuned on gpu:NVIDIA "H100":80GiB, this is cpu:x:2:4GiB',
        "dtype: tuned on bfloat16, this is float32",
        "torch: tuned on 2.13.0, this is 2.14.0",
    )


def test_the_toml_keys_are_knobs_and_one_table() -> None:
    content = tomllib.loads(render_profile(PROFILE, format="toml"))
    assert content.keys() - {"config_version", "tuned_for"} == PROFILE.values.keys()
