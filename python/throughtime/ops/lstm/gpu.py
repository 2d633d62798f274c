"""Backends "cuda" and "triton" of the LSTM: a walk over time between large matrix products.

``throughtime::lstm_gpu_forward`` and ``lstm_gpu_backward`` run D directions of one layer. Outside
of the walk (:mod:`throughtime.ops.lstm.recurrence`) are, over all T B rows at once, per direction::

    projected = x W_ih^T                   dx = da W_ih
    dW_ih = da^T x     dW_hh = da^T h_before     dbias = sum of da

with da ``[T, B, D, 4H]`` the gradient before the nonlinearities.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from throughtime.backends import requirements
from throughtime.backends.backend import Backend
from throughtime.ops.lstm import cuda_plan, recurrence, reference
from throughtime.ops.lstm.arguments import LstmArguments, LstmResults
from throughtime.ops.lstm.recurrence import Kernels, sums, takes_tf32
from throughtime.ops.operation import Operation
from throughtime.ops.record import Mask, Real, Whole, fields

_UNITS = 8  # H of the CUDA kernels is a multiple of it: kSlabUnits of csrc/lstm/cuda/layout.h


class GpuArguments(NamedTuple):
    """:class:`LstmArguments` of D directions; c and the biases are of the dtype of sums."""

    input: Annotated[Tensor, Real("T, B, I")]
    h_0: Annotated[Tensor, Real("D, B, H")]
    c_0: Annotated[Tensor, Real("D, B, H")]
    weight_ih: Annotated[Tensor, Real("D, 4H, I")]
    weight_hh: Annotated[Tensor, Real("D, 4H, H")]
    bias_ih: Annotated[Tensor | None, Real("D, 4H", backward=False)]
    bias_hh: Annotated[Tensor | None, Real("D, 4H", backward=False)]
    lengths: Annotated[Tensor | None, Whole("B")]
    reset: Annotated[Tensor | None, Mask("D, T, B")]
    detach_mask: Annotated[Tensor | None, Mask("D, T, B")]
    reverse: bool  # of the first direction; the second travels against it
    kernels: str
    tf32: bool


class GpuResults(NamedTuple):
    """Results of D directions."""

    output: Annotated[Tensor, Real("T, B, D, H")]
    h_n: Annotated[Tensor, Real("D, B, H", backward=False)]
    c_n: Annotated[Tensor, Real("D, B, H", backward=False)]


# What there is once per direction.
_STACKED = [x.name for x in fields(GpuArguments) if x.layout and x.layout.shape.startswith("D")]


def _forward(call: Any) -> tuple[Tensor, ...]:
    biases = [bias for bias in (call.bias_ih, call.bias_hh) if bias is not None]
    own: dict[str, Any] = {
        "projected": project(call.input, call.weight_ih),
        "bias": sum(biases[1:], start=biases[0]) if biases else None,
    }
    names = [name for name in recurrence.ForwardArguments._fields if name not in own]
    args = recurrence.ForwardArguments(**own, **{name: getattr(call, name) for name in names})
    return recurrence.forward(call.kernels, args)


def _backward(call: Any) -> tuple[Tensor, ...]:
    names = recurrence.BackwardArguments._fields
    args = recurrence.BackwardArguments(**{name: getattr(call, name) for name in names})
    da, grad_h_0, grad_c_0 = recurrence.backward(call.kernels, args)
    grad_input, *weights, bias = products(call, da)
    return grad_input, grad_h_0.to(call.h_0.dtype), grad_c_0, *weights, bias, bias.clone()


def _definition(args: GpuArguments) -> tuple[Tensor, ...]:
    results = []
    for d in range(args.h_0.size(0)):
        given: dict[str, Any] = {name: getattr(args, name) for name in _STACKED}
        given = {name: None if x is None else x[d] for name, x in given.items()}
        one = LstmArguments(
            input=args.input,
            lengths=args.lengths,
            weight_hr=None,
            reverse=args.reverse != (d == 1),
            recompute=False,
            reset_h=None,
            reset_c=None,
            **given,
        )
        results.append(reference.run(one._replace(c_0=one.c_0.to(one.h_0.dtype))))
    output, h_n, c_n = zip(*results, strict=True)
    return torch.stack(output, 2), torch.stack(h_n), torch.stack(c_n).to(args.c_0)


_lstm = Operation(
    "lstm_gpu",
    "LSTM",
    GpuArguments,
    GpuResults,
    _definition,
    saved={
        "gates": Real("T, B, D, 4H", differentiable=False),
        "cells": Real("T, B, D, H", differentiable=False),
    },
    needs=("input", "weights"),
    forward=_forward,
    backward=_backward,
    composite=True,
)


def project(input: Tensor, weight_ih: Tensor) -> Tensor:
    """X W_ih^T ``[T, B, D, 4H]`` in the dtype of sums."""
    rows, transposed = input.reshape(-1, input.size(2)), weight_ih.flatten(0, 1).t()
    if input.dtype == sums(input.dtype):
        projected = rows @ transposed
    elif input.is_cuda and torch.version.hip is None:  # sums kept in float32 by cuBLAS
        projected = torch.mm(rows, transposed, out_dtype=torch.float32)
    else:
        projected = rows.float() @ transposed.float()
    return projected.view(*input.shape[:2], *weight_ih.shape[:2])


def products(call: Any, da: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The large products after the walk: gradients of input, weight_ih, weight_hh and bias.

    Empty where they are not needed.

    Args:
        call: the arguments of ``lstm_gpu_backward``.
        da: ``[T, B, D, 4H]``.
    """
    input, weight_ih = call.input, call.weight_ih
    nothing = da.new_empty(0)
    rows = da.flatten(0, 1).flatten(1)  # [T B, D 4H]
    grad_input = (rows @ weight_ih.flatten(0, 1)).view(input.shape) if call.need_input else nothing
    if not call.need_weights:
        return grad_input, nothing, nothing, nothing
    if call.lengths is not None:  # the input's padding may hold anything
        steps = torch.arange(input.size(0), device=input.device).unsqueeze(1)
        input = input.masked_fill((steps >= call.lengths).unsqueeze(2), 0.0)
    return (
        grad_input,
        (rows.t() @ input.flatten(0, 1)).view(weight_ih.shape),
        _weight_gradients(call, da),
        da.sum((0, 1), dtype=sums(da.dtype)),
    )


