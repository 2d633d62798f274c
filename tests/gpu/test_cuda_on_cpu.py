"""The LSTM's GPU kernels, run on the CPU by tests/gpu/cuda_on_cpu: against a loop, and sanitizers.

See csrc/common/cuda/device.cuh: the kernels' sources are the ones that nvcc compiles.
"""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cases_recurrence import (
    Case,
    Given,
    assert_matches,
    assert_remembers,
    expect,
    inputs,
    long_memory,
)
from data_sheets import SMALL
from host_kernels import compile_program
from throughtime.ops.lstm.recurrence import saved_gates

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW_PRECISION = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
RESIDENT, GRID, STEPWISE = 1, 2, 3  # Tier of csrc/lstm/cuda/plan.h
SITES = ("start", "forward parts", "forward step", "forward copy", "backward gates",
         "backward step")  # fmt: skip
# Which cases of main.cpp pass which barriers: one block, a cluster, a grid.
BARRIERS = [
    *((site, case) for site in (0, 2, 5) for case in (0, 2, 4)),
    (1, 0), (1, 4), (3, 4), (4, 0), (4, 2), (4, 4),
]  # fmt: skip


Cut = dict[str, int]


def cut(
    kernels: ModuleType,
    case: Case,
    backward: bool,
    tier: int,
    ranks: int = 1,
    tiles_n: int = 1,
    held: int = 0,
    parts: int = 1,
    warps: int | None = None,
) -> Cut:
    """A plan by hand: plan() would not make several blocks of so few units."""
    units = -(-case.H // ranks // 8) * 8 if case.H % ranks == 0 else -(-case.H // (8 * ranks)) * 8
    slabs = units // 8
    warps = (warps or slabs) if backward else slabs * parts
    size = case.dtype.itemsize
    return {
        "tier": tier, "ranks": ranks, "units": units, "parts": parts, "tiles_n": tiles_n,
        "held": held, "groups": -(-case.B // (8 * tiles_n)), "threads": 32 * warps,
        "shared_bytes": kernels.shared_bytes(
            backward, case.H, units, ranks, parts, warps, tier == GRID, tiles_n, held, size),
    }  # fmt: skip


def run(
    kernels: ModuleType,
    case: Case,
    given: list[Given],
    cuts: tuple[Cut, Cut],
    work: dict[str, tuple[int, int]] | None = None,
) -> list[dict[str, Tensor]]:
    """Results per direction; with two of them the second travels against ``case.reverse``.

    ``work`` is filled with (products, waits for other blocks) of the passes.
    """
    T, B, D, H, S = case.T, case.B, len(given), case.H, case.dtype

    def unset(*shape: int, dtype: torch.dtype = S) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    def addresses(tensors: dict[str, Tensor | None]) -> dict[str, int]:
        return {name: x.data_ptr() for name, x in tensors.items() if x is not None}

    def together(values: list[Tensor | None], dim: int = 0) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.stack(present, dim) if present else None

    h_0, c_0 = torch.stack([g.h_0 for g in given]), torch.stack([g.c_0 for g in given])
    common: dict[str, Tensor | None] = {
        "weight_hh": torch.stack([g.weight_hh for g in given]), "c_0": c_0,
        "lengths": given[0].lengths, "reset": together([g.reset for g in given]),
    }  # fmt: skip
    numbers = {"T": T, "B": B, "D": D, "H": H, "reverse": int(case.reverse)}
    result = {
        "output": unset(T, B, D, H),
        "h_n": h_0.clone(),
        "c_n": c_0.clone(),
        "gates": unset(T, B, D, 4 * H, dtype=saved_gates(S)),
        "cells": unset(T, B, D, H, dtype=torch.float32),
    }
    projected = torch.stack([g.projected for g in given], 2)
    bias = projected[0, 0].clone().nan_to_num()
    forward = common | {"projected": projected - bias, "bias": bias, "h_0": h_0}
    dtype = str(S).removeprefix("torch.")
    kernels.take_work()  # what was done before
    kernels.run(dtype, False, addresses(forward | result), numbers | cuts[0])

    output, h_n, c_n = (together([g.grads[i] for g in given], 0 if i else 2) for i in range(3))
    zeros = torch.zeros(D, B, H)
    grads = {
        "grad_gates": unset(T, B, D, 4 * H),
        "grad_h_0": zeros.clone() if h_n is None else h_n.float().clone(),
        "grad_c_0": zeros.clone() if c_n is None else c_n.clone(),
    }
    mask = together([g.detach_mask for g in given])
    backward = common | {"grad_output": output, "grad_h_n": h_n, "grad_c_n": c_n}
    backward |= {"detach_mask": mask, "gates": result["gates"]}
    backward |= {"cells": result["cells"], **grads}
    strides = (0, 0, 0) if mask is None else (*mask.stride(), 0)[:3]
    numbers |= dict(zip(("detach_stride_d", "detach_stride_t", "detach_stride_b"), strides,
                        strict=True))  # fmt: skip
    forward_work = kernels.take_work()
    kernels.run(dtype, True, addresses(backward), numbers | cuts[1])
    if work is not None:
        work |= {"forward": forward_work, "backward": kernels.take_work()}
    found = {name: result[name] for name in ("output", "h_n", "c_n")} | grads
    per_step = ("output", "grad_gates")
    return [
        {name: x[:, :, d] if name in per_step else x[d] for name, x in found.items()}
        for d in range(D)
    ]


# Tier, what both cuts share, what the backward has of its own, sizes and options.
CUTS: list[tuple[str, int, dict[str, int], dict[str, int], dict[str, Any]]] = [
    ("stepwise", STEPWISE, {}, {}, {"T": 4, "B": 3, "H": 8, "reset": True, "mask": "TB"}),
    ("stepwise reverse", STEPWISE, {}, {},
     {"T": 4, "B": 3, "H": 8, "lengths": True, "reset": True, "mask": "T", "reverse": True}),
    ("block", RESIDENT, {}, {}, {"T": 5, "B": 3, "H": 16, "mask": "T"}),
    ("block, whole options", RESIDENT, {"tiles_n": 2}, {"tiles_n": 2, "warps": 5},
     {"T": 4, "B": 17, "H": 24, "lengths": True, "reset": True, "mask": "TB"}),
    ("block, tiles", RESIDENT, {"tiles_n": 4}, {"tiles_n": 2},
     {"T": 2, "B": 33, "H": 8, "lengths": True, "mask": "TB"}),
    ("block, parts", RESIDENT, {"parts": 2}, {"parts": 3, "warps": 9},
     {"T": 3, "B": 3, "H": 72, "reset": True, "mask": "T"}),
    ("block, an empty part", RESIDENT, {"parts": 4}, {},
     {"T": 3, "B": 2, "H": 72, "mask": "T"}),
    ("block, held", RESIDENT, {"held": 4}, {"held": 8},
     {"T": 3, "B": 2, "H": 40, "lengths": True, "reverse": True, "mask": "TB"}),
    ("cluster, held and tail", RESIDENT, {"ranks": 4, "held": 4}, {"ranks": 4, "held": 4},
     {"T": 2, "B": 1, "H": 136, "reset": True, "mask": "T"}),
    ("block, tiles held", RESIDENT, {"tiles_n": 2, "held": 4}, {"tiles_n": 2, "held": 4},
     {"T": 3, "B": 9, "H": 40, "reset": True}),
    ("cluster of 2", RESIDENT, {"ranks": 2, "held": 4}, {"ranks": 2, "held": 4},
     {"T": 4, "B": 3, "H": 40, "lengths": True, "reset": True, "mask": "TB"}),
    ("cluster of 2, reverse", RESIDENT, {"ranks": 2, "parts": 2}, {"ranks": 2, "warps": 4},
     {"T": 4, "B": 9, "H": 40, "lengths": True, "reset": True, "mask": "TB", "reverse": True}),
    ("cluster of 4", RESIDENT, {"ranks": 4}, {"ranks": 4, "parts": 2},
     {"T": 3, "B": 3, "H": 64, "reset": True, "mask": "T"}),
    ("cluster of 4, last one short", RESIDENT, {"ranks": 4}, {"ranks": 4, "warps": 3},
     {"T": 3, "B": 11, "H": 56, "lengths": True, "mask": "TB", "grads": "output"}),
    ("grid of 3", GRID, {"ranks": 3, "parts": 2}, {"ranks": 3, "parts": 2},
     {"T": 4, "B": 9, "H": 40, "lengths": True, "reset": True, "mask": "TB"}),
    ("grid of 3, reverse", GRID, {"ranks": 3}, {"ranks": 3, "warps": 2},
     {"T": 4, "B": 2, "H": 24, "lengths": True, "reset": True, "mask": "T", "reverse": True}),
    ("stepwise, both directions", STEPWISE, {}, {},
     {"T": 4, "B": 3, "H": 8, "lengths": True, "reset": True, "mask": "T", "directions": 2}),
    ("block, both directions", RESIDENT, {"parts": 2}, {"warps": 6},
     {"T": 4, "B": 9, "H": 40, "lengths": True, "reset": True, "mask": "TB", "directions": 2}),
    ("cluster of 2, both directions", RESIDENT, {"ranks": 2}, {"ranks": 2},
     {"T": 3, "B": 9, "H": 32, "lengths": True, "mask": "T", "reverse": True, "directions": 2}),
    ("grid of 2, both directions", GRID, {"ranks": 2}, {"ranks": 2},
     {"T": 3, "B": 9, "H": 32, "reset": True, "mask": "TB", "directions": 2}),
    ("grid of 3, no output's gradient", GRID, {"ranks": 3}, {"ranks": 3},
     {"T": 3, "B": 2, "H": 24, "grads": "h"}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("name", "tier", "forward", "backward", "sizes"), CUTS, ids=lambda x: (
    x if isinstance(x, str) else ""))  # fmt: skip
def test_kernels_match_the_loop(
    name: str,
    tier: int,
    forward: dict[str, int],
    backward: dict[str, int],
    sizes: dict[str, Any],
    dtype: torch.dtype,
    kernels: ModuleType,
) -> None:
    sizes = dict(sizes)
    directions = sizes.pop("directions", 1)
    case = Case(**sizes, dtype=dtype)
    if dtype == torch.float32:  # its weights are not held in registers
        forward, backward = ({**x, "held": 0} for x in (forward, backward))

    def draw() -> list[Given]:
        return [inputs(case, seed=30 * d) for d in range(directions)]

    given = draw()
    for g in given if case.lengths else []:  # nothing of this may be read
        g.projected[g.past] = torch.nan
        if g.grads[0] is not None:
            g.grads[0][g.past] = torch.nan
    if forward.get("tiles_n") == 4 and dtype == torch.float32:
        forward, backward = backward, forward
    cuts = (cut(kernels, case, False, tier, **forward), cut(kernels, case, True, tier, **backward))
    found = run(kernels, case, given, cuts)
    again = run(kernels, case, given, cuts)
    for d, (one, other, anew) in enumerate(zip(found, again, draw(), strict=True)):
        assert all(torch.equal(x, other[name]) for name, x in one.items())
        travel = replace(case, reverse=case.reverse != (d == 1))
        assert_matches(one, expect(travel, anew), dtype, LOW_PRECISION)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_derivatives_of_saved_gates_are_right_where_they_are_small(
    dtype: torch.dtype, kernels: ModuleType
) -> None:
    sums = torch.linspace(-5, 5, 999)
    for r in range(4):
        name = str(dtype).removeprefix("torch.")
        for far in (7e4, torch.inf):  # more than float16 has
            ends = [kernels.saved_gate(name, r, x) for x in (-far, far)]
            assert ends == [-1 if r == 2 else 0, 1]
        gate = torch.tensor([kernels.saved_gate(name, r, x) for x in sums.tolist()]).double()
        exact = sums.double().tanh() if r == 2 else sums.double().sigmoid()
        found, wanted = (1 - x * x if r == 2 else x * (1 - x) for x in (gate, exact))
        error = (found - wanted).abs() / wanted
        # Rounding of the sum, and of 1 - gate in float.
        half = (2 if r == 2 else 1) * (1 + sums.abs()) * 2**-11
        allowed = half if dtype.itemsize == 2 else torch.tensor(1e-3)
        assert (error <= allowed).all(), (r, error.max())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("tier", [RESIDENT, STEPWISE])
def test_a_long_memory_keeps_its_gradient(
    tier: int, dtype: torch.dtype, kernels: ModuleType
) -> None:
    case, given = long_memory(dtype)
    cuts = (cut(kernels, case, False, tier), cut(kernels, case, True, tier))
    (found,) = run(kernels, case, [given], cuts)
    assert_remembers(found, case, given)


@pytest.mark.parametrize(
    ("tier", "sizes", "waits"),
    [
        (STEPWISE, {}, False),
        (RESIDENT, {}, False),
        (RESIDENT, {"ranks": 2}, True),
        (GRID, {"ranks": 2}, True),
    ],
)
def test_a_detached_step_neither_multiplies_nor_waits(
    tier: int, sizes: dict[str, int], waits: bool, kernels: ModuleType
) -> None:
    case = Case(5, 3, 16, torch.bfloat16, mask="TB")
    cuts = (cut(kernels, case, False, tier, **sizes), cut(kernels, case, True, tier, **sizes))
    done = {}
    for open_steps in (0, 1, 3):
        given = inputs(case)
        given.detach_mask = torch.ones(5, 3, dtype=torch.bool)
        given.detach_mask[1 : 1 + open_steps, 2] = False  # one sample is enough
        work: dict[str, tuple[int, int]] = {}
        run(kernels, case, [given], cuts, work)
        done[open_steps] = work["backward"]
        assert work["forward"][0] > 0 and (work["forward"][1] > 0) == waits
    assert done[0] == (0, 0)
    assert done[1][0] > 0 and (done[1][1] > 0) == waits
    assert done[3] == (3 * done[1][0], 3 * done[1][1])


def test_planned_cuts_run(kernels: ModuleType) -> None:
    """More units than a block has warps for: a cluster, and without clusters a grid."""
    case = Case(2, 3, 136, torch.bfloat16, lengths=True, reset=True, mask="TB")
    sizes = {"T": case.T, "B": case.B, "H": case.H, "scalar_bytes": 2}
    for cluster, tier in ((4, RESIDENT), (1, GRID)):
        gpu = {**SMALL, "cluster": cluster}
        plans = [kernels.plan(**sizes, D=1, backward=backward, **gpu) for backward in (False, True)]
        assert all(p["tier"] == tier and p["ranks"] > 1 for p in plans), plans
        cuts = [{k: v for k, v in p.items() if isinstance(v, int)} for p in plans]
        (found,) = run(kernels, case, [inputs(case)], (cuts[0], cuts[1]))
        assert_matches(found, expect(case, inputs(case)), case.dtype, LOW_PRECISION)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """main.cpp under each sanitizer, compiled side by side."""
    folder = tmp_path_factory.mktemp("sanitizers")
    flags = {
        "thread": ["-fsanitize=thread"],
        "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover"],
    }
    with ThreadPoolExecutor() as pool:
        made = {
            name: pool.submit(compile_program, with_flags, "main.cpp", folder / name)
            for name, with_flags in flags.items()
        }
    return {name: program.result() for name, program in made.items()}


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_are_silent(sanitizer: str, programs: dict[str, Path]) -> None:
    done = subprocess.run([programs[sanitizer]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "equal\n" and not done.stderr, (
        done.stdout + done.stderr
    )


@pytest.mark.parametrize(("site", "case"), BARRIERS)
def test_a_missing_barrier_is_noticed(site: int, case: int, programs: dict[str, Path]) -> None:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    command = [programs["thread"], str(site), str(case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0, f"nobody noticed that barrier {SITES[site]!r} was left out"
