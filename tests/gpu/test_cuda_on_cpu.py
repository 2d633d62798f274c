"""The LSTM's GPU kernels, run on the CPU by tests/gpu/cuda_on_cpu: against a loop, and sanitizers.

See csrc/common/cuda/device.cuh: the kernels' sources are the ones that nvcc compiles.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cases_gpu import short
from cases_recurrence import (
    Case,
    Given,
    assert_matches,
    assert_remembers,
    check,
    expect,
    inputs,
    long_memory,
    run,
)
from closeness import assert_close, rms
from data_sheets import SMALL
from host_kernels import CSRC, SANITIZERS, SOURCES, HostKernels, program

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW_PRECISION = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
RESIDENT, GRID, STEPWISE = 1, 2, 3  # Tier of csrc/lstm/cuda/plan.h
SITES = ("start", "forward parts", "forward step", "forward copy", "backward gates",
         "backward step", "backward parts")  # fmt: skip
# Barriers and cases of main.cpp that pass them: one block, a cluster, a grid.
BARRIERS = [
    *((site, case) for site in (0, 2, 5) for case in (0, 2, 4)),
    (1, 0), (1, 4), (3, 4), (4, 0), (4, 2), (4, 4), (6, 4),
]  # fmt: skip

Sizes = dict[str, int]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)


def host_of(kernels: ModuleType, tier: int, forward: Sizes, backward: Sizes) -> HostKernels:
    """With plans by hand: plan() does not divide so few units among several blocks."""

    def plan(**shape: Any) -> Any:
        return kernels.hand_plan(**shape, tier=tier, **(backward if shape["backward"] else forward))

    return HostKernels(kernels, plan)


# Tier, sizes of the partition forward and backward, sizes and options of the case.
PARTITIONS: list[tuple[str, int, Sizes, Sizes, dict[str, Any]]] = [
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


@each_dtype
@pytest.mark.parametrize(
    ("tier", "forward", "backward", "sizes"),
    [pytest.param(*case, id=name) for name, *case in PARTITIONS],
)
def test_kernels_match_the_loop(
    tier: int,
    forward: Sizes,
    backward: Sizes,
    sizes: dict[str, Any],
    dtype: torch.dtype,
    kernels: ModuleType,
) -> None:
    directions = sizes.get("directions", 1)
    case = Case(**{n: x for n, x in sizes.items() if n != "directions"}, dtype=dtype)
    if forward.get("tiles_n") == 4 and dtype == torch.float32:
        forward = backward
    host = host_of(kernels, tier, forward, backward)
    check(case, directions, host.forward, host.backward, LOW_PRECISION)


def rounded(x: Tensor) -> Tensor:
    """To TF32: 10 bits after the leading one, the nearest, ties to even."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32).double()


# One step: h_0 and weight_hh meet in the forward, grad_gates and weight_hh in the backward.
ONE_STEP = Case(1, 9, 136, torch.float32)


def one_step(case: Case, kernels: ModuleType, **sizes: int) -> tuple[Given, dict[str, Tensor]]:
    given = inputs(case)
    host = host_of(kernels, RESIDENT, {"ranks": 4, **sizes}, {"ranks": 4, **sizes})
    (found,) = run(case, [given], host.forward, host.backward)
    return given, found


@pytest.mark.parametrize("sizes", [{}, {"held": 4}, {"tiles_n": 2}], ids=str)
@pytest.mark.parametrize("tf32", [False, True])
def test_products_of_float32_take_tf32_where_torch_allows_it(
    tf32: bool, sizes: Sizes, kernels: ModuleType
) -> None:
    case = replace(ONE_STEP, tf32=tf32)
    given, found = one_step(case, kernels, **sizes)
    product = found["grad_gates"][0].double() @ given.weight_hh.double()
    rounds = rounded(found["grad_gates"][0]) @ rounded(given.weight_hh)
    assert_close(found["grad_h_0"], (rounds if tf32 else product).float())
    exact = expect(case, given)["output"]
    given.h_0, given.weight_hh = rounded(given.h_0).float(), rounded(given.weight_hh).float()
    rounds = expect(case, given)["output"]
    assert_close(found["output"], rounds if tf32 else exact)
    assert (rounds - exact).abs().max() > 1e-4  # they differ