def _weight_gradients(call: Any, da: Tensor) -> Tensor:
    """dW_hh ``[D, 4H, H]``."""
    if call.reset is not None:  # nothing entered from before
        da = da.masked_fill(call.reset.permute(1, 2, 0).unsqueeze(3), 0.0)
    grads = [_weight_gradient(call, da[:, :, d], d) for d in range(call.h_0.size(0))]
    return grads[0].unsqueeze(0) if len(grads) == 1 else torch.stack(grads)


def _weight_gradient(call: Any, da: Tensor, d: int) -> Tensor:
    """da^T h_before: the outputs shifted by one step, and h_0 before each sample's first."""
    reverse, output = call.reverse != (d == 1), call.output[:, :, d]
    later, before = (da[:-1], output[1:]) if reverse else (da[1:], output[:-1])
    if not reverse:
        first = da[0]
    elif call.lengths is None:
        first = da[-1]
    else:  # the output past the end is zero, and so is da for a sample without steps
        at = (call.lengths - 1).clamp(min=0).view(1, -1, 1).expand(1, -1, da.size(2))
        first = da.gather(0, at).squeeze(0)
    product = later.flatten(0, 1).t() @ before.flatten(0, 1)
    return torch.addmm(product, first.t(), call.h_0[d])


def _run(kernels: Kernels, *calls: LstmArguments) -> GpuResults:
    """One or two directions side by side, c in float32 for 16-bit numbers."""
    first = calls[0]
    dtype = first.input.dtype
    wide = {name: sums(dtype) for name in ("c_0", "bias_ih", "bias_hh")}
    stacked: dict[str, Any] = {
        name: _stack([getattr(call, name) for call in calls], wide.get(name)) for name in _STACKED
    }
    args = GpuArguments(
        input=first.input,
        lengths=first.lengths,
        reverse=first.reverse,
        kernels=kernels,
        tf32=kernels == "cuda" and takes_tf32(dtype),
        **stacked,
    )
    results = _lstm(args)
    return results._replace(c_n=results.c_n.to(dtype))


