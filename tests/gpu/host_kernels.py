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

import pybind11
import pytest
import torch
from torch import Tensor

from compiled import compiled, find_compiler
from throughtime.ops.lstm.recurrence import saved_gates

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
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    return program(config, "cuda_on_cpu.so", "module.cpp", ["-fPIC", "-shared", *include])


def sanitized(config: pytest.Config) -> dict[str, Future[Path]]:
    """main.cpp under each sanitizer."""
    return {name: program(config, name, "main.cpp", flags) for name, flags in SANITIZERS.items()}


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

    def _run(
        self, backward: bool, T: int, weight: Tensor, reverse: bool, tensors: dict[str, Any],
        **numbers: int,
    ) -> None:  # fmt: skip
        sizes = {"T": T, "B": tensors["c_0"].size(1), "D": weight.size(0), "H": weight.size(2)}
        plan = self.plan(**sizes, scalar_bytes=weight.itemsize, backward=backward)
        self.tiers.append(plan.tier)
        addresses = {name: x.data_ptr() for name, x in tensors.items() if x is not None}
        dtype = str(weight.dtype).removeprefix("torch.")
        numbers |= {**sizes, "reverse": int(reverse)}
        self.kernels.take_work()  # of earlier runs
        self.kernels.run(dtype, plan, backward, addresses, numbers)
        self.work.append(self.kernels.take_work())

    def forward(
        self, projected: Tensor, bias: Tensor | None, h_0: Tensor, c_0: Tensor, weight_hh: Tensor,
        lengths: Tensor | None, reset: Tensor | None, reverse: bool, save: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        (T, B, D, gates), H = projected.shape, weight_hh.size(2)
        saved = [(T if save else 0, B, D, size) for size in (gates, H)]
        results = {
            "output": h_0.new_full((T, B, D, H), torch.nan), "h_n": h_0.clone(),
            "c_n": c_0.clone(),
            "gates": h_0.new_full(saved[0], torch.nan, dtype=saved_gates(h_0.dtype)),
            "cells": c_0.new_full(saved[1], torch.nan),
        }  # fmt: skip
        inputs = {
            "projected": projected, "bias": bias, "h_0": h_0, "c_0": c_0, "weight_hh": weight_hh,
            "lengths": lengths, "reset": reset,
        }  # fmt: skip
        dense = {name: None if x is None else x.contiguous() for name, x in inputs.items()}
        passed = {name: x for name, x in results.items() if save or name not in ("gates", "cells")}
        if B > 0:
            self._run(False, T, weight_hh, reverse, dense | passed)
        return tuple(results.values())

    def backward(
        self, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None,
        c_0: Tensor, weight_hh: Tensor, gates: Tensor, cells: Tensor, lengths: Tensor | None,
        reset: Tensor | None, detach_mask: Tensor | None, reverse: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        def initial(state: Tensor | None) -> Tensor:
            return torch.zeros_like(c_0) if state is None else state.to(c_0.dtype, copy=True)

        grad_gates = torch.full_like(gates, torch.nan, dtype=weight_hh.dtype)
        results = (grad_gates, initial(grad_h_n), initial(grad_c_n))
        if c_0.size(1) == 0:
            return results
        inputs = {
            "grad_output": grad_output, "grad_h_n": grad_h_n, "grad_c_n": grad_c_n, "c_0": c_0,
            "weight_hh": weight_hh, "gates": gates, "cells": cells, "lengths": lengths,
            "reset": reset,
        }  # fmt: skip
        dense = {name: None if x is None else x.contiguous() for name, x in inputs.items()}
        dense |= dict(zip(("grad_gates", "grad_h_0", "grad_c_0"), results, strict=True))
        strides = (0, 0, 0) if detach_mask is None else detach_mask.stride()
        self._run(
            True, gates.size(0), weight_hh, reverse, dense | {"detach_mask": detach_mask},
            detach_stride_d=strides[0], detach_stride_t=strides[1],
            detach_stride_b=strides[2] if detach_mask is None or detach_mask.size(2) > 1 else 0,
        )  # fmt: skip
        return results