@pytest.mark.parametrize("sizes", [{}, {"held": 4}, {"tiles_n": 2}], ids=str)
def test_split_products_are_as_exact_as_float32(sizes: Sizes, kernels: ModuleType) -> None:
    given, found = one_step(ONE_STEP, kernels, **sizes)
    da, weight = found["grad_gates"][0], given.weight_hh
    exact = da.double() @ weight.double()
    plain = torch.zeros(exact.shape)
    for k in range(da.size(1)):  # one sum after the other, rounded to float32
        plain += da[:, k : k + 1] * weight[k]
    assert rms(found["grad_h_0"], exact) <= rms(plain, exact)


@pytest.mark.parametrize("tf32", [False, True])
def test_infinite_and_undefined_numbers_go_through_products(
    tf32: bool, kernels: ModuleType
) -> None:
    case = replace(ONE_STEP, tf32=tf32)
    for value in (torch.inf, -torch.inf, torch.nan):
        given = inputs(case)
        given.h_0[3, 5] = value
        host = host_of(kernels, RESIDENT, {"ranks": 4}, {"ranks": 4})
        (found,) = run(case, [given], host.forward, host.backward)
        wanted = expect(case, given)["output"][0]
        undefined = value != value
        assert found["output"][0].isnan().any(1).tolist() == [
            undefined and b == 3 for b in range(9)
        ]
        if not undefined:  # every gate of the sample is open or closed
            assert_close(found["output"][0, 3], wanted[3])


@each_dtype
def test_derivatives_of_saved_gates_are_right_where_they_are_small(
    dtype: torch.dtype, kernels: ModuleType
) -> None:
    sums = torch.linspace(-5, 5, 999)
    for r in range(4):
        name = short(dtype)
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


@each_dtype
@pytest.mark.parametrize("tier", [RESIDENT, STEPWISE])
def test_a_long_memory_keeps_its_gradient(
    tier: int, dtype: torch.dtype, kernels: ModuleType
) -> None:
    case, given = long_memory(dtype)
    host = host_of(kernels, tier, {}, {})
    (found,) = run(case, [given], host.forward, host.backward)
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
    host = host_of(kernels, tier, sizes, sizes)
    done = {}
    for open_steps in (0, 1, 3):
        given = inputs(case)
        given.detach_mask = torch.ones(5, 3, dtype=torch.bool)
        given.detach_mask[1 : 1 + open_steps, 2] = False  # one sample is enough
        run(case, [given], host.forward, host.backward)
        forward, done[open_steps] = host.work[-2:]
        assert forward[0] > 0 and (forward[1] > 0) == waits
    assert done[0] == (0, 0)
    assert done[1][0] > 0 and (done[1][1] > 0) == waits
    assert done[3] == (3 * done[1][0], 3 * done[1][1])


def test_plans_run(kernels: ModuleType) -> None:
    """More units than a block has warps for: a cluster, and without clusters a grid."""
    case = Case(2, 3, 136, torch.bfloat16, lengths=True, reset=True, mask="TB")
    for cluster, tier in ((4, RESIDENT), (1, GRID)):
        host = HostKernels(kernels, partial(kernels.plan, **{**SMALL, "cluster": cluster}))
        (found,) = run(case, [inputs(case)], host.forward, host.backward)
        assert host.tiers == [tier, tier]
        assert_matches(found, expect(case, inputs(case)), case.dtype, LOW_PRECISION)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_are_silent(sanitizer: str, programs: dict[str, Path]) -> None:
    done = subprocess.run([programs[sanitizer]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize(("site", "case"), BARRIERS)
def test_a_missing_barrier_is_noticed(site: int, case: int, programs: dict[str, Path]) -> None:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    command = [programs["thread"], str(site), str(case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0, f"no test noticed that barrier {SITES[site]!r} was left out"


@pytest.mark.parametrize(
    ("source", "flags"),
    [
        # csrc/lstm/cuda/launch.cu on a fake CUDA runtime: limits that it sets, launches refused.
        ("launching.cpp", [f"-I{SOURCES / 'runtime'}", "-x", "c++", "-Wno-unused-function"]),
        ("latency.cpp", [f"-I{CSRC.parent / 'bench/gpu'}"]),  # the kernels of bench/gpu
    ],
)
def test_a_program_of_checks_finds_nothing_wrong(
    source: str, flags: list[str], request: pytest.FixtureRequest
) -> None:
    path = program(request.config, f"{source}.program", source, flags).result()
    done = subprocess.run([path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
