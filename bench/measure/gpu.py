"""Measuring on a GPU: events, flushed caches, what torch allocated."""

from __future__ import annotations

from collections.abc import Callable

import torch

FAST_CUDNN = 91_300  # its LSTM in bfloat16
FLUSH_MB = 256  # several times the largest L2 so far (50 MB on an H100)


def why_not() -> str | None:
    """Why nothing can be measured on a GPU here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "torch sees no CUDA device here"


def cudnn() -> str:
    """The version of cuDNN, and whether a newer one should be compared with."""
    number = torch.backends.cudnn.version() or 0
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1000)
    text = f"cuDNN {major}.{rest // 100}.{rest % 100}"
    if number >= FAST_CUDNN:
        return text
    return f"{text}: measure nn.LSTM in bfloat16 with 9.13 or later, older ones are slower at it"


class EventTimer:
    """Seconds of the GPU between two events, with a flushed L2 cache before every run."""

    def __init__(self) -> None:
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
