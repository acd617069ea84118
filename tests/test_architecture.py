"""Rules of the house that matter enough to be tests."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import pytest

import sparsed
from sparsed import core
from sparsed.core import KNOB_SPECS, KnobSpec

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("controller", "db", "engine", "kernels", "profiler", "tuner")
# The aims are 25 lines of body and 300 of file; the limits leave room for a table of fields or
# a family of small classes, not for a second idea.
MAX_BODY_LINES = 45
MAX_FILE_LINES = 350


def sources() -> list[Path]:
    """What people write and rewrite: no stubs, and no migrations, which are never edited."""
    return [
        path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "_pb2" not in path.name and "migrations" not in path.parts
    ]


def core_classes() -> list[type]:
    return [
        value
        for _, value in inspect.getmembers(core, inspect.isclass)
        if value.__module__ == core.__name__
    ]


@pytest.mark.parametrize("value_class", core_classes(), ids=lambda item: item.__name__)
def test_the_vocabulary_is_frozen(value_class: type) -> None:
    if issubclass(value_class, Enum | BaseException):
        return
    assert value_class.__dataclass_params__.frozen  # type: ignore[attr-defined]  # not public
    assert all(item.kw_only for item in dataclasses.fields(value_class))
    assert "__slots__" in vars(value_class)


def test_the_vocabulary_needs_only_the_standard_library() -> None:
    tree = ast.parse((ROOT / "src/sparsed/core.py").read_text())
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert modules <= sys.stdlib_module_names


def test_folders_are_importable_under_one_name_only() -> None:
    code = (
        "import importlib.util, sys\n"
        f"specs = [importlib.util.find_spec(name) for name in {FOLDERS!r}]\n"
        "print(*[spec.origin for spec in specs if spec and spec.origin], sep='\\n')"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert str(ROOT) not in found.stdout


def test_links_lead_to_the_folders() -> None:
    for folder in FOLDERS:
        assert (ROOT / "src/sparsed" / folder).resolve() == ROOT / folder


def test_changelog_starts_with_this_version() -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == sparsed.__version__


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == sparsed.__version__
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    loose = [
        requirement
        for group in groups
        for requirement in group
        if not re.search(r">=[\d.]+,<[\d.]+", requirement)
    ]
    assert loose == []


def knob_row(spec: KnobSpec) -> str:
    default = spec.default if spec.default is not None else "auto" if spec.auto else "machine"
    values = spec.allowed.removeprefix("allowed: ")
    return f"| `{spec.name}` | {default} | {values} | {spec.klass.value} | {spec.help} |"


@pytest.mark.parametrize("spec", KNOB_SPECS, ids=lambda spec: spec.name)
def test_the_readme_tells_the_truth_about_knobs(spec: KnobSpec) -> None:
    assert knob_row(spec) in (ROOT / "README.md").read_text().splitlines()


def test_the_readme_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for name, num_lines in bodies(ast.parse(text)):
        assert num_lines <= MAX_BODY_LINES, f"{name} has a body of {num_lines} lines"


def bodies(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Name and body length in lines, docstring left out, of every function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_text = ast.get_docstring(node, clean=False) is not None
            body = node.body[1:] if has_text else node.body
            if body:
                yield node.name, (node.end_lineno or 0) - body[0].lineno + 1
