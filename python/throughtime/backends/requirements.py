"""What backends need; a requirement answers None, or one sentence: the reason and the way out."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from throughtime import _ext
from throughtime.backends.backend import WAY_OUT, Request, Requirement
from throughtime.constant import constant_result

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # Dynamo warns of cached functions

_NO_GPU = f"torch sees no GPU here; move the tensors to the CPU, or {WAY_OUT}"

COMPILED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def no_projection(kernels: str) -> Requirement:
    """The kernels know no projection."""

    def requirement(request: Request) -> str | None:
        if request.proj_size:
            return f"proj_size={request.proj_size} is not supported by the {kernels}; {WAY_OUT}"
        return None

    return requirement


def zeros_at_resets(kernels: str) -> Requirement:
    """The kernels start anew from zeros only."""

    def requirement(request: Request) -> str | None:
        if request.reset_hx:
            return (
                f"reset_hx is not supported by the {kernels}, which start from zeros where reset "
                f"is set; {WAY_OUT}"
            )
        return None

    return requirement


def no_cells(kernels: str) -> Requirement:
    """The kernels give c of the last step only."""

    def requirement(request: Request) -> str | None:
        if request.return_cells:
            return f"return_cells is not supported by the {kernels}; {WAY_OUT}"
        return None

    return requirement


def screens_as_the_paper(kernels: str) -> Requirement:
    """The kernels know relevancy screening as its paper has it."""

    def requirement(request: Request) -> str | None:
        if request.beyond_paper:
            asked = ", ".join(request.beyond_paper)
            return f"{asked}: not supported by the {kernels}; {WAY_OUT}"
        return None

    return requirement


def lstm_cell(request: Request) -> str | None:
    """The kernels know the LSTM's cell only."""
    if request.cell != "lstm":
        return f"cell={request.cell!r} runs on backend 'reference' only; {WAY_OUT}"
    return None


def dtypes(kernels: str, known: tuple[torch.dtype, ...] = COMPILED_DTYPES) -> Requirement:
    """The kernels know these dtypes."""

    def requirement(request: Request) -> str | None:
        if request.dtype is not None and request.dtype not in known:
            return f"{request.dtype} is not supported by the {kernels}; {WAY_OUT}"
        return None

    return requirement


def floating_point(request: Request) -> str | None:
    """Any floating point dtype."""
    if request.dtype is not None and not request.dtype.is_floating_point:
        return f"{request.dtype} is not a floating point dtype; convert with input.float()"
    return None


def cpu_tensors(request: Request) -> str | None:
    """Tensors on the CPU, or on meta, where operators compute shapes without kernels."""
    if request.device is not None and request.device.type not in ("cpu", "meta"):
        return f"the tensors are on {request.device}, not on the CPU; move them, or {WAY_OUT}"
    return None


def cpu_kernels(request: Request) -> str | None:
    """The compiled CPU kernels."""
    if request.device is not None and request.device.type == "meta":
        return None
    return missing_kernels()


def missing_kernels() -> str | None:
    """Why the compiled CPU kernels are not loaded, with the command that builds them, or None."""
    return _ext.why_missing()


def cuda_tensors(request: Request) -> str | None:
    """Tensors on a GPU."""
    if request.device is not None and request.device.type != "cuda":
        others = _where_they_are(request)
        return f"the tensors are on {request.device}, not on a GPU; move them, or {others}"
    return None


def cuda_kernels(request: Request) -> str | None:
    """The compiled CUDA kernels, and a GPU that they run on."""
    missing = _ext.why_missing("cuda")
    if missing is not None or request.device is None:
        return missing
    if not torch.cuda.is_available():
        return _NO_GPU
    index = request.device.index
    return _gpu(torch.cuda.current_device() if index is None else index)


@constant_result
def _gpu(index: int) -> str | None:
    """Why the CUDA kernels do not run on a GPU."""
    return _found_of_gpu(index)


@functools.cache
def _found_of_gpu(index: int) -> str | None:
    assert _ext.cuda_extension is not None
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        name = torch.cuda.get_device_name(index)
        return (
            f"{name} is of compute capability {major}.{minor}, and the CUDA kernels need 8.0 or "
            f"later; {WAY_OUT}"
        )
    reason: str | None = _ext.cuda_extension.why_not(index)
    return reason if reason is None else f"{reason}, or {WAY_OUT}"


def triton(request: Request) -> str | None:
    """Triton, and a GPU or Triton's interpreter."""
    if not _HAS_TRITON:
        return f"Triton is not installed: pip install triton, or {WAY_OUT}"
    if request.device is None:
        return None
    if request.device.type == "cuda":
        return None if torch.cuda.is_available() else _NO_GPU
    if request.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"the tensors are on {request.device}, and Triton needs a GPU (or its slow interpreter for "
        f"tests: TRITON_INTERPRET=1 before Triton is imported); {_where_they_are(request)}"
    )


def _where_they_are(request: Request) -> str:
    """The way out that leaves tensors where they are."""
    if request.device == torch.device("cpu") and not missing_kernels():
        return WAY_OUT.replace("=", "='cpu', ")
    return WAY_OUT
