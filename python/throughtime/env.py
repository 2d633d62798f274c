"""``report()`` describes an installation: versions, what was built, which backends can run."""

from __future__ import annotations

import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from throughtime import _ext
from throughtime.backends.backend import ORDER, Request, can_run
from throughtime.backends.cpu import workers

# Name and default.
VARIABLES = {
    "THROUGHTIME_ACCELERATE": "0",
    "THROUGHTIME_BACKEND": "auto",
    "THROUGHTIME_BUILD": "auto",
    "THROUGHTIME_CPU_ISA": "the best",
    "THROUGHTIME_CUDA_TIER": "the plan's",
    "THROUGHTIME_LOG_LEVEL": "WARNING",
    "TORCH_CUDA_ARCH_LIST": "the GPUs here, or 8.0;9.0a;10.0+PTX",
    "MAX_JOBS": "one per core",
}


def report() -> str:
    """Describe this installation, for a reader and for an issue report.

    Returns:
        Several lines: versions, machine, build, backends with the reason why not, environment
        variables.

    Example:
        >>> from throughtime import env
        >>> assert "throughtime" in env.report() and "reference" in env.report()
    """
    sections = (
        ("Versions", _versions()),
        ("Machine", _machine()),
        ("Build", _build()),
        ("Backends", _backends()),
        ("Environment", _environment()),
    )
    width = max(len(name) for _, rows in sections for name, _ in rows)
    lines = []
    for title, rows in sections:
        lines.append(title)
        lines += [f"  {name.ljust(width)}  {value}".rstrip() for name, value in rows]
    return "\n".join(lines)


def _versions() -> list[tuple[str, str]]:
    rows = [("python", platform.python_version()), ("torch", torch.__version__)]
    for package in ("triton", "throughtime"):
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def _machine() -> list[tuple[str, str]]:
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return [
        ("system", platform.platform()),
        ("CPU", _cpu_name()),
        ("CPU capability", torch.backends.cpu.get_cpu_capability()),
        ("cores", str(os.cpu_count())),
        ("torch threads", str(torch.get_num_threads())),
        ("CPU workers", workers() or "none"),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("GPU", ", ".join(gpus) or "none"),
    ]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _build() -> list[tuple[str, str]]:
    """The record that setup.py wrote, and the instruction sets of the loaded extension."""
    rows = []
    try:
        info = import_module("throughtime._build_info")
    except ImportError:
        rows.append(("record", "none: this is a source tree, or an editable installation of one"))
    else:
        rows += [(f"built {name}", str(what)) for name, what in info.built.items()]
        rows += [(f"left out {name}", str(reason)) for name, reason in info.left_out.items()]
        for name in ("compiler", "flags", "torch", "nvcc"):
            label = "built with torch" if name == "torch" else name
            rows.append((label, str(getattr(info, name, None) or "none")))
    if _ext.extension is not None:
        rows.append(("instruction set", _ext.extension.isa()))
        rows.append(("runs here", ", ".join(_ext.extension.runnable_isas())))
        rows.append(("float32 products", _float32_products(_ext.extension)))
    return rows


def _float32_products(kernels: Any) -> str:
    """Of large LSTMs: what multiplies them, and what torch's switch asks for."""
    if not kernels.float32_parts(100, 64, 512, 512, 512):
        return "by vectors"
    parts: int = kernels.float32_parts_asked()
    asked = torch.get_float32_matmul_precision()
    return f"of large LSTMs by AMX in {parts} bfloat16 part{'s' * (parts > 1)} ({asked})"


def _backends() -> list[tuple[str, str]]:
    """Each backend, and whether it can run a float32 LSTM on the device that it is for."""
    rows = []
    for name in ORDER:
        device = torch.device("cuda" if name in ("cuda", "triton") else "cpu")
        reason = can_run(name, Request("lstm", 128, 0, device, torch.float32))
        rows.append((name, "can run" if reason is None else f"cannot run: {reason}"))
    return rows


def _environment() -> list[tuple[str, str]]:
    return [
        (name, os.environ.get(name) or f"not set (default: {default})")
        for name, default in VARIABLES.items()
    ]
