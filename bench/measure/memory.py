"""Peak memory of one iteration, each contestant in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    receiver, sender = context.Pipe(duplex=False)
    arguments = contestant, case, torch.get_num_threads(), sender
    process = context.Process(target=_measure, args=arguments)
    process.start()
    sender.close()
    try:
        return float(receiver.recv())
    except EOFError:  # it died
        return None
    finally:
        process.join()


def _measure(contestant: Contestant, case: Case, threads: int, sender: Any) -> None:
    torch.set_num_threads(threads)
    operation = OPERATIONS[case.op]
    # What a first call allocates once and keeps belongs to no iteration.
    tiny = replace(case, T=2, B=1)
    operation.work(contestant, tiny).iterate(case.mode)
    work = operation.work(contestant, case)
    growth = gpu.growth_mb if case.device == "cuda" else growth_mb
    sender.send(growth(lambda: work.iterate(case.mode)))


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
