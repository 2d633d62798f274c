"""Triton kernels, one module per operator, and what they share."""

from __future__ import annotations

if __name__ != "throughtime.triton_kernels":
    raise ImportError(
        f"these Triton kernels were imported as {__name__!r}, the name of a package that Triton "
        "itself ships: use `import throughtime.triton_kernels`"
    )