def _stack(tensors: list[Tensor | None], dtype: torch.dtype | None) -> Tensor | None:
    """A leading axis of directions, a view where there is one; a missing mask is all False."""
    given = next((x for x in tensors if x is not None), None)
    if given is None:
        return None
    whole = [torch.zeros_like(given) if x is None else x for x in tensors]
    if dtype is not None:
        whole = [x.to(dtype) for x in whole]
    return whole[0].unsqueeze(0) if len(whole) == 1 else torch.stack(whole)


def _one(results: GpuResults) -> LstmResults:
    return LstmResults(results.output.flatten(2), _first(results.h_n), _first(results.c_n))


def _both(results: GpuResults) -> LstmResults:
    return LstmResults(results.output.flatten(2), results.h_n, results.c_n)


def _first(state: Tensor) -> Tensor:
    """``state [1, B, H]`` without its first dimension: no view, which detach_() would refuse."""
    return cast(Tensor, torch.ops.aten._unsafe_view.default(state, state.shape[1:]))


def _cuda(*calls: LstmArguments) -> GpuResults:
    """The CUDA kernels, which take a multiple of ``_UNITS`` units: the rest is padding.

    A unit whose weights, bias and state are zero stays zero, and so do its gradients.
    """
    hidden = calls[0].weight_hh.size(1)
    missing = -hidden % _UNITS
    if not missing:
        return _run("cuda", *calls)
    results = _run("cuda", *[_padded(call, missing) for call in calls])
    return GpuResults._make(x[..., :hidden].contiguous() for x in results)


def _padded(call: LstmArguments, units: int) -> LstmArguments:
    def rows(weight: Tensor) -> Tensor:
        """Zero rows after those of each gate."""
        gates = weight.reshape(4, -1, *weight.shape[1:])
        return F.pad(gates, (*(0, 0) * (gates.dim() - 2), 0, units)).flatten(0, 1)

    return call._replace(
        h_0=F.pad(call.h_0, (0, units)),
        c_0=F.pad(call.c_0, (0, units)),
        weight_ih=rows(call.weight_ih),
        weight_hh=F.pad(rows(call.weight_hh), (0, units)),
        bias_ih=None if call.bias_ih is None else rows(call.bias_ih),
        bias_hh=None if call.bias_hh is None else rows(call.bias_hh),
    )


cuda: Backend[LstmArguments, LstmResults] = Backend(
    "cuda",
    (
        requirements.no_projection("CUDA kernels"),
        requirements.zeros_at_resets("CUDA kernels"),
        requirements.no_cells("CUDA kernels"),
        requirements.dtypes("CUDA kernels", (torch.float32, torch.bfloat16, torch.float16)),
        requirements.cuda_tensors,
        requirements.cuda_kernels,
    ),
    lambda args: _one(_cuda(args)),
    run_both=lambda one, other: _both(_cuda(one, other)),
    describe=cuda_plan.describe,
)

triton: Backend[LstmArguments, LstmResults] = Backend(
    "triton",
    (
        requirements.no_projection("Triton kernels"),
        requirements.zeros_at_resets("Triton kernels"),
        requirements.no_cells("Triton kernels"),
        requirements.lstm_cell,
        requirements.dtypes("Triton kernels"),
        requirements.triton,
    ),
    lambda args: _one(_run("triton", args)),
)
