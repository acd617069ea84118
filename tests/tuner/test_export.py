"""Exported texts, word for word, and their way back."""

from __future__ import annotations

import tomllib
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.controller.config import load_config
from sparsed.core import (
    InputError,
    ModelShape,
    Objective,
    Profile,
    ProfileKey,
    ProfileStatus,
)
from sparsed.tuner.engines import (
    VERSIONS,
    DeviceMemory,
    Engine,
    check_version,
    sglang_flags,
    trtllm_settings,
    vllm_flags,
)
from sparsed.tuner.export import ENGINE_OF, ExportFormat, mismatch, parse_profile, render_profile

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


def losses(engine: str, names: str) -> str:
    return f"""\
# names of {engine} {names}
# names change between versions: compare with those of the installed one
# the gain was measured with sparsed, and says nothing about {engine}
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
{HEADER}{losses("vLLM", "0.11 to 0.29")}vllm serve org/m-8b \\
  --dtype bfloat16 \\
  --block-size 16 \\
  --max-num-seqs 24 \\
  --max-num-batched-tokens 2072 \\
  --gpu-memory-utilization 0.9
"""
VLLM_YAML = f"""\
{HEADER}{losses("vLLM", "0.11 to 0.29")}model: "org/m-8b"
dtype: "bfloat16"
block-size: 16
max-num-seqs: 24
max-num-batched-tokens: 2072
gpu-memory-utilization: 0.9
"""
SGLANG = f"""\
{HEADER}{losses("SGLang", "0.5")}python -m sglang.launch_server --model-path org/m-8b \\
  --dtype bfloat16 \\
  --page-size 16 \\
  --max-running-requests 24 \\
  --chunked-prefill-size 2048 \\
  --mem-fraction-static 0.825
"""
TRTLLM = f"""\
{HEADER}{losses("TensorRT-LLM", "1.3")}dtype: "bfloat16"
max_batch_size: 24
max_num_tokens: 2072
enable_chunked_prefill: true
kv_cache_config:
  tokens_per_block: 16
  free_gpu_memory_fraction: 0.862
"""
ENV = f"""\
{HEADER}SPARSED_MODEL=org/m-8b
SPARSED_DTYPE=bfloat16
SPARSED_PAGE_SIZE=16
SPARSED_TOKEN_BUDGET=1024
SPARSED_HBM_BUDGET=auto
SPARSED_MAX_NUM_ACTIVE_SEQS=24
SPARSED_PREFILL_CHUNK=2048
"""
CLI = f"""\
{HEADER}sparsed start --model org/m-8b \\
  --dtype bfloat16 \\
  --page-size 16 \\
  --token-budget 1024 \\
  --hbm-budget auto \\
  --max-num-active-seqs 24 \\
  --prefill-chunk 2048
"""
MARKDOWN = """\
# sparsed profile 7 (verified), throughput on chat: +10.0% over the default

tuned on gpu:NVIDIA "H100":80GiB for org/m-8b, bfloat16

| knob | value |
|--|--|
| page_size | 16 |
| token_budget | 1024 |
| hbm_budget | auto |
| max_num_active_seqs | 24 |
| prefill_chunk | 2048 |

| scores of the test | |
|--|--|
| default | 10, 11 |
| winner | 12.1, 12 |

| software | version |
|--|--|
| torch | 2.13.0 |
| an odd name | 1 |
"""


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("toml", TOML),
        ("vllm", VLLM),
        ("vllm-yaml", VLLM_YAML),
        ("sglang", SGLANG),
        ("trtllm", TRTLLM),
        ("env", ENV),
        ("cli", CLI),
        ("markdown", MARKDOWN),
    ],
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
        (100_000 * '{"key": ', "neither JSON nor TOML"),
        ("config_version = 1\ntoken_budget = 512", r"no table \[tuned_for\]"),
        (TOML.replace("config_version = 1", "config_version = 2"), "config_version is 2"),
        (TOML.replace('dtype = "bfloat16"', ""), "not a profile.*dtype"),
        (TOML.replace('"verified"', '"proven"'), "not a profile.*proven"),
        (TOML.replace("token_budget = 1024", "token_budget = 1"), "token_budget=1"),
        (TOML.replace("token_budget", "tocken_budget"), "unknown knob 'tocken_budget'"),
        (TOML.replace("[10.0, 11.0]", "[10.0, nan]"), "not finite"),
        (TOML.replace("1500000000.0", "inf"), "not finite"),
        (TOML.replace("[10.0, 11.0]", "[1e-300]").replace("12.1", "1e300"), "not finite"),
    ],
)
def test_a_text_that_is_no_profile_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_profile(text)


