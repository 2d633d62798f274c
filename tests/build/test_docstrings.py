"""Every public name says what it takes, gives and raises, has an example that runs, and a page."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import throughtime

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(throughtime.__path__, "throughtime.")
    if info.name.split(".")[1] not in ("_C", "_C_cuda", "__main__", "triton_kernels")
    and not info.name.startswith("throughtime.integrations.")  # tests/clients has their libraries
)
ROOMS = (
    throughtime,
    throughtime.diagnostics,
    throughtime.functional,
    throughtime.init,
    throughtime.nn,
    throughtime.reference,
)
PUBLIC: dict[str, Any] = {  # one name each: what throughtime.nn holds is throughtime's too
    f"{room.__name__}.{name}": thing
    for room in ROOMS[::-1]
    for name in room.__all__
    if callable(thing := getattr(room, name))
    and room is not throughtime.nn
    and (room is throughtime or name not in throughtime.__all__)
}
METHODS: dict[str, Callable[..., Any]] = {
    f"{name}.{member}": thing
    for name, owner in PUBLIC.items()
    if inspect.isclass(owner)
    for member in vars(owner)
    if not member.startswith("_")
    and inspect.isroutine(thing := getattr(owner, member))
    and thing.__module__.startswith("throughtime")  # others are borrowed from torch
}
TITLES = ("Args", "Attributes", "Returns", "Raises", "Example", "Source")


@pytest.mark.parametrize("name", ["throughtime", *MODULES])
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module)
    assert failed == 0


def sections(thing: object) -> dict[str, str]:
    """The sections of a docstring by their titles; ``""`` is what stands before the first."""
    titles = rf"^({'|'.join(TITLES)}):(?=\s)"
    parts = re.split(titles, inspect.getdoc(thing) or "", flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=False))


def entries(section: str) -> set[str]:
    """The names before the colons: ``h_0, c_0: ...`` are two."""
    found = re.findall(r"^    (\w[\w, ]*):", section, flags=re.MULTILINE)
    return {name.strip() for line in found for name in line.split(",")}


def parameters(thing: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(thing).parameters) - {"self"}


def test_public_names_are_found() -> None:
    assert {"throughtime.LSTM", "throughtime.functional.lstm", "throughtime.reference.lstm"} <= set(
        PUBLIC
    )
    assert len(PUBLIC) > 20 and "throughtime.LSTM.to_torch" in METHODS
    assert all(isinstance(room, ModuleType) and inspect.getdoc(room) for room in ROOMS)
    assert set(throughtime.nn.__all__) <= set(throughtime.__all__)


@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_docstring_is_whole(name: str) -> None:
    thing = {**PUBLIC, **METHODS}[name]
    parts = sections(thing)
    assert re.match(r"\S[^\n]*(\n\S[^\n]*)?\.", parts[""]), f"{name}: the first sentence is missing"
    assert name in METHODS or ">>> " in parts.get("Example", ""), f"{name}: Example"
    title = "Attributes" if dataclasses.is_dataclass(thing) else "Args"
    assert entries(parts.get(title, "")) == parameters(thing), f"{name}: {title}"
    if inspect.isclass(thing):
        return
    if parameters(thing):  # the sentence on a function without arguments says what it returns
        gives = inspect.signature(thing).return_annotation not in ("None", None)
        assert ("Returns" in parts) == gives, f"{name}: Returns"
    raised = re.findall(r"^\s+raise (\w+Error)\(", inspect.getsource(thing), flags=re.MULTILINE)
    assert set(raised) <= entries(parts.get("Raises", "")), f"{name}: Raises"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """What ``make docs`` builds; a warning is an error."""
    pytest.importorskip("sphinx")
    source, out = tmp_path_factory.mktemp("docs") / "source", tmp_path_factory.mktemp("pages")
    shutil.copytree(pytestconfig.rootpath / "python" / "docs", source)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_every_public_name_has_a_page(pages: Path) -> None:
    built = {page.stem for page in pages.glob("throughtime.*.html")}
    assert built == set(PUBLIC)
