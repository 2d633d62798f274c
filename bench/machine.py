"""What identifies a measurement: machine, versions, revision, command."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import throughtime
from bench.measure import gpu

BUSY_LOAD_PER_CORE = 0.5


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    brand = _output(["sysctl", "-n", "machdep.cpu.brand_string"])  # macOS
    return brand or platform.processor() or platform.machine() or "unknown processor"


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def name(device: str = "cpu") -> str:
    """Processor, cores and operating system in one line, for a column of a table; a GPU first."""
    host = f"{cpu_model()}, {cores()} cores, {platform.system()} {platform.machine()}"
    if device == "cuda" and gpu.why_not() is None:
        return f"{torch.cuda.get_device_name()}; {host}"
    return host


def slug() -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()} {cores()}core".lower()).strip("-")


def command_line() -> str:
    """The command of this process, without the folder of its program."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = [Path(sys.argv[0]).name]
    if spec is not None:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*program, *sys.argv[1:]])


def columns(device: str = "cpu") -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "machine": name(device),
        "torch": torch.__version__,
        "command": command_line(),
    }


def header(device: str = "cpu") -> list[str]:
    """The lines above every benchmark, the last a warning if other programs use the cores."""
    revision = _output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"])
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    lines = [
        f"machine: {name(device)}",
        f"threads: {torch.get_num_threads()}, load average {load:.2f}",
        f"torch {torch.__version__}, python {platform.python_version()}, "
        f"throughtime {throughtime.__version__}" + (f" ({revision})" if revision else ""),
    ]
    if device == "cuda" and gpu.why_not() is None:
        lines.append(gpu.cudnn())
    if load > BUSY_LOAD_PER_CORE * cores():
        lines.append(
            f"warning: this machine is busy (load average {load:.1f} on {cores()} cores): ratios "
            "of alternated runs still mean something, times do not"
        )
    return lines


def _output(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
