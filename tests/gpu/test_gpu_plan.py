"""csrc/lstm/cuda/plan.h: how the GPU kernels cut an LSTM, on GPUs of which there is none here."""

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


def plan(kernels: ModuleType, gpu: Sheet, backward: bool, **shape: int) -> dict[str, Any]:
    found: dict[str, Any] = kernels.plan(**{"D": 1, **shape}, backward=backward, **gpu)
    return found


def assert_runnable(
    found: dict[str, Any], gpu: Sheet, backward: bool, B: int, D: int, H: int
) -> None:
    assert found["exists"] and found["threads"] <= found["most_threads"]
    assert 0 < found["shared_bytes"] <= gpu["shared_bytes"]
    assert found["groups"] * 8 * found["tiles_n"] >= B
    assert (found["ranks"] - 1) * found["units"] < H <= found["ranks"] * found["units"]
    if found["tier"] == GRID:
        assert D * found["groups"] * found["ranks"] <= gpu["multiprocessors"]
    else:
        assert found["ranks"] <= gpu["cluster"]
    warps, slabs, parts = found["threads"] // 32, found["units"] // 8, found["parts"]
    if backward:
        assert warps >= slabs and slabs % parts == 0
    else:
        assert warps == slabs * parts
        tiles = -(-H // 32)
        assert (parts - 1) * -(-tiles // parts) < tiles, "a part has no tiles"


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
    found = plan(kernels, gpu, backward, T=1024, B=B, H=H, scalar_bytes=scalar_bytes)
    assert found["tier"] == tier, found


def test_plan_says_why_nothing_runs(kernels: ModuleType) -> None:
    old = {**H100, "compute": 75}
    found = plan(kernels, old, False, T=1, B=1, H=8, scalar_bytes=2)
    assert found["tier"] == 0 and "8.0" in found["reason"]
    for shape in (
        (0, 1, 1, 8), (1, 0, 1, 8), (1, 1, 1, 0), (1, 1, 1, 12), (2**31, 1, 1, 8), (1, 1, 3, 8),
    ):  # fmt: skip
        found = plan(kernels, H100, False, **dict(zip("TBDH", shape, strict=True)), scalar_bytes=2)
        assert found["tier"] == 0 and "multiple of 8" in found["reason"], shape


@settings(max_examples=200, deadline=None)
@example(  # more blocks to a cluster than multiprocessors
    T=1, B=1, D=1, H=64, scalar_bytes=2, backward=False,
    gpu={"compute": 90, "multiprocessors": 1, "shared_bytes": 99 << 10, "cluster": 8},
)  # fmt: skip
@drawn(
    T=st.integers(1, 10_000),
    B=st.integers(1, 3_000),
    D=st.integers(1, 2),
    H=st.integers(1, 1_200).map(lambda n: 8 * n),
    scalar_bytes=st.sampled_from([2, 4]),
    backward=st.booleans(),
    gpu=st.fixed_dictionaries({
        "compute": st.sampled_from([80, 86, 90, 100]),
        "multiprocessors": st.integers(1, 160),
        "shared_bytes": st.sampled_from([8 << 10, 48 << 10, 99 << 10, 163 << 10, 227 << 10]),
        "cluster": st.sampled_from([1, 8, 16]),
    }),
)  # fmt: skip
def test_every_plan_is_runnable(
    T: int, B: int, D: int, H: int, scalar_bytes: int, backward: bool, gpu: Sheet,
    kernels: ModuleType,
) -> None:  # fmt: skip
    found = plan(kernels, gpu, backward, T=T, B=B, D=D, H=H, scalar_bytes=scalar_bytes)
    if found["tier"] == STEPWISE:
        return
    assert_runnable(found, gpu, backward, B, D, H)


@pytest.mark.parametrize("name", SHEETS)
def test_every_plan_for_a_gpu_that_is_sold_is_runnable(name: str, kernels: ModuleType) -> None:
    gpu, planned = SHEETS[name], 0
    for H in range(8, 1025, 8):
        for B, D, scalar_bytes in ((1, 1, 2), (8, 2, 2), (24, 1, 2), (64, 1, 2), (16, 2, 4)):
            for tier in (0, GRID):  # by itself, and as THROUGHTIME_CUDA_TIER wants it
                found = plan(
                    kernels, gpu, False, T=100, B=B, D=D, H=H, scalar_bytes=scalar_bytes, tier=tier
                )
                if found["tier"] in (RESIDENT, GRID):
                    assert_runnable(found, gpu, False, B, D, H)
                    planned += 1
    assert planned > 200
