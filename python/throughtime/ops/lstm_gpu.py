"""The LSTM on GPUs: the recurrence as an operator, everything around it as large matrix products.

``throughtime::lstm_recurrence_forward_triton`` walks through the steps of one layer in one
direction, ``lstm_recurrence_backward_triton`` back through them, where a step with ``detach_mask``
set passes no gradient into ``h_{t-1}`` (h-detach: arXiv 1810.03023). Outside of the walk are, over
all T B rows at once::

    projected = x W_ih^T                   dx = da W_ih
    dW_ih = da^T x     dW_hh = da^T h_before     dbias = sum of da

with da ``[T, B, 4H]`` the gradient before the nonlinearities. A is the dtype of sums and of c:
float32, or float64 for float64. Implementation: ``triton_kernels/lstm.py``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from throughtime.ops.once import look_up_signature, once_differentiable

_TAGS = (torch.Tag.pt2_compliant_tag,)

torch.library.define(
    "throughtime::lstm_recurrence_forward_triton",
    "(Tensor projected, Tensor? bias, Tensor h_0, Tensor c_0, Tensor weight_hh, Tensor? lengths, "
    "Tensor? reset, bool reverse, bool save) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    tags=_TAGS,
)
torch.library.define(
    "throughtime::lstm_recurrence_backward_triton",
    "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor c_0, Tensor weight_hh, "
    "Tensor gates, Tensor cells, Tensor? lengths, Tensor? reset, Tensor? detach_mask, "
    "bool reverse) -> (Tensor grad_gates, Tensor grad_h_0, Tensor grad_c_0)",
    tags=_TAGS,
)


@torch.library.register_fake("throughtime::lstm_recurrence_forward_triton")  # type: ignore[untyped-decorator]
def _forward_fake(
    projected: Tensor,
    bias: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    steps, batch, gates = projected.shape
    hidden = weight_hh.shape[1]
    return (
        h_0.new_empty(steps, batch, hidden),
        h_0.new_empty(h_0.shape),
        c_0.new_empty(c_0.shape),
        h_0.new_empty((steps, batch, gates) if save else (0,)),
        c_0.new_empty((steps, batch, hidden) if save else (0,)),
    )


@torch.library.register_fake("throughtime::lstm_recurrence_backward_triton")  # type: ignore[untyped-decorator]
def _backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    c_0: Tensor,
    weight_hh: Tensor,
    gates: Tensor,
    cells: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    detach_mask: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, ...]:
    return gates.new_empty(gates.shape), c_0.new_empty(c_0.shape), c_0.new_empty(c_0.shape)


def _dense(args: tuple[Any, ...]) -> list[Any]:
    return [arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args]


def _run_forward(*args: Any) -> tuple[Tensor, ...]:
    # Imported when it is first called: Triton may be missing.
    kernels = import_module("throughtime.triton_kernels.lstm")
    return kernels.recurrence_forward(*_dense(args))  # type: ignore[no-any-return]


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    kernels = import_module("throughtime.triton_kernels.lstm")
    return kernels.recurrence_backward(*_dense(args))  # type: ignore[no-any-return]


for _name, _run in (("forward", _run_forward), ("backward", _run_backward)):
    torch.library.impl(f"throughtime::lstm_recurrence_{_name}_triton", ("cpu", "cuda"), _run)

_forward = torch.ops.throughtime.lstm_recurrence_forward_triton.default
_backward = torch.ops.throughtime.lstm_recurrence_backward_triton.default


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _project(input: Tensor, weight_ih: Tensor) -> Tensor:
    """X W_ih^T in the dtype of sums."""
    rows, transposed = input.reshape(-1, input.size(2)), weight_ih.t()
    if input.dtype == _sums(input.dtype):
        projected = rows @ transposed
    elif input.is_cuda:
        projected = torch.mm(rows, transposed, out_dtype=torch.float32)
    else:
        projected = rows.float() @ transposed.float()
    return projected.view(*input.shape[:2], -1)


class LstmGpuFunction(torch.autograd.Function):
    """One layer in one direction: projection, recurrence, and their gradients."""

    @staticmethod
    def forward(
        input: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        detach_mask: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, ...]:
        projected = _project(input, weight_ih)
        return _forward(projected, bias, h_0, c_0, weight_hh, lengths, reset, reverse, True)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, h_0, c_0, weight_ih, weight_hh, _, *masks, reverse = inputs
        result, _, _, gates, cells = output
        ctx.mark_non_differentiable(gates, cells)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, h_0, c_0, weight_ih, weight_hh, *masks, result, gates, cells)
        ctx.reverse = reverse

    @staticmethod
    def backward(
        ctx: Any,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        *others: Any,
    ) -> tuple[Tensor | None, ...]:
        if grad_output is None and grad_h_n is None and grad_c_n is None:
            return (None,) * 10
        grads = _differentiate(
            grad_output,
            grad_h_n,
            grad_c_n,
            *ctx.saved_tensors,
            ctx.reverse,
            list(ctx.needs_input_grad[:6]),
        )
        wanted = (g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))
        return (*wanted, *(None,) * 4)


look_up_signature(LstmGpuFunction)


def _gradients(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    detach_mask: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Of input, h_0, c_0, weight_ih, weight_hh and bias; empty where not needed."""
    da, grad_h_0, grad_c_0 = _backward(
        grad_output, grad_h_n, grad_c_n, c_0, weight_hh, gates, cells, lengths, reset, detach_mask,
        reverse,
    )  # fmt: skip
    nothing = da.new_empty(0)
    rows = da.flatten(0, 1)
    if lengths is not None and needs[3]:  # the input's padding may hold anything
        steps = torch.arange(input.size(0), device=input.device).unsqueeze(1)
        input = input.masked_fill((steps >= lengths).unsqueeze(2), 0.0)
    return (
        (rows @ weight_ih).view(input.shape) if needs[0] else nothing,
        grad_h_0.to(h_0.dtype),
        grad_c_0,
        rows.t() @ input.flatten(0, 1) if needs[3] else nothing,
        _weight_gradient(da, h_0, output, lengths, reset, reverse) if needs[4] else nothing,
        da.sum((0, 1), dtype=_sums(da.dtype)).to(da.dtype) if needs[5] else nothing,
    )


