"""GPUs as a plan sees them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from throughtime import _ext


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
