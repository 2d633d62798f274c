"""One version, one licence, one lowest Python and torch: every file that names them agrees."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import throughtime
from checkout import ROOT, constant
from programs import run_python

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def found(pattern: str, file: str) -> str:
    """The first group of the first match in a file of the checkout."""
    match = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None, f"{file} has no line like {pattern!r}"
    return match[1]


def test_one_version(pyproject: dict[str, Any]) -> None:
    version = pyproject["project"]["version"]
    assert importlib.metadata.version("throughtime") == version
    assert throughtime.__version__ == version
    assert found(r"^## \[(\d[^\]]*)\]", "CHANGELOG.md") == version
    assert found(r"^version: (\S+)$", "CITATION.cff") == version


def test_one_licence(pyproject: dict[str, Any]) -> None:
    licence = pyproject["project"]["license"]
    assert found(r"^license: (\S+)$", "CITATION.cff") == licence == "Apache-2.0"
    assert found(r"^\s+(Apache License)$", "LICENSE")
    assert found(r"^\s+Version (2\.0), January 2004$", "LICENSE")
    assert importlib.metadata.metadata("throughtime")["License-Expression"] == licence


def test_one_repository(pyproject: dict[str, Any]) -> None:
    urls = pyproject["project"]["urls"]
    assert found(r"^repository-code: (\S+)$", "CITATION.cff") == urls["Repository"]
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    assert constant("REPOSITORY", "tests/build/test_toolchain.py") == urls["Repository"]


def test_lowest_python_is_the_one_that_is_built_for_and_checked(pyproject: dict[str, Any]) -> None:
    major, minor = constant("PYTHON_ABI", "setup.py")
    assert pyproject["project"]["requires-python"] == f">={major}.{minor}"
    assert pyproject["tool"]["ruff"]["target-version"] == f"py{major}{minor}"
    assert pyproject["tool"]["mypy"]["python_version"] == f"{major}.{minor}"
    assert found(r"sys\.version_info < (\(\d+, \d+\))", "Makefile") == f"({major}, {minor})"


def test_lowest_torch_is_the_one_that_is_built_for(pyproject: dict[str, Any]) -> None:
    major, minor = constant("TORCH_AT_LEAST", "csrc/toolchain.py")
    assert f"torch>={major}.{minor}" in pyproject["project"]["dependencies"]


def test_torch_is_no_build_requirement(pyproject: dict[str, Any]) -> None:
    names = [re.split(r"\W", name)[0] for name in pyproject["build-system"]["requires"]]
    assert names == ["setuptools", "ninja"]


def test_lowest_setuptools_is_the_one_that_is_asked_for(pyproject: dict[str, Any]) -> None:
    lowest = f"setuptools>={constant('SETUPTOOLS_AT_LEAST', 'setup.py')}"
    assert lowest in pyproject["build-system"]["requires"]
    assert lowest in pyproject["project"]["optional-dependencies"]["test"]


def test_the_source_tree_is_not_what_is_imported() -> None:
    assert ROOT / "python" not in [Path(entry).resolve() for entry in sys.path]
    assert ROOT / "csrc" not in [Path(entry).resolve() for entry in sys.path]


def test_installation_records_what_was_compiled() -> None:
    from throughtime import _build_info as info

    compiled = any(Path(info.__file__).parent.glob("_C.*"))
    assert ("cpu" in info.built) == compiled
    assert set(info.built).isdisjoint(info.left_out)
    assert {"cpu", "cuda"} <= {*info.built, *info.left_out}
    assert all(reason and "\n" not in reason for reason in info.left_out.values())
    assert bool(info.compiler) == bool(info.flags) == bool(info.torch) == compiled


def test_triton_kernels_refuse_the_bare_name() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import triton_kernels"
    done = run_python(code)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: these Triton kernels were imported"
    )
    assert "import throughtime.triton_kernels" in done.stderr
