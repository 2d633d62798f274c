"""What each backend needs: one predicate per backend, all of them here.

A predicate answers None when its backend can run the request, otherwise one sentence with the
reason and the way out.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal, NamedTuple, get_args

import torch

from throughtime import _ext
from throughtime.constant import constant_result

BackendName = Literal["auto", "cuda", "triton", "cpu", "reference"]

NAMES: tuple[str, ...] = get_args(BackendName)

OPS: tuple[str, ...] = ("lstm", "rel_lstm", "relevancy_attention")

# Fastest first: "auto" takes the first that can run.
ORDER: tuple[str, ...] = ("cuda", "triton", "cpu", "reference")

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # Dynamo warns of cached functions

_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COMPILED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Request(NamedTuple):
    """What a backend is asked to run.

    ``op`` is one of ``OPS``; ``hidden_size`` is H, or for relevancy attention the features of a
    head, D. ``device`` and ``dtype`` are None while they are not known yet, as in the constructor
    of a module; only what can never run is refused then.
    """

    op: str
    hidden_size: int
    proj_size: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    cell: str = "lstm"


def can_run(name: str, request: Request) -> str | None:
    """Say why backend ``name`` cannot run ``request``, or None if it can."""
    if name == "cuda":
        return _cuda(request)
    if name == "triton":
        return _triton(request)
    if name == "cpu":
        return _cpu(request)
    if name == "reference":
        return _reference(request)
    raise ValueError(unknown(name, "backend", ORDER))


def passed_over(name: str, request: Request) -> str | None:
    """Say why "auto" does not take backend ``name``, or None if it may."""
    reason = can_run(name, request)
    if reason is None and name == "triton" and request.device == torch.device("cpu"):
        return "Triton's interpreter is for tests and runs only where it is asked for"
    return reason


def unknown(name: object, source: str, names: tuple[str, ...] = NAMES) -> str:
    """The message for a name that is none of ``names``; ``source`` is where it came from."""
    return f"{source} should be one of {', '.join(map(repr, names))}, got {name!r}"


def missing_kernels() -> str | None:
    """Why the compiled CPU kernels are not loaded, with the command that builds them, or None."""
    return _ext.why_missing()


def _cuda(request: Request) -> str | None:
    if request.op != "lstm":
        return f"there are no CUDA kernels for {request.op} in this version yet; {_WAY_OUT}"
    if request.proj_size:
        return f"proj_size={request.proj_size} is not supported by the CUDA kernels; {_WAY_OUT}"
    if request.dtype is not None and request.dtype not in _CUDA_DTYPES:
        return f"{request.dtype} is not supported by the CUDA kernels; {_WAY_OUT}"
    if request.device is not None and request.device.type != "cuda":
        return f"the tensors are on {request.device}, not on a GPU; move them, or {_WAY_OUT}"
    missing = _ext.why_missing("cuda")
    if missing is not None or request.device is None:
        return missing
    if not torch.cuda.is_available():
        return _NO_GPU
    index = request.device.index
    reason: str | None = _gpu(torch.cuda.current_device() if index is None else index)
    return reason


@constant_result
@functools.cache
def _gpu(index: int) -> str | None:
    """Why the CUDA kernels do not run on a GPU."""
    assert _ext.cuda_extension is not None
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        name = torch.cuda.get_device_name(index)
        return (
            f"{name} is of compute capability {major}.{minor}, and the CUDA kernels need 8.0 or "
            f"later; {_WAY_OUT}"
        )
    reason: str | None = _ext.cuda_extension.why_not(index)
    return reason if reason is None else f"{reason}, or {_WAY_OUT}"


def _triton(request: Request) -> str | None:
    if request.proj_size:
        return f"proj_size={request.proj_size} is not supported by the Triton kernels; {_WAY_OUT}"
    if request.cell != "lstm":
        return _no_cell(request)
    if request.dtype is not None and request.dtype not in _COMPILED_DTYPES:
        return f"{request.dtype} is not supported by the Triton kernels; {_WAY_OUT}"
    if not _HAS_TRITON:
        return f"Triton is not installed: pip install triton, or {_WAY_OUT}"
    if request.device is None:
        return None
    if request.device.type == "cuda":
        return None if torch.cuda.is_available() else _NO_GPU
    if request.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"the tensors are on {request.device}, and Triton needs a GPU (or its slow interpreter for "
        f"tests: TRITON_INTERPRET=1 before Triton is imported); {_WAY_OUT}"
    )


def _no_cell(request: Request) -> str:
    return f"cell={request.cell!r} runs on backend 'reference' only; {_WAY_OUT}"


def _cpu(request: Request) -> str | None:
    device = None if request.device is None else request.device.type
    if device not in (None, "cpu", "meta"):
        return f"the tensors are on {request.device}, not on the CPU; move them, or {_WAY_OUT}"
    if request.cell != "lstm":
        return _no_cell(request)
    if request.dtype is not None and request.dtype not in _COMPILED_DTYPES:
        return f"{request.dtype} is not supported by the compiled CPU kernels; {_WAY_OUT}"
    # On meta tensors the operators compute shapes, without kernels.
    return None if device == "meta" else missing_kernels()


def _reference(request: Request) -> str | None:
    if request.dtype is not None and not request.dtype.is_floating_point:
        return f"{request.dtype} is not a floating point dtype; convert with input.float()"
    return None


_WAY_OUT = "use backend='reference' or 'auto'"
_NO_GPU = f"torch sees no GPU here; move the tensors to the CPU, or {_WAY_OUT}"
