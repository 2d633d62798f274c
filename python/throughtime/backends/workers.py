"""How many workers the CPU kernels run on, and why."""

from __future__ import annotations

import torch

from throughtime import _ext


def workers() -> str | None:
    """One line about this moment; None without compiled kernels."""
    if _ext.extension is None:
        return None
    found = _ext.extension.workers()
    count, taken = found["workers"], found["taken"]
    limits = [f"torch threads: {torch.get_num_threads()}", f"CPUs: {found['affinity']}"]
    limits.append(f"quota: {found['quota']:g} CPUs" if found["quota"] else "no quota")
    if taken:
        limits.append(f"left to other processes for now: {taken}")
    return f"{count} ({', '.join(limits)})"