@pytest.mark.parametrize(
    ("name", "count"),
    [("num_layers", 0), ("head_dim", -64), ("num_parameters", -1), ("num_kv_heads", 10**400)],
)
def test_a_shape_that_no_model_has_is_refused(name: str, count: int) -> None:
    sizes = {one.name: 8 for one in fields(ModelShape) if one.name != "tied_embeddings"}
    profile = replace(PROFILE, shape=ModelShape(**sizes))
    assert parse_profile(render_profile(profile, format="json")).shape == profile.shape
    broken = replace(profile, shape=ModelShape(**{**sizes, name: count}))
    with pytest.raises(InputError, match=rf"shape\.{name}|out of range"):
        parse_profile(render_profile(broken, format="json"))


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


def test_a_fraction_is_made_of_bytes_for_the_whole_that_each_engine_takes() -> None:
    assert MEMORY.vllm_frac == pytest.approx(0.90)
    assert MEMORY.sglang_frac == pytest.approx(0.825)
    assert MEMORY.trtllm_frac == pytest.approx(0.862, abs=5e-4)


@given(
    weights=st.integers(0, 1 << 38),
    workspace=st.integers(0, 1 << 38),
    kv=st.integers(1, 1 << 38),
    rest=st.integers(0, 1 << 38),
)
def test_fractions_give_the_bytes_back(weights: int, workspace: int, kv: int, rest: int) -> None:
    device = weights + workspace + kv + rest
    memory = DeviceMemory(
        device_bytes=device, weights_bytes=weights, workspace_bytes=workspace, kv_bytes=kv
    )
    tolerance = 1e-6 * device
    assert memory.vllm_frac * device - weights - workspace == pytest.approx(kv, abs=tolerance)
    assert memory.sglang_frac * device - weights == pytest.approx(kv, abs=tolerance)
    free = device - weights - workspace
    assert memory.trtllm_frac * free == pytest.approx(kv, abs=tolerance)
    assert max(memory.vllm_frac, memory.sglang_frac, memory.trtllm_frac) <= 1


@pytest.mark.parametrize("sizes", [(80, 40, 6, 50), (80, 80, 0, 0), (80, 60, 30, 0), (0, 0, 0, 0)])
def test_parts_that_do_not_fit_the_device_give_no_fraction(
    sizes: tuple[int, int, int, int],
) -> None:
    device, weights, workspace, kv = sizes
    with pytest.raises(InputError, match="lower kv_hbm_gib"):
        DeviceMemory(
            device_bytes=device, weights_bytes=weights, workspace_bytes=workspace, kv_bytes=kv
        )


@pytest.mark.parametrize("engine", Engine)
def test_only_compared_versions_pass_unless_forced(engine: Engine) -> None:
    (first, low), (last, high) = VERSIONS[engine]
    for inside in (f"{first}.{low}", f"{last}.{high}.7", f"v{last}.{high}.0rc27"):
        assert check_version(engine, inside, force=False).startswith(f"for {engine} {inside}")
    for outside in (f"{first}.{low - 1}", f"{last}.{high + 1}.0", f"{last}.{high}0", "main", ""):
        with pytest.raises(InputError, match="force the export") as caught:
            check_version(engine, outside, force=False)
        assert caught.value.field == "engine_version"
        assert check_version(engine, outside, force=True).startswith("FORCED")


def test_what_was_forced_says_so_in_the_text() -> None:
    with pytest.raises(InputError, match=r"TensorRT-LLM 9\.0"):
        render_profile(PROFILE, format="trtllm", engine_version="9.0")
    text = render_profile(PROFILE, format="trtllm", engine_version="9.0\nx: 1", force=True)
    assert "# FORCED for TensorRT-LLM 9.0?x: 1: names of 1.3" in text
    assert text.replace("9.0?x: 1: ", "").count("x: 1") == 0


@pytest.mark.parametrize("format", [item for item in ExportFormat if item not in ENGINE_OF])
def test_a_format_of_ours_takes_no_engine_version(format: ExportFormat) -> None:
    with pytest.raises(InputError, match="leave the engine version out"):
        render_profile(PROFILE, format=format, engine_version="1.0")


def test_trtllm_is_told_to_cut_prompts_only_where_it_gets_a_limit() -> None:
    profile = replace(PROFILE, values={"page_size": 64})
    assert trtllm_settings(profile, memory=None) == {
        "dtype": "bfloat16",
        "kv_cache_config.tokens_per_block": 64,
    }


def test_env_starts_with_the_values_of_the_profile() -> None:
    environment = dict(
        line.split("=", 1)
        for line in render_profile(PROFILE, format="env").splitlines()
        if not line.startswith("#")
    )
    assert load_config(flags={}, environment=environment).knobs == dict(PROFILE.values)
