"""Peak memory of one iteration, each contestant in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from bench.measure import gpu
from bench.operations import OPERATIONS
from bench.operations.operation import Case, Contestant


def peak_mb(contestant: Contestant, case: Case) -> float | None:
    """Growth of memory from before one iteration to its peak, in MB; None if the process failed.

    On a CPU the resident set, on a GPU what torch allocated. The process is forked from one that
    has imported torch and measured nothing, because a process never gives its peak back.
    Weights and input are not counted, gradients and saved activations are.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(_measure, contestant, case, torch.get_num_threads()).result()
    except Exception:  # noqa: BLE001, whatever it raised, or it died
        return None


def _measure(contestant: Contestant, case: Case, threads: int) -> float:
    torch.set_num_threads(threads)
    operation = OPERATIONS[case.op]
    # What a first call allocates once and keeps belongs to no iteration.
    operation.work(contestant, replace(case, T=2, B=1)).iterate(case.mode)
    work = operation.work(contestant, case)
    growth = gpu.growth_mb if case.device == "cuda" else growth_mb
    return growth(lambda: work.iterate(case.mode))


def growth_mb(run: Callable[[], object]) -> float:
    """Growth of the resident set from before ``run`` to its peak, in MB."""
    with contextlib.suppress(OSError):  # the peak starts anew; Linux only
        Path("/proc/self/clear_refs").write_text("5")
    before = _peak_mb()
    run()
    return _peak_mb() - before


def _peak_mb() -> float:
    import resource  # does not exist on Windows

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
