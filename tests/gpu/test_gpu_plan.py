"""csrc/lstm/cuda/plan.h: how the GPU kernels divide an LSTM, on GPUs that are not here."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from hypothesis import example, settings
from hypothesis import given as drawn
from hypothesis import strategies as st

from data_sheets import SHEETS, SMALL

RESIDENT, GRID, STEPWISE = 1, 2, 3  # Tier of csrc/lstm/cuda/plan.h
A100, H100 = SHEETS["A100"], SHEETS["H100"]

Sheet = dict[str, Any]


def assert_runnable(kernels: ModuleType, gpu: Sheet, *, tier: int = 0, **shape: Any) -> bool:
    """False if the plan is stepwise, which always runs, or if there is none."""
    plan = kernels.plan(**shape, **gpu, tier=tier)
    if plan.tier not in (RESIDENT, GRID):
        return False
    B, D, H, backward = (shape[name] for name in ("B", "D", "H", "backward"))
    assert kernels.instance_exists(shape["scalar_bytes"], backward, plan.tiles_n, plan.held)
    assert plan.threads <= kernels.most_threads(shape["scalar_bytes"], plan.tiles_n, plan.held)
    assert 0 < plan.shared_bytes <= gpu["shared_bytes"]
    assert plan.groups * 8 * plan.tiles_n >= B
    assert (plan.ranks - 1) * plan.units < H <= plan.ranks * plan.units
    if plan.tier == GRID:
        assert D * plan.groups * plan.ranks <= gpu["multiprocessors"]
    else:
        assert plan.ranks <= gpu["cluster"]
    warps, slabs, parts = plan.threads // 32, plan.units // 8, plan.parts
    if backward:
        assert warps >= slabs and slabs % parts == 0
    else:
        assert warps == slabs * parts
        tiles = -(-H // 32)
        assert (parts - 1) * -(-tiles // parts) < tiles, "a part has no tiles"
    return True


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("gpu", "H", "B", "scalar_bytes", "tier"),
    [
        (H100, 128, 16, 2, RESIDENT),
        (H100, 256, 64, 2, RESIDENT),
        (H100, 1024, 16, 2, GRID),
        (H100, 4096, 16, 2, STEPWISE),
        (H100, 2048, 128, 4, STEPWISE),
        (A100, 96, 16, 2, RESIDENT),  # a cluster of one block
        (A100, 512, 16, 2, GRID),
        (SMALL, 2048, 16, 4, STEPWISE),
    ],
)
def test_plan_takes_the_tier_that_fits(
    gpu: Sheet, H: int, B: int, scalar_bytes: int, tier: int, backward: bool,
    kernels: ModuleType,
) -> None:  # fmt: skip
    shape = {"T": 1024, "B": B, "D": 1, "H": H, "scalar_bytes": scalar_bytes}
    assert kernels.plan(**shape, backward=backward, **gpu).tier == tier


def test_plan_says_why_nothing_runs(kernels: ModuleType) -> None:
    old = {**H100, "compute": 75}
    plan = kernels.plan(1, 1, 1, 8, 2, False, **old)
    assert plan.tier == 0 and "8.0" in plan.reason
    for shape in (
        (0, 1, 1, 8), (1, 0, 1, 8), (1, 1, 1, 0), (1, 1, 1, 12), (2**31, 1, 1, 8), (1, 1, 3, 8),
    ):  # fmt: skip
        plan = kernels.plan(*shape, 2, False, **H100)
        assert plan.tier == 0 and "multiple of 8" in plan.reason, shape


@settings(max_examples=200, deadline=None)
@example(  # more blocks to a cluster than multiprocessors
    T=1, B=1, D=1, H=64, scalar_bytes=2, backward=False, tf32=False,
    gpu={"compute": 90, "multiprocessors": 1, "shared_bytes": 99 << 10, "cluster": 8},
)  # fmt: skip
@drawn(
    T=st.integers(1, 10_000),
    B=st.integers(1, 3_000),
    D=st.integers(1, 2),
    H=st.integers(1, 1_200).map(lambda n: 8 * n),
    scalar_bytes=st.sampled_from([2, 4]),
    backward=st.booleans(),
    tf32=st.booleans(),
    gpu=st.fixed_dictionaries({
        "compute": st.sampled_from([80, 86, 90, 100]),
        "multiprocessors": st.integers(1, 160),
        "shared_bytes": st.sampled_from([8 << 10, 48 << 10, 99 << 10, 163 << 10, 227 << 10]),
        "cluster": st.sampled_from([1, 8, 16]),
    }),
)  # fmt: skip
def test_every_plan_is_runnable(gpu: Sheet, kernels: ModuleType, **shape: Any) -> None:
    assert_runnable(kernels, gpu, **shape)


@pytest.mark.parametrize("name", SHEETS)
def test_every_plan_for_a_gpu_that_is_sold_is_runnable(name: str, kernels: ModuleType) -> None:
    planned = 0
    for H in range(8, 1025, 8):
        for B, D, scalar_bytes in ((1, 1, 2), (8, 2, 2), (24, 1, 2), (64, 1, 2), (16, 2, 4)):
            for tier in (0, GRID):  # by itself, and as THROUGHTIME_CUDA_TIER forces it
                shape = {"T": 100, "B": B, "D": D, "H": H, "scalar_bytes": scalar_bytes}
                planned += assert_runnable(
                    kernels, SHEETS[name], tier=tier, **shape, backward=False
                )
    assert planned > 200
