"""Every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import throughtime

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(throughtime.__path__, "throughtime.")
    if info.name.split(".")[1] not in ("_C", "__main__", "bench", "cli", "triton_kernels")
)


@pytest.mark.parametrize("name", ["throughtime", *MODULES])
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module)
    assert failed == 0


def test_every_public_name_has_an_example() -> None:
    named = [throughtime.LSTM, throughtime.DetachSchedule, throughtime.backend, throughtime.explain]
    named += [throughtime.replace, throughtime.functional.lstm, throughtime.reference.lstm]
    for thing in named:
        assert "Example:" in (thing.__doc__ or ""), thing
