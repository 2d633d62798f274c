"""How the CUDA kernels divide an LSTM on a GPU: ``csrc/lstm/cuda/plan.h`` in words."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

from throughtime import _ext

TIER_VARIABLE = "THROUGHTIME_CUDA_TIER"


class Gpu(NamedTuple):
    """What the plan depends on: of ``Gpu`` in csrc/lstm/cuda/plan.h."""

    compute: int  # capability, 10 * major + minor
    multiprocessors: int
    shared_bytes: int  # of a block, at most
    cluster: int  # blocks of a cluster, at most
    ghz: float
    memory_gbs: float


# By their makers' data sheets.
GPUS: dict[str, Gpu] = {
    "A100": Gpu(80, 108, 166_912, 1, 1.41, 2039),
    "RTX 4090": Gpu(89, 128, 101_376, 1, 2.52, 1008),
    "H100": Gpu(90, 132, 232_448, 16, 1.755, 3350),
    "H200": Gpu(90, 132, 232_448, 16, 1.755, 4800),
    "B200": Gpu(100, 148, 232_448, 16, 1.85, 8000),
    "RTX 5090": Gpu(120, 170, 101_376, 8, 2.41, 1792),
}


def find_gpu(name: str | None, device: torch.device | None) -> tuple[str, Gpu] | None:
    """The named GPU, or the one that a device is, or None.

    Raises:
        ValueError: if the name is not in ``GPUS``.
    """
    if name is not None:
        if name not in GPUS:
            known = ", ".join(map(repr, GPUS))
            raise ValueError(f"explain: gpu should be one of {known}, got {name!r}")
        return name, GPUS[name]
    if device is None or device.type != "cuda" or _ext.cuda_extension is None:
        return None
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.get_device_name(index), Gpu(*_ext.cuda_extension.gpu(index))


def plan(
    gpu: Gpu, dtype: torch.dtype, steps: int, batch: int, directions: int, hidden: int,
    backward: bool,
) -> dict[str, Any]:  # fmt: skip
    """``plan()`` of csrc/lstm/cuda/plan.h for ``[T, B, D, H]``; H is padded to a multiple of 8."""
    assert _ext.extension is not None
    units = -(-hidden // 8) * 8
    found: dict[str, Any] = _ext.extension.lstm_gpu_plan(
        steps, batch, directions, units, dtype.itemsize, backward,
        os.environ.get(TIER_VARIABLE, ""), gpu,
    )  # fmt: skip
    return found


def describe(
    name: str, gpu: Gpu, dtype: torch.dtype, steps: int, batch: int, directions: int, hidden: int
) -> list[str]:
    """The plans of both passes, a line each."""
    if _ext.extension is None:
        return [f"The plan for {name} is not known: {_ext.why_missing()}"]
    shape = f"T={steps}, B={batch}, D={directions}, H={hidden}, {dtype}"
    lines = [f"CUDA kernels on {name}, {shape}; times by a model that no GPU has confirmed yet:"]
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
