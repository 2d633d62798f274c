"""Layers of the CPU kernels alone: each as a library of its own, one per instruction set.

NAME.cpp includes the headers of one layer and nothing above them, and exports template functions by
``EXPORT(function)`` (export.h), whose parameters are ``S*``, ``int64_t*``, ``int64_t``, or a list
of tensors as ``void* const*`` (pointers.h).
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
from throughtime import _ext

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SUFFIX = {torch.float32: "_f32", torch.float64: "_f64", torch.bfloat16: "_bf16"}
VECTOR_BYTES = {"sse2": 16, "avx2": 32, "neon": 16}  # 64 of all others
RUNNABLE = _ext.extension.runnable_isas() if _ext.extension else []
BASE = [isa for isa in RUNNABLE if isa not in ("avx512_bf16", "amx")]
STAND_IN = ["amx_stand_in"] if "avx512" in RUNNABLE else []  # functions in place of instructions
BFLOAT16 = [*(isa for isa in RUNNABLE if isa.startswith(("avx512", "amx"))), *STAND_IN]
# Layers whose code depends on more than the vectors.
SETS = {
    "cpus": ["baseline"],
    "pool": ["baseline"],
    "matrix": [*RUNNABLE, *STAND_IN],
    "walk": [isa for isa in RUNNABLE if isa != "amx"],
    "lstm_bfloat16": BFLOAT16,
    "rel_lstm_bfloat16": BFLOAT16,
    "relevancy_bfloat16": BFLOAT16,
    "lstm_split": [*(isa for isa in RUNNABLE if isa == "amx"), *STAND_IN],
}


class Layer:
    """A compiled layer: calls its exported functions by name."""

    def __init__(self, path: Path, isa: str) -> None:
        self.library = ctypes.CDLL(str(path))
        self.isa = isa

    def __call__(self, function: str, *arguments: Tensor | list[Tensor | None] | int | None) -> Any:
        """The first floating point tensor chooses the precision; tensors go by their address."""
        every = [x for each in arguments for x in (each if isinstance(each, list) else [each])]
        tensors = [x for x in every if isinstance(x, Tensor)]
        assert all(x.is_contiguous() for x in tensors)
        dtype = next((SUFFIX[x.dtype] for x in tensors if x.is_floating_point()), "_plain")
        kinds = [ctypes.c_int64 if isinstance(x, int) else ctypes.c_void_p for x in arguments]
        address = ctypes.c_void_p.in_dll(self.library, function + dtype).value
        call = ctypes.CFUNCTYPE(ctypes.c_int64, *kinds)(address)
        return call(*map(_passed, arguments))

    def lanes(self, dtype: torch.dtype) -> int:
        """Numbers in a vector."""
        return VECTOR_BYTES.get(self.isa, 64) // dtype.itemsize


def _passed(argument: Tensor | list[Tensor | None] | int | None) -> Any:
    if isinstance(argument, list):
        return (ctypes.c_void_p * len(argument))(*map(_passed, argument))
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def of_setup(name: str) -> Any:
    """A constant of setup.py, which cannot be imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if [getattr(x, "id", None) for x in targets] == [name]:
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    raise LookupError(name)


def layer_of(path: Path) -> str:
    """The layer that a test's file is named after."""
    return path.stem.removeprefix("test_")


def library(item: pytest.Item, isa: str) -> Future[Path]:
    """The layer of a test, for an instruction set, compiled in the background."""
    name = layer_of(item.path)
    flags = {name: x for sets in of_setup("INSTRUCTION_SETS").values() for name, x in sets}
    flags["amx_stand_in"] = [*flags["avx512"], "-DTT_AMX", "-DTT_AMX_STAND_IN"]
    command = [*of_setup("FLAGS"), "-Werror", *flags.get(isa, []), f"-DTT_ISA={isa}"]
    command += ["-shared", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    return compiled(item.config, f"{name}-{isa}.so", HERE / f"{name}.cpp", command)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each instruction set of this machine that makes a difference to the layer."""
    if "layer" in metafunc.fixturenames:
        path = metafunc.definition.path
        metafunc.parametrize("isa", SETS.get(layer_of(path), BASE), indirect=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compilers run while the tests do."""
    for item in session.items:
        if item.path.parent == HERE and "layer" in getattr(item, "fixturenames", ()):
            library(item, item.callspec.params["isa"])  # type: ignore[attr-defined]


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> str:
    """The instruction set of a layer; that of the package stays as it is."""
    name: str = request.param
    return name


@pytest.fixture
def layer(request: pytest.FixtureRequest, isa: str) -> Layer:
    """The layer that the test's file is named after."""
    return Layer(library(request.node, isa).result(), isa)


@pytest.fixture
def stand_in(request: pytest.FixtureRequest) -> Layer:
    """The same on the stand-in for AMX."""
    return Layer(library(request.node, "amx_stand_in").result(), "amx_stand_in")
