"""The CPU kernels of this process: how many workers they run on, and what memory they keep."""

from __future__ import annotations

import torch

from throughtime import _ext


def workers() -> str | None:
    """One line about this moment, with the instruction set; None without compiled kernels."""
    if _ext.extension is None:
        return None
    found = _ext.extension.workers()
    count, taken = found["workers"], found["taken"]
    limits = [f"torch threads: {torch.get_num_threads()}", f"CPUs: {found['affinity']}"]
    limits.append(f"quota: {found['quota']:g} CPUs" if found["quota"] else "no quota")
    if taken:
        limits.append(f"left to other processes for now: {taken}")
    limits.append(f"instruction set: {_ext.extension.isa()}")
    return f"{count} ({', '.join(limits)})"


def empty_cache() -> None:
    """Give the CPU kernels' idle buffers back to the operating system.

    Example:
        >>> import throughtime
        >>> throughtime.empty_cache()
    """
    if _ext.extension is not None:
        _ext.extension.empty_cache()
