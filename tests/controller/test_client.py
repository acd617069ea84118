"""One suite of what an operator may ask, on both sides of the wire."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sparsed.controller.cli.main import run
from sparsed.controller.client import AdminClient, CallFailed, DaemonUnreachable
from sparsed.controller.control import KnobSource, TunerVerb
from sparsed.controller.profiles import StoredProfiles
from sparsed.core import InputError, KnobValue, TunerMode, check_knob_values
from sparsed.tuner.export import ExportFormat, parse_profile, render_profile


class Direct:
    """The control itself, in the shape of the client."""

    def __init__(self, control: Any) -> None:
        self._control = control
        self._profiles = StoredProfiles(control.profiles)

    def __getattr__(self, name: str) -> Any:
        return getattr(
            self._profiles if name.endswith(("profile", "profiles")) else self._control, name
        )

    def snapshot(self) -> Any:
        return self._control.status().snapshot

    def set_knobs(self, values: dict[str, KnobValue], **options: Any) -> Any:
        return asyncio.run(self._control.set_knobs(check_knob_values(values), **options))

    def explain(self) -> Any:
        return asyncio.run(self._control.explain())

    def steer_tuner(self, verb: TunerVerb, **options: Any) -> Any:
        steer = self._control.steer_tuner(verb, **({"knob": "", "validate_only": False} | options))
        return asyncio.run(steer)

    def drain(self, *, timeout_s: float | None) -> int:
        return asyncio.run(self._control.drain(timeout_s=timeout_s))


@pytest.fixture(params=["direct", "wire"])
def caller(request: pytest.FixtureRequest) -> Any:
    if request.param == "direct":
        return Direct(request.getfixturevalue("control"))
    return request.getfixturevalue("client")


def by_name(states: Any) -> dict[str, Any]:
    return {state.spec.name: state for state in states}


def test_reads_give_the_daemons_values(caller: Any, control: Any) -> None:
    assert caller.status() == control.now
    assert caller.snapshot() == control.now.snapshot
    assert caller.list_knobs() == control.list_knobs()
    assert caller.tuner() == control.tuner()
    assert caller.explain() == control.explanation
    assert caller.list_profiles() == control.profiles.list_profiles()


def test_a_hot_knob_changes_at_once(caller: Any, control: Any) -> None:
    state = by_name(
        caller.set_knobs({"token_budget": 1024}, validate_only=False, reason="less misses")
    )["token_budget"]
    assert (state.value, state.source, state.pending) == (1024, KnobSource.LIVE, None)
    assert control.changes == [({"token_budget": 1024}, "less misses")]


def test_a_restart_knob_waits(caller: Any, control: Any) -> None:
    states = by_name(caller.set_knobs({"page_size": "64"}, validate_only=False, reason=""))
    assert (states["page_size"].value, states["page_size"].pending) == (32, 64)
    assert control.now.knobs.page_size == 32


def test_auto_is_a_value(caller: Any, control: Any) -> None:
    caller.set_knobs({"hbm_budget": 4096}, validate_only=False, reason="")
    assert control.now.knobs.hbm_budget == 4096
    caller.set_knobs({"hbm_budget": "auto"}, validate_only=False, reason="")
    assert control.now.knobs.hbm_budget is None


def test_validate_only_changes_nothing(caller: Any, control: Any) -> None:
    caller.set_knobs({"token_budget": 1024}, validate_only=True, reason="")
    assert control.changes == [] and control.now.knobs.token_budget == 2048


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"token_budget": -1}, "token_budget"),
        ({"page_size": "many"}, "page_size"),
        ({"no_such": 1}, "no_such"),
        ({"max_num_active_seqs": 9}, "max_num_active_seqs"),  # above max_num_seqs
    ],
)
def test_a_bad_value_names_its_field(
    caller: Any, control: Any, values: dict[str, KnobValue], field: str
) -> None:
    with pytest.raises(InputError) as raised:
        caller.set_knobs(values, validate_only=False, reason="")
    assert raised.value.field == field
    assert field in str(raised.value)
    assert control.changes == []


def test_a_daemon_that_cannot_now_says_so(caller: Any, control: Any) -> None:
    control.is_engine_away = True
    with pytest.raises(InputError, match="try again") as raised:
        caller.set_knobs({"token_budget": 1024}, validate_only=False, reason="")
    assert raised.value.field is None


def test_the_tuner_switches_its_mode(caller: Any, control: Any) -> None:
    assert caller.tuner(TunerMode.ADVISE).mode is TunerMode.ADVISE
    assert control.now.tuner_mode is TunerMode.ADVISE


def test_every_word_reaches_the_tuner(caller: Any, control: Any) -> None:
    for verb in TunerVerb:
        knob = "token_budget" if verb in (TunerVerb.PIN, TunerVerb.UNPIN) else ""
        state = caller.steer_tuner(verb, knob=knob, reason="test")
        assert state == control.tuner()
        assert state.pins == (("token_budget",) if verb is TunerVerb.PIN else ())
    assert control.verbs == list(TunerVerb)
    with pytest.raises(InputError, match="unknown knob"):
        caller.steer_tuner(TunerVerb.PIN, knob="speed", reason="test")


def test_drain_says_how_many_were_cut_off(caller: Any, control: Any) -> None:
    assert caller.drain(timeout_s=5.0) == 0
    control.may_drain.clear()
    assert caller.drain(timeout_s=0.05) == 2


def test_stop_is_asked_for_once(caller: Any, control: Any) -> None:
    caller.request_stop()
    assert control.stops == 1


def test_profiles_are_pinned_and_read(caller: Any, control: Any) -> None:
    (profile,) = caller.list_profiles()
    pinned = caller.pin_profile(profile.profile_id, validate_only=True, reason="")
    assert not pinned.pinned
    caller.pin_profile(profile.profile_id, validate_only=False, reason="fits")
    assert caller.get_profile(profile.profile_id).pinned
    with pytest.raises(InputError) as raised:
        caller.get_profile(99)
    assert raised.value.field == "profile_id"


@pytest.mark.parametrize("format", list(ExportFormat))
def test_profiles_are_exported(caller: Any, control: Any, format: ExportFormat) -> None:
    (profile,) = control.profiles.list_profiles()
    text = caller.export_profile(profile.profile_id, format=format)
    assert text == render_profile(profile, format=format) and "dummy:tiny" in text


def test_versions_of_other_engines_are_checked_where_the_profile_is(
    caller: Any, daemon: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="were not compared") as raised:
        caller.export_profile(1, format=ExportFormat.TRTLLM, engine_version="9.9")
    assert raised.value.field == "engine_version"
    forced = caller.export_profile(1, format=ExportFormat.TRTLLM, engine_version="9.9", force=True)
    verb = ["profile", "export", "1", "--format", "trtllm", "--engine-version", "9.9"]
    verb += ["--state-dir", str(daemon.place.root)]
    assert run(verb) == 1 and "were not compared" in capsys.readouterr().err
    assert run([*verb, "--force"]) == 0
    assert capsys.readouterr().out == forced and "FORCED" in forced


def test_an_exported_profile_is_imported_again(caller: Any, control: Any) -> None:
    (profile,) = control.profiles.list_profiles()
    text = caller.export_profile(profile.profile_id, format=ExportFormat.JSON)
    caller.import_profile(text, validate_only=True, reason="")
    assert len(control.profiles.list_profiles()) == 1
    copy = caller.import_profile(text, validate_only=False, reason="moved")
    assert copy in control.profiles.list_profiles()
    assert copy.values == parse_profile(text).values == profile.values
    with pytest.raises(InputError):
        caller.import_profile("not a profile", validate_only=False, reason="")


def test_knobs_are_reset_to_their_defaults(client: AdminClient, control: Any) -> None:
    client.set_knobs({"token_budget": 1024}, validate_only=False, reason="")
    client.reset_knobs(["token_budget"], validate_only=False, reason="")
    assert control.now.knobs.token_budget == 2048
    with pytest.raises(InputError, match="from the machine"):
        client.reset_knobs(["max_num_seqs"], validate_only=False, reason="")
    with pytest.raises(InputError, match="no knob is named"):
        client.reset_knobs([], validate_only=False, reason="")


def test_a_failed_dial_says_what_to_do(tmp_path: Path) -> None:
    with (
        AdminClient(tmp_path / "sparsed.sock") as client,
        pytest.raises(DaemonUnreachable, match="start one with: sparsed start"),
    ):
        client.status()


def test_a_change_on_the_read_socket_is_refused(daemon: Any) -> None:
    with AdminClient(daemon.place.read_socket) as client:
        assert client.status() == daemon.control.now
        with pytest.raises(CallFailed, match="read-only"):
            client.request_stop()
    assert daemon.control.stops == 0
