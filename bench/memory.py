"""Peak memory of one iteration, each contestant in a fresh process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import cuda, rooms
from bench.cell import Cell, Contestant
from bench.operation import Operation


def peak_mb(operation: Operation, contestant: Contestant, cell: Cell) -> float | None:
    """Growth of memory from before to the peak of one iteration, in MB.

    On a CPU that of the resident set, on a GPU that of what torch allocated. Runs in a new
    process, because a process never gives its peak back. Weights and input are not counted,
    gradients and saved activations are. None if that process failed.
    """
    order = {
        "operation": operation.name,
        "contestant": dataclasses.asdict(contestant),
        "cell": dataclasses.asdict(cell),
        "threads": torch.get_num_threads(),
    }
    result = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(order)],
        check=False,
        capture_output=True,
        text=True,
    )
    return float(result.stdout) if result.returncode == 0 else None


def growth_mb(run: Callable[[], object]) -> float:
    """Growth of the resident set from before ``run`` to its peak, in MB."""
    _forget_peak()
    before = _peak_mb()
    run()
    return _peak_mb() - before


def _forget_peak() -> None:
    """Lets the peak start anew, so that imports do not hide what follows (Linux only)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / 2**10
    import resource  # does not exist on Windows, where peak_mb has no answer

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def main(order: str) -> None:
    """Measures in this process what ``peak_mb`` ordered, and prints the number."""
    ordered = json.loads(order)
    operation = rooms.OPERATIONS[ordered["operation"]]
    contestant = Contestant(**ordered["contestant"])
    cell = Cell(**ordered["cell"])
    cell = dataclasses.replace(cell, case=operation.case(cell.case))
    torch.set_num_threads(ordered["threads"])
    # What a first call allocates once and keeps belongs to no iteration.
    operation.work(contestant, dataclasses.replace(cell, case=cell.case.tiny())).iterate(cell.mode)
    work = operation.work(contestant, cell)
    growth = cuda.growth_mb if cell.device == "cuda" else growth_mb
    print(growth(lambda: work.iterate(cell.mode)))


if __name__ == "__main__":
    main(sys.argv[1])
