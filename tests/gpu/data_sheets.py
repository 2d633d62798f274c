"""GPUs by their makers' data sheets: those that ``explain`` knows, and others; and a small one."""

from __future__ import annotations

from typing import Any

from throughtime.backends.gpus import GPUS, Gpu

SHEETS: dict[str, dict[str, Any]] = {
    name: gpu._asdict()
    for name, gpu in {
        **GPUS,
        "A10": Gpu(86, 72, 101_376, 1, 1.695, 600),
        "RTX 3090": Gpu(86, 82, 101_376, 1, 1.695, 936),
        "L4": Gpu(89, 58, 101_376, 1, 2.04, 300),
        "H100, a seventh of it": Gpu(90, 16, 232_448, 8, 1.755, 420),
    }.items()
}

# Not for sale: 40 units need several of its blocks.
SMALL: dict[str, Any] = {
    "compute": 90,
    "multiprocessors": 12,
    "shared_bytes": 48 << 10,
    "cluster": 4,
}
