"""How the CUDA kernels divide an LSTM on a GPU: ``csrc/lstm/cuda/plan.h`` in words."""

from __future__ import annotations

import os
from typing import Any

import torch

from throughtime import _ext
from throughtime.backends.backend import Work
from throughtime.backends.gpus import Gpu
from throughtime.ops.lstm.recurrence import takes_tf32

TIER_VARIABLE = "THROUGHTIME_CUDA_TIER"


def plan(
    gpu: Gpu, dtype: torch.dtype, steps: int, batch: int, directions: int, hidden: int,
    backward: bool,
) -> dict[str, Any]:  # fmt: skip
    """``plan()`` of csrc/lstm/cuda/plan.h for ``[T, B, D, H]``; H is padded to a multiple of 8."""
    assert _ext.extension is not None
    units = -(-hidden // 8) * 8
    found: dict[str, Any] = _ext.extension.lstm_gpu_plan(
        steps, batch, directions, units, dtype.itemsize, backward, takes_tf32(dtype),
        os.environ.get(TIER_VARIABLE, ""), gpu,
    )  # fmt: skip
    return found


def describe(where: tuple[str, Gpu], work: Work) -> list[str]:
    """The plans of both passes, a line each."""
    name, gpu = where
    dtype, steps, batch, directions, _, hidden, *_ = work
    if _ext.extension is None:
        return [f"The plan for {name} is not known: {_ext.why_missing()}"]
    rounded = " as TF32" if takes_tf32(dtype) else ""
    shape = f"T={steps}, B={batch}, D={directions}, H={hidden}, {dtype}{rounded}"
    lines = [f"CUDA kernels on {name}, {shape}; times by a model with the latencies of an H200:"]
    for backward in (False, True):
        found = plan(gpu, dtype, steps, batch, directions, hidden, backward)
        lines.append(f"  {'backward' if backward else 'forward'}: {_words(found, steps)}")
    return lines


def _words(found: dict[str, Any], steps: int) -> str:
    tier = found["tier"]
    if tier == "none":
        return f"cannot run: {found['reason']}"
    time = f"about {found['microseconds']:.2f} us a step"
    if tier == "stepwise":
        return f"stepwise: a library's product and one kernel per step, {time}"
    together = "clusters" if tier == "resident" else "groups over the grid"
    return (
        f"{tier}: {found['blocks']} blocks of {found['threads']} threads in {together} of "
        f"{found['ranks']}, {found['units']} units of {found['samples']} samples each, "
        f"{found['shared_bytes']:,} bytes of shared memory, {found['barriers']} barriers between "
        f"blocks in {steps} steps, {time}"
    )