_differentiate = once_differentiable(_gradients, "LSTM")


def _weight_gradient(
    da: Tensor,
    h_0: Tensor,
    output: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
) -> Tensor:
    """da^T h_before: the outputs shifted by one step, and h_0 before each sample's first."""
    if reset is not None:  # nothing entered from before
        da = da.masked_fill(reset.unsqueeze(2), 0.0)
    later, before = (da[:-1], output[1:]) if reverse else (da[1:], output[:-1])
    if not reverse:
        first = da[0]
    elif lengths is None:
        first = da[-1]
    else:  # the output past the end is zero, and so is da for a sample without steps
        at = (lengths - 1).clamp(min=0).view(1, -1, 1).expand(1, -1, da.size(2))
        first = da.gather(0, at).squeeze(0)
    product = later.flatten(0, 1).t() @ before.flatten(0, 1)
    return torch.addmm(product, first.t(), h_0)


def lstm_layer(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    detach_mask: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer in one direction by Triton's kernels; arguments are taken as checked.

    Args:
        input: ``[T, B, I]``, of dtype S: any of float16, bfloat16, float32, float64.
        h_0: S ``[B, H]``.
        c_0: ``[B, H]``, of the dtype of sums.
        weight_ih, weight_hh: S ``[4H, I]`` and ``[4H, H]``, gate rows i, f, g, o.
        bias: S ``[4H]`` or None.
        lengths: int64 ``[B]`` or None.
        reset: bool ``[T, B]`` or None.
        detach_mask: bool ``[T]``, ``[T, B]`` or None.
        reverse: travel from the last step to the first.

    Returns:
        output S ``[T, B, H]``, h_n S ``[B, H]``, c_n ``[B, H]`` of the dtype of sums;
        differentiable once.
    """
    tensors = (input, h_0, c_0, weight_ih, weight_hh, bias)
    wants_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    if wants_grad:
        result = LstmGpuFunction.apply(*tensors, lengths, reset, detach_mask, reverse)  # type: ignore[no-untyped-call]
    else:
        projected = _project(input, weight_ih)
        result = _forward(projected, bias, h_0, c_0, weight_hh, lengths, reset, reverse, False)
    output, h_n, c_n, *_ = result
    return output, h_n, c_n
