"""Layers of the CPU kernels alone: each as a library of its own, one per instruction set.

NAME.cpp includes the headers of one layer and nothing above them, and exports template functions by
``EXPORT(function)`` (export.h), whose parameters are ``S*``, ``int64_t*`` and ``int64_t``.
test_NAME.py has tests that take the fixture ``layer``, and call ``layer("function", tensor, 3)``.
Nothing else is to be done: the pair is found by its name, and compiled with the flags of setup.py.
"""

from __future__ import annotations

import ast
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SUFFIX = {torch.float32: "_f32", torch.float64: "_f64"}


class Layer:
    """A compiled layer: calls its exported functions by name."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def __call__(self, function: str, *arguments: Tensor | int) -> Any:
        """The first floating point tensor chooses the precision; tensors go by their address."""
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        assert all(x.is_contiguous() for x in tensors)
        dtype = next((SUFFIX[x.dtype] for x in tensors if x.is_floating_point()), "_plain")
        kinds = [ctypes.c_void_p if isinstance(x, Tensor) else ctypes.c_int64 for x in arguments]
        address = ctypes.c_void_p.in_dll(self.library, function + dtype).value
        call = ctypes.CFUNCTYPE(ctypes.c_int64, *kinds)(address)
        return call(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments))


def of_setup(name: str) -> Any:
    """A constant of setup.py, which cannot be imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if [getattr(x, "id", None) for x in targets] == [name]:
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    raise LookupError(name)


def compile_layer(compiler: str, name: str, isa: str, folder: Path) -> Path:
    flags = {name: x for sets in of_setup("INSTRUCTION_SETS").values() for name, x in sets}
    path = folder / f"{name}_{isa}.so"
    command = [
        compiler,
        *of_setup("FLAGS"),
        "-Werror",
        *flags.get(isa, []),
        f"-DTT_ISA={isa}",
        "-shared",
    ]
    command += [f"-I{ROOT / 'csrc'}", f"-I{HERE}", str(HERE / f"{name}.cpp"), "-o", str(path)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


def wanted(item: pytest.Item) -> tuple[str, str]:
    """The layer and the instruction set of a test."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return item.path.stem.removeprefix("test_"), parameters.get("isa", "baseline")


@pytest.fixture(scope="session")
def libraries(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[Path]]]:
    """All layers that the session's tests ask for; the compilers run while the tests do."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cpu_layers")
    pairs = dict.fromkeys(
        wanted(item)
        for item in request.session.items
        if "layer" in getattr(item, "fixturenames", ())
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {pair: pool.submit(compile_layer, compiler, *pair, folder) for pair in pairs}


@pytest.fixture
def layer(
    request: pytest.FixtureRequest, isa: str, libraries: dict[tuple[str, str], Future[Path]]
) -> Layer:
    """The layer that the test's file is named after, for each instruction set of this machine."""
    return Layer(libraries[wanted(request.node)].result())
