"""Builds tests/gpu/cuda_on_cpu: the GPU kernels' own sources, compiled to run on the CPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cases_gpu import short
from compiled import compiled, find_compiler
from throughtime.ops.lstm.recurrence import (
    BackwardArguments,
    BackwardResults,
    ForwardArguments,
    ForwardResults,
    saved_gates,
)

SOURCES = Path(__file__).parent / "cuda_on_cpu"
CSRC = next(folder / "csrc" for folder in SOURCES.parents if (folder / "csrc").is_dir())
# Uninitialised variables are not zero by chance, as registers of a GPU hold anything. gcc 12, clang
# 8 and later.
POISON = "-ftrivial-auto-var-init=pattern"

SANITIZERS = {
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover"],
}


@functools.cache
def takes(flag: str) -> bool:
    """Whether the compiler knows the flag."""
    command = [find_compiler(), "-Werror", flag, "-x", "c++", "-fsyntax-only"]
    done = subprocess.run([*command, os.devnull], stderr=subprocess.DEVNULL, check=False)
    return done.returncode == 0


def program(config: pytest.Config, name: str, source: str, flags: list[str]) -> Future[Path]:
    """A source of tests/gpu/cuda_on_cpu, compiled in the background."""
    common = ["-O1", "-g", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread"]
    common += [POISON] if takes(POISON) else []
    flags = [*common, *flags, f"-I{SOURCES}", f"-I{CSRC}"]
    return compiled(config, name, SOURCES / source, flags)


def module(config: pytest.Config) -> Future[Path]:
    """module.cpp, compiled in the background."""
    import pybind11  # a machine with a GPU may be without

    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    return program(config, "cuda_on_cpu.so", "module.cpp", ["-fPIC", "-shared", *include])


def sanitized(config: pytest.Config) -> dict[str, Future[Path]]:
    """main.cpp under each sanitizer."""
    return {name: program(config, name, "main.cpp", flags) for name, flags in SANITIZERS.items()}


def tracer(config: pytest.Config) -> Future[Path]:
    """trace.cpp, which has its own functions in place of the sanitizer's library."""
    libraries = [f"-l{name}" for name in ("stdc++", "m", "gcc_s", "gcc", "pthread", "c")]
    instead = ["-fsanitize=thread", "-nodefaultlibs", "-Wl,--no-as-needed", *libraries]
    return program(config, "trace", "trace.cpp", instead)


def load(path: Path) -> ModuleType:
    """Import what :func:`module` compiles."""
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class HostKernels:
    """The operators ``lstm_recurrence_*`` on the CPU, by the kernels' own sources.

    Args:
        kernels: what :func:`load` gives.
        plan: from the arguments of ``kernels.plan`` without the GPU to a plan.
    """

    def __init__(self, kernels: ModuleType, plan: Callable[..., Any]) -> None:
        self.kernels = kernels
        self.plan = plan
        self.tiers: list[int] = []  # of the plans that ran
        self.work: list[tuple[int, int]] = []  # their products and waits for other blocks

    def _run(self, backward: bool, T: int, call: Any, results: dict[str, Tensor]) -> None:
        """Arguments and results go by address; the strides of the mask are told."""
        weight = call.weight_hh
        sizes = {"T": T, "B": call.c_0.size(1), "D": weight.size(0), "H": weight.size(2)}
        plan = self.plan(**sizes, scalar_bytes=weight.itemsize, backward=backward)
        self.tiers.append(plan.tier)
        given = {name: x for name, x in call._asdict().items() if isinstance(x, Tensor)}
        mask = given.pop("detach_mask", None)
        dense = {name: x.contiguous() for name, x in given.items()} | results
        numbers = {**sizes, "reverse": int(call.reverse), "tf32": int(call.tf32)}
        if mask is not None:
            dense["detach_mask"] = mask
        for axis, name in enumerate("dtb"):
            numbers[f"detach_stride_{name}"] = 0 if mask is None else mask.stride(axis)
        addresses = {name: x.data_ptr() for name, x in dense.items()}
        self.kernels.take_work()  # of earlier runs
        self.kernels.run(short(weight.dtype), plan, backward, addresses, numbers)
        self.work.append(self.kernels.take_work())

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        call = ForwardArguments(*args)
        h_0, c_0, (T, B, D, gates) = call.h_0, call.c_0, call.projected.shape
        H, steps = call.weight_hh.size(2), T if call.save else 0
        results = ForwardResults(
            output=h_0.new_full((T, B, D, H), torch.nan),
            h_n=h_0.clone(),
            c_n=c_0.clone(),
            gates=h_0.new_full((steps, B, D, gates), torch.nan, dtype=saved_gates(h_0.dtype)),
            cells=c_0.new_full((steps, B, D, H), torch.nan),
        )
        passed = results._asdict()
        if not call.save:
            del passed["gates"], passed["cells"]
        if B > 0:
            self._run(False, T, call, passed)
        return tuple(results)

    def backward(self, *args: Any) -> tuple[Tensor, ...]:
        call = BackwardArguments(*args)
        c_0, dtype = call.c_0, call.weight_hh.dtype
        states = (
            torch.zeros_like(c_0) if state is None else state.to(c_0.dtype, copy=True)
            for state in (call.grad_h_n, call.grad_c_n)
        )
        results = BackwardResults(torch.full_like(call.gates, torch.nan, dtype=dtype), *states)
        if c_0.size(1) > 0:
            self._run(True, call.gates.size(0), call, results._asdict())
        return tuple(results)
