"""Layers of the CPU kernels alone: each as a library of its own, one per instruction set.

NAME.cpp includes the headers of one layer and nothing above them, and exports template functions by
``EXPORT(function)`` (export.h), whose parameters are ``S*``, ``int64_t*`` and ``int64_t``.
test_NAME.py has tests that take the fixture ``layer``, and call ``layer("function", tensor, 3)``.
Nothing else is to be done: the pair is found by its name, and compiled with the flags of setup.py.
"""

from __future__ import annotations

import ast
import ctypes
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compiled import compiled

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SUFFIX = {torch.float32: "_f32", torch.float64: "_f64"}
VECTOR_BYTES = {"sse2": 16, "avx2": 32, "avx512": 64, "neon": 16}


class Layer:
    """A compiled layer: calls its exported functions by name."""

    def __init__(self, path: Path, isa: str) -> None:
        self.library = ctypes.CDLL(str(path))
        self.isa = isa

    def __call__(self, function: str, *arguments: Tensor | int | None) -> Any:
        """The first floating point tensor chooses the precision; tensors go by their address."""
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        assert all(x.is_contiguous() for x in tensors)
        dtype = next((SUFFIX[x.dtype] for x in tensors if x.is_floating_point()), "_plain")
        kinds = [ctypes.c_int64 if isinstance(x, int) else ctypes.c_void_p for x in arguments]
        address = ctypes.c_void_p.in_dll(self.library, function + dtype).value
        call = ctypes.CFUNCTYPE(ctypes.c_int64, *kinds)(address)
        return call(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments))

    def lanes(self, dtype: torch.dtype) -> int:
        """Numbers in a vector."""
        return VECTOR_BYTES[self.isa] // dtype.itemsize


def of_setup(name: str) -> Any:
    """A constant of setup.py, which cannot be imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if [getattr(x, "id", None) for x in targets] == [name]:
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    raise LookupError(name)


def library(item: pytest.Item) -> Future[Path]:
    """The layer of a test, for its instruction set, compiled in the background."""
    name = item.path.stem.removeprefix("test_")
    isa = item.callspec.params.get("isa", "baseline") if hasattr(item, "callspec") else "baseline"
    flags = {name: x for sets in of_setup("INSTRUCTION_SETS").values() for name, x in sets}
    command = [*of_setup("FLAGS"), "-Werror", *flags.get(isa, []), f"-DTT_ISA={isa}"]
    command += ["-shared", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    return compiled(item.config, f"{name}-{isa}.so", HERE / f"{name}.cpp", command)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compilers run while the tests do."""
    for item in session.items:
        if "layer" in getattr(item, "fixturenames", ()):
            library(item)


@pytest.fixture
def layer(request: pytest.FixtureRequest, isa: str) -> Layer:
    """The layer that the test's file is named after, for each instruction set of this machine."""
    return Layer(library(request.node).result(), isa)
