"""Peak memory of one forward and backward, each implementation in a fresh process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from throughtime.bench.cases import Case
from throughtime.bench.workload import Workload


def peak_mb(
    impl: str, case: Case, p: float, dtype: torch.dtype, *, backend: str = "auto"
) -> float | None:
    """Growth of the resident set from before to the peak of one forward and backward, in MB.

    Runs in a new process, because a process never gives its peak back. Weights and input are not
    counted, gradients and saved activations are. None if that process failed.
    """
    sizes = [str(n) for n in (case.steps, case.batch, case.input_size, case.hidden_size)]
    arguments = [impl, *sizes, str(p), str(dtype).removeprefix("torch."), backend]
    return in_new_process("throughtime.bench.memory", arguments)


def in_new_process(module: str, arguments: Sequence[str]) -> float | None:
    """The number that ``python -m module arguments threads`` prints, or None if it fails."""
    threads = str(torch.get_num_threads())
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments, threads],
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


def main(arguments: list[str]) -> None:
    """Measures in this process; the arguments are those that ``peak_mb`` passes."""
    impl, *sizes, p, dtype_name, backend, threads = arguments
    torch.set_num_threads(int(threads))
    dtype: torch.dtype = getattr(torch, dtype_name)
    case = Case(*(int(size) for size in sizes))
    tiny = Case(2, 2, case.input_size, min(case.hidden_size, 16))
    Workload.make(impl, tiny, float(p), dtype, backend=backend).iterate("forward+backward")
    work = Workload.make(impl, case, float(p), dtype, backend=backend)
    print(growth_mb(lambda: work.iterate("forward+backward")))


if __name__ == "__main__":
    main(sys.argv[1:])
