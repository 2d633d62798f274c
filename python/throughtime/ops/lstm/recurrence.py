"""The LSTM's walk over time on GPUs, as operators that another one differentiates.

``throughtime::lstm_recurrence_forward`` walks through the steps of D directions of one layer, side
by side, and ``lstm_recurrence_backward`` back through them, where a step with ``detach_mask`` set
passes no gradient into ``h_{t-1}``. Implementations: ``csrc/lstm/cuda/operators.cpp`` and, under
names that end in ``_triton`` and for D = 1, ``triton_kernels/lstm.py``.

S is the dtype of the weights, A that of sums and of c: float32, or float64 for float64.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from throughtime.constant import constant_result
from throughtime.ops.operation import define, part_of
from throughtime.ops.record import Derived, Field, Mask, Real, Whole, fake, fields
from throughtime.ops.triton import implementation

Kernels = Literal["cuda", "triton"]


def sums(dtype: torch.dtype) -> torch.dtype:
    """A, the dtype of sums and of c."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def saved_gates(dtype: torch.dtype) -> torch.dtype:
    """The dtype of ``gates``; ``csrc/lstm/cuda/cell.cuh`` says why 16-bit S saves the sums."""
    return torch.float16 if dtype.itemsize == 2 else dtype


@constant_result
def takes_tf32(dtype: torch.dtype) -> bool:
    """Whether the CUDA kernels round a dtype to TF32 in their recurrent product, as cuDNN does.

    torch's switch for cuDNN's RNNs decides: ``torch.backends.cudnn.allow_tf32``, or
    ``torch.backends.cudnn.rnn.fp32_precision``. A compiled program keeps what it was traced with.
    """
    rnns: Any = torch.backends.cudnn.rnn
    return dtype == torch.float32 and rnns.fp32_precision == "tf32"


def _dtype_of_gates(args: Any) -> torch.dtype:
    return saved_gates(args.h_0.dtype)


class ForwardArguments(NamedTuple):
    """Arguments of ``lstm_recurrence_forward``."""

    projected: Annotated[Tensor, Real("T, B, D, 4H")]  # A, x W_ih^T
    bias: Annotated[Tensor | None, Real("D, 4H")]  # A
    h_0: Annotated[Tensor, Real("D, B, H")]  # S
    c_0: Annotated[Tensor, Real("D, B, H")]  # A
    weight_hh: Annotated[Tensor, Real("D, 4H, H")]  # S, gate rows i, f, g, o
    lengths: Annotated[Tensor | None, Whole("B")]
    reset: Annotated[Tensor | None, Mask("D, T, B")]
    reverse: bool  # of the first direction; the second travels against it
    save: bool
    tf32: bool  # float32, CUDA kernels: h and weight_hh count rounded to TF32 in their product


class ForwardResults(NamedTuple):
    """Results of ``lstm_recurrence_forward``; the last two are empty without ``save``."""

    output: Annotated[Tensor, Real("T, B, D, H", like="h_0")]
    h_n: Annotated[Tensor, Real("D, B, H", like="h_0")]
    c_n: Annotated[Tensor, Real("D, B, H", like="c_0")]
    gates: Annotated[Tensor, Real("steps, B, D, 4H", dtype=_dtype_of_gates)]
    cells: Annotated[Tensor, Real("steps, B, D, H", like="c_0")]


class BackwardArguments(NamedTuple):
    """Arguments of ``lstm_recurrence_backward``."""

    grad_output: Annotated[Tensor | None, Real("T, B, D, H")]
    grad_h_n: Annotated[Tensor | None, Real("D, B, H")]
    grad_c_n: Annotated[Tensor | None, Real("D, B, H")]
    c_0: Annotated[Tensor, Real("D, B, H")]
    weight_hh: Annotated[Tensor, Real("D, 4H, H")]
    gates: Annotated[Tensor, Real("T, B, D, 4H")]
    cells: Annotated[Tensor, Real("T, B, D, H")]
    lengths: Annotated[Tensor | None, Whole("B")]
    reset: Annotated[Tensor | None, Mask("D, T, B")]
    detach_mask: Annotated[Tensor | None, Mask("D, T, B")]
    reverse: bool
    tf32: bool  # the same of grad_gates and weight_hh


class BackwardResults(NamedTuple):
    """Results of ``lstm_recurrence_backward``: before the nonlinearities, and of the states."""

    grad_gates: Annotated[Tensor, Real("T, B, D, 4H", like="weight_hh")]
    grad_h_0: Annotated[Tensor, Real("D, B, H", like="c_0")]
    grad_c_0: Annotated[Tensor, Real("D, B, H", like="c_0")]


_DERIVED: Derived = {"steps": lambda sizes, args: sizes["T"] if args.save else 0}


def _operator(name: str, arguments: type[Any], results: type[Any]) -> dict[str, Any]:
    """The operator of each of the two implementations."""
    takes, gives = fields(arguments), fields(results)

    def make(*args: Any) -> tuple[Tensor, ...]:
        return fake(name, takes, gives, _DERIVED, arguments._make(args))

    run = implementation("lstm", name.removeprefix("lstm_"))

    def triton(*args: Any) -> tuple[Tensor, ...]:
        given = (_squeezed(name, x, arg) for x, arg in zip(takes, args, strict=True))
        found = run(arguments._make(given))
        return tuple(x.unsqueeze(_axis(field)) for field, x in zip(gives, found, strict=True))

    operators = {
        "cuda": define(name, takes, gives, None, make),
        "triton": define(f"{name}_triton", takes, gives, triton, make),
    }
    for each in (name, f"{name}_triton"):
        part_of(each, "lstm_gpu_forward")
    return operators


def _axis(field: Field) -> int:
    """The axis of directions."""
    assert field.layout is not None
    return field.layout.shape.split(", ").index("D")


def _squeezed(op: str, field: Field, arg: Any) -> Any:
    """One direction without its axis, contiguous."""
    if not isinstance(arg, Tensor):
        return arg
    assert field.layout is not None
    if arg.dim() != len(field.layout.terms):
        raise RuntimeError(
            f"throughtime::{op}: {field.name} should be [{field.layout.shape}], got {arg.dim()} "
            "dimensions"
        )
    return (arg.squeeze(_axis(field)) if "D" in field.layout.shape else arg).contiguous()


_FORWARD = _operator("lstm_recurrence_forward", ForwardArguments, ForwardResults)
_BACKWARD = _operator("lstm_recurrence_backward", BackwardArguments, BackwardResults)


def forward(kernels: Kernels, args: ForwardArguments) -> ForwardResults:
    """Walk through the steps."""
    return ForwardResults._make(_FORWARD[kernels](*args))


def backward(kernels: Kernels, args: BackwardArguments) -> BackwardResults:
    """Walk back through the steps."""
    return BackwardResults._make(_BACKWARD[kernels](*args))
