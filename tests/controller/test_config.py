"""Configuration: precedence, strictness, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsed.controller.config import DaemonConfig, load_config, write_pending
from sparsed.controller.control import KnobSource
from sparsed.controller.options import OPTIONS
from sparsed.core import KNOBS_BY_NAME, ExitCode, InputError


def load(
    tmp_path: Path, *, flags: dict[str, object] | None = None, text: str = "", **environment: str
) -> DaemonConfig:
    file = tmp_path / "sparsed.toml"
    file.write_text("config_version = 1\n" + text)
    return load_config(flags=flags or {}, environment={"HOME": "/home/me"} | environment, file=file)


def test_defaults_are_those_of_the_class() -> None:
    config = load_config(flags={}, environment={"HOME": "/home/me"})
    expected = DaemonConfig(state_dir=config.state_dir, cache_dir=Path("/home/me/.cache/sparsed"))
    assert config == expected
    assert config.origin("port") is KnobSource.DEFAULT


@pytest.mark.parametrize(
    ("given_in", "port", "origin"),
    [
        ("file", 1001, KnobSource.FILE),
        ("environment", 1002, KnobSource.ENVIRONMENT),
        ("flags", 1003, KnobSource.FLAG),
    ],
)
def test_a_flag_wins_over_the_environment_over_the_file(
    tmp_path: Path, given_in: str, port: int, origin: KnobSource
) -> None:
    environment = {"SPARSED_PORT": "1002"} if given_in != "file" else {}
    flags: dict[str, object] = {"port": 1003 if given_in == "flags" else None}
    config = load(tmp_path, flags=flags, text="port = 1001", **environment)
    assert config.port == port
    assert config.origin("port") is origin


def test_knobs_and_targets_of_every_source(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        flags={"page_size": "16", "hbm_budget": "auto"},
        text='kv_hbm_gib = 1.5\nsparse_method = "quest"\nslo_ttft_ms = 250',
        SPARSED_TOKEN_BUDGET="1024",
    )
    assert config.knobs == {
        "page_size": 16,
        "hbm_budget": None,
        "kv_hbm_gib": 1.5,
        "sparse_method": "quest",
        "token_budget": 1024,
    }
    assert config.slo.ttft_s == 0.25
    assert config.slo.tpot_s is None
    assert config.origin("token_budget") is KnobSource.ENVIRONMENT


def test_a_wrong_value_in_a_file_is_found_though_a_flag_overrides_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a text") as caught:
        load(tmp_path, flags={"model": "dummy:tiny"}, text="model = 5")
    assert (caught.value.field, caught.value.code) == ("model", ExitCode.CONFIG)


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ("token_buget = 512", "token_buget", "did you mean 'token_budget'"),
        ("zebra = 1", "zebra", "sparsed start --help"),
        ('port = "8000"', "port", "a number from 1 to 65535"),
        ("port = 80000", "port", "a number from 1 to 65535"),
        ("port = true", "port", "a number"),
        ("port = 80.5", "port", "a whole number"),
        ("model = 3", "model", "a text"),
        ("no_profile = 'yes'", "no_profile", "true or false"),
        ("device = 'tpu'", "device", "auto, cpu, cuda, cuda:N"),
        ("dtype = 'int8'", "dtype", "bfloat16"),
        ("device = 'cuda:0,cuda:1'", "device", "sparsed tune --device"),
        ("slo_ttft_ms = -1", "slo_ttft_ms", "0.001"),
        ("min_recall = 1.5", "min_recall", "a number from 0 to 1"),
        ("min_recall = '0.9'", "min_recall", "a number from 0 to 1"),
        ("tensor_parallel_size = 2", "tensor_parallel_size", "one daemon per GPU"),
        ("token_budget = '512'", "token_budget", "remove the quotes"),
        ("token_budget = -5", "token_budget", "256 to 8192"),
        ("page_size = 24", "page_size", "8, 16, 32, 64, 128"),
        ("kv_hbm_gib = nan", "kv_hbm_gib", "allowed"),
        ("shutdown_timeout = inf", "shutdown_timeout", "from 0 to"),
    ],
)
def test_a_bad_file_names_field_file_and_remedy(
    tmp_path: Path, text: str, field: str, says: str
) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, text=text)
    assert caught.value.field == field
    assert says in str(caught.value)
    assert "sparsed.toml" in str(caught.value)


def test_the_floor_of_recall_is_a_target_from_every_source(tmp_path: Path) -> None:
    assert load(tmp_path).slo.min_recall is None
    assert load(tmp_path, text="min_recall = 0.9").slo.min_recall == 0.9
    told = {"SPARSED_MIN_RECALL": "0.8"}
    assert load(tmp_path, text="min_recall = 0.9", **told).slo.min_recall == 0.8
    assert load(tmp_path, flags={"min_recall": "0.7"}, **told).slo.min_recall == 0.7


def test_a_list_of_devices_is_refused_by_the_name_of_the_flag(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"SPARSED_DEVICE.*sparsed tune --device"):
        load(tmp_path, SPARSED_DEVICE="cuda:0,cuda:1")


def test_a_bad_flag_is_blamed_as_it_was_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--token-budget: token_budget='many' is not a number"):
        load(tmp_path, flags={"token_budget": "many"})
    with pytest.raises(InputError, match="--port: 0 is not a number from 1"):
        load(tmp_path, flags={"port": 0})


def test_a_bad_variable_is_blamed_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="SPARSED_PORTT; did you mean 'port'"):
        load(tmp_path, SPARSED_PORTT="1")
    with pytest.raises(InputError, match="SPARSED_PORT: 'x' is not a number") as caught:
        load(tmp_path, SPARSED_PORT="x")
    assert caught.value.field == "port"


@pytest.mark.parametrize(
    "text", ["", "config_version = 2\n", "config_version = '1'\n", "not toml", "\udcff"]
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"other\.toml"):
        load_config(flags={}, environment={}, file=file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.toml: No such file"):
        load_config(flags={}, environment={}, file=tmp_path / "missing.toml")


def test_the_context_covers_less_where_regimes_come_faster() -> None:
    for dwell, horizon_s in ((None, 60.0), (20, 5.0), (3600, 60.0)):
        config = load_config(flags={"regime_dwell": dwell}, environment={})
        assert config.context_horizon_s == horizon_s
    with pytest.raises(InputError, match="--regime-dwell: 0 is not a number from 1"):
        load_config(flags={"regime_dwell": 0}, environment={})


def test_the_key_is_not_shown() -> None:
    config = load_config(flags={"api_key": "secret"}, environment={})
    assert config.api_key == "secret"
    assert "secret" not in repr(config)


@given(st.dictionaries(st.sampled_from((*OPTIONS, *KNOBS_BY_NAME)), st.text(max_size=8)))
def test_any_text_is_taken_or_refused_with_its_name(flags: dict[str, object]) -> None:
    try:
        config = load_config(flags=flags, environment={"HOME": "/home/me"})
    except InputError as error:
        assert error.field in flags
    else:
        assert set(config.origins) == set(flags)


def test_knobs_set_live_for_the_next_start_win_over_the_file_alone(tmp_path: Path) -> None:
    flags: dict[str, object] = {"state_dir": str(tmp_path)}
    file = tmp_path / "sparsed.toml"
    file.write_text("config_version = 1\npage_size = 64\n")
    pending = load_config(flags=flags, environment={}).state_dir.pending_file
    values = {"page_size": 16, "kv_hbm_gib": 0.5, "sparse_method": "quest", "hbm_budget": None}
    write_pending(pending, values)
    config = load_config(flags=flags, environment={}, file=file)
    assert config.knobs == values
    assert config.origin("page_size") is KnobSource.LIVE
    told = load_config(flags=flags | {"page_size": 8}, environment={}, file=file)
    assert told.knobs == values | {"page_size": 8}
    write_pending(pending, {})
    assert load_config(flags=flags, environment={}, file=file).knobs == {"page_size": 64}
