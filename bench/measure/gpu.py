"""Measuring on a GPU: events, flushed caches, what torch allocated."""

from __future__ import annotations

from collections.abc import Callable

import torch

FLUSH_MB = 256  # several times the largest L2 so far (50 MB on an H100)


def why_not() -> str | None:
    """Why nothing can be measured on a GPU here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "torch sees no CUDA device here"


class EventTimer:
    """Seconds of the GPU between two events, with a flushed L2 cache before every run.

    Holds products to float32; torch lets those of cuDNN, and so ours, take TF32 otherwise.
    """

    def __init__(self) -> None:
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        self._flush = torch.empty(FLUSH_MB * 2**20, dtype=torch.int8, device="cuda")

    def __call__(self, run: Callable[[], object], repeats: int) -> float:
        pairs = []
        for _ in range(repeats):
            self._flush.zero_()
            start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return 1e-3 * float(sum(start.elapsed_time(end) for start, end in pairs))


def growth_mb(run: Callable[[], object]) -> float:
    """Growth of what torch has allocated from before ``run`` to its peak, in MB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
