"""What a measurement needs to be told apart from the same one elsewhere."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import throughtime
from bench import cuda

BUSY_LOAD_PER_CORE = 0.5


def cpu_model() -> str:
    """The name of the processor, as the operating system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        answer = _output(["sysctl", "-n", "machdep.cpu.brand_string"])
        if answer:
            return answer
    return platform.processor() or platform.machine() or "unknown processor"


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def git_revision() -> str | None:
    """The revision of the checkout that this file lies in, or None if it lies in none."""
    return _output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"])


def busy() -> str | None:
    """A warning if other programs were using the cores in the last minute, else None."""
    if not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    if load <= BUSY_LOAD_PER_CORE * cores():
        return None
    return (
        f"this machine is busy (load average {load:.1f} on {cores()} cores): "
        "ratios of alternated runs still tell something, times do not"
    )


def name(device: str = "cpu") -> str:
    """Processor, cores and operating system in one line, for a column of a table; a GPU first."""
    host = f"{cpu_model()}, {cores()} cores, {platform.system()} {platform.machine()}"
    if device == "cuda" and cuda.why_not() is None:
        return f"{torch.cuda.get_device_name()}; {host}"
    return host


def slug() -> str:
    """Processor and cores as the name of a folder.

    Example:
        >>> re.fullmatch(r"[a-z0-9-]+-[0-9]+core", slug()) is not None
        True
    """
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()} {cores()}core".lower()).strip("-")


def command_line() -> str:
    """The command of this process, without the folders that its program lies in.

    Example:
        >>> "/" in command_line().split()[0]
        False
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = [Path(sys.argv[0]).name]
    if spec is not None:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*program, *sys.argv[1:]])


def header(devices: Sequence[str] = ("cpu",)) -> list[str]:
    """The lines that stand above every benchmark."""
    revision = git_revision()
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    return [
        f"machine: {name()}",
        f"threads: {torch.get_num_threads()}, load average {load}",
        f"torch {torch.__version__}, python {platform.python_version()}, "
        f"throughtime {throughtime.__version__}" + (f" ({revision})" if revision else ""),
        *(cuda.header() if "cuda" in devices and cuda.why_not() is None else []),
    ]


def _output(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
