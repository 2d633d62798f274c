"""Builds tests/gpu/cuda_on_cpu: the GPU kernels' own sources, compiled to run on the CPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

SOURCES = Path(__file__).parent / "cuda_on_cpu"
CSRC = Path(__file__).parents[1] / "csrc"
# What a kernel leaves uninitialised is no zero by chance: a register of a GPU holds anything. With
# gcc 12, clang 8 and later ones.
POISON = "-ftrivial-auto-var-init=pattern"


def takes(compiler: str, flag: str) -> bool:
    """Whether the compiler knows the flag."""
    command = [compiler, "-Werror", flag, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def compile_program(flags: list[str], source: str, to: Path) -> Path:
    """Compile a source of tests/gpu/cuda_on_cpu; skips the test where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-O1", "-g", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread"]
    if takes(compiler, POISON):
        command.append(POISON)
    command += [*flags, f"-I{SOURCES}", f"-I{CSRC}", str(SOURCES / source), "-o", str(to)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    return to


def load_module(folder: Path) -> ModuleType:
    """Compile module.cpp into ``folder`` and import it."""
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = ["-fPIC", "-shared", *include]
    path = compile_program(flags, "module.cpp", folder / "cuda_on_cpu.so")
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
