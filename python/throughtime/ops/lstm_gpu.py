"""The LSTM on GPUs: the recurrence as an operator, everything around it as large matrix products.

``throughtime::lstm_recurrence_forward`` walks through the steps of one layer, in one direction or
in both side by side, ``lstm_recurrence_backward`` back through them, where a step with
``detach_mask`` set passes no gradient into ``h_{t-1}`` (h-detach: arXiv 1810.03023). Outside of the
walk are, over all T B rows at once and for each of the D directions::

    projected = x W_ih^T                   dx = da W_ih
    dW_ih = da^T x     dW_hh = da^T h_before     dbias = sum of da

with da ``[T, B, D, 4H]`` the gradient before the nonlinearities. A is the dtype of sums and of c:
float32, or float64 for float64. ``lstm_gpu_forward`` and ``lstm_gpu_backward`` are walk and
products together; they are what is differentiated. ``lstm_recurrence_*_triton`` are the walk for
one direction, without its axis. Implementations of the walk: ``csrc/lstm/cuda/operators.cpp`` and
``triton_kernels/lstm.py``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from throughtime import reference
from throughtime.ops.differentiable import Differentiable, part_of
from throughtime.ops.fakes import check_dims, check_sizes
from throughtime.ops.registration import register
from throughtime.ops.triton import check_runnable

Kernels = Literal["cuda", "triton"]

for _suffix in ("", "_triton"):
    register(
        torch.library.define,
        f"lstm_recurrence_forward{_suffix}",
        "(Tensor projected, Tensor? bias, Tensor h_0, Tensor c_0, Tensor weight_hh, "
        "Tensor? lengths, Tensor? reset, bool reverse, bool save) "
        "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    register(
        torch.library.define,
        f"lstm_recurrence_backward{_suffix}",
        "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor c_0, Tensor weight_hh, "
        "Tensor gates, Tensor cells, Tensor? lengths, Tensor? reset, Tensor? detach_mask, "
        "bool reverse) -> (Tensor grad_gates, Tensor grad_h_0, Tensor grad_c_0)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

register(
    torch.library.define,
    "lstm_gpu_forward",
    "(str kernels, Tensor input, Tensor h_0, Tensor c_0, Tensor weight_ih, Tensor weight_hh, "
    "Tensor? bias_ih, Tensor? bias_hh, Tensor? lengths, Tensor? reset, Tensor? detach_mask, "
    "bool reverse, bool save) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
register(
    torch.library.define,
    "lstm_gpu_backward",
    "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor h_0, "
    "Tensor c_0, Tensor weight_ih, Tensor weight_hh, Tensor? lengths, Tensor? reset, "
    "Tensor? detach_mask, Tensor output, Tensor gates, Tensor cells, str kernels, bool reverse, "
    "bool need_input, bool need_weights) -> (Tensor grad_input, Tensor grad_h_0, "
    "Tensor grad_c_0, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias_ih, "
    "Tensor grad_bias_hh)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def saved_gates(dtype: torch.dtype) -> torch.dtype:
    """The dtype of ``gates``; ``csrc/lstm/cuda/cell.cuh`` says why 16-bit S saves the sums."""
    return torch.float16 if dtype.itemsize == 2 else dtype


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
    if projected is None or projected.dim() != 3:
        check_dims("lstm_recurrence_forward", "projected", projected, "T, B, D, 4H")
    letters = "4H, H" if projected.dim() == 3 else "D, 4H, H"
    check_dims("lstm_recurrence_forward", "weight_hh", weight_hh, letters)
    for name, state in (("h_0", h_0), ("c_0", c_0)):
        check_dims("lstm_recurrence_forward", name, state, letters.replace("4H", "B"))
    *rows, gates = projected.shape  # [T, B, D, 4H], or without D
    steps = rows[0] if save else 0
    hidden = weight_hh.shape[-1]
    check_sizes(
        "lstm_recurrence_forward",
        projected,
        bias=(bias, (*rows[2:], gates)),
        h_0=(h_0, (*rows[2:], rows[1], hidden)),
        c_0=(c_0, (*rows[2:], rows[1], hidden)),
        weight_hh=(weight_hh, (*rows[2:], gates, hidden)),
        lengths=(lengths, (rows[1],)),
        reset=(reset, (*rows[2:], *rows[:2])),
    )
    return (
        h_0.new_empty(*rows, hidden),
        h_0.new_empty(h_0.shape),
        c_0.new_empty(c_0.shape),
        h_0.new_empty(steps, *rows[1:], gates, dtype=saved_gates(h_0.dtype)),
        c_0.new_empty(steps, *rows[1:], hidden),
    )


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
    if gates is None or gates.dim() != 3:
        check_dims("lstm_recurrence_backward", "gates", gates, "T, B, D, 4H")
    letters = "4H, H" if gates.dim() == 3 else "D, 4H, H"
    check_dims("lstm_recurrence_backward", "weight_hh", weight_hh, letters)
    check_dims("lstm_recurrence_backward", "c_0", c_0, letters.replace("4H", "B"))
    *rows, all_gates = gates.shape
    hidden = weight_hh.shape[-1]
    check_sizes(
        "lstm_recurrence_backward",
        gates,
        grad_output=(grad_output, (*rows, hidden)),
        grad_h_n=(grad_h_n, c_0.shape),
        grad_c_n=(grad_c_n, c_0.shape),
        c_0=(c_0, (*rows[2:], rows[1], hidden)),
        weight_hh=(weight_hh, (*rows[2:], all_gates, hidden)),
        cells=(cells, (*rows, hidden)),
        lengths=(lengths, (rows[1],)),
        reset=(reset, (*rows[2:], *rows[:2])),
    )
    return weight_hh.new_empty(gates.shape), c_0.new_empty(c_0.shape), c_0.new_empty(c_0.shape)


for _suffix in ("", "_triton"):
    register(torch.library.register_fake, f"lstm_recurrence_forward{_suffix}", _forward_fake)
    register(torch.library.register_fake, f"lstm_recurrence_backward{_suffix}", _backward_fake)


def _dense(args: tuple[Any, ...]) -> list[Any]:
    return [arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args]


def _run_forward(*args: Any) -> tuple[Tensor, ...]:
    check_runnable(args)
    # Imported when it is first called: Triton may be missing.
    kernels = import_module("throughtime.triton_kernels.lstm")
    return kernels.recurrence_forward(*_dense(args))  # type: ignore[no-any-return]


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    check_runnable(args)
    kernels = import_module("throughtime.triton_kernels.lstm")
    return kernels.recurrence_backward(*_dense(args))  # type: ignore[no-any-return]


for _name, _run in (("forward", _run_forward), ("backward", _run_backward)):
    register(torch.library.impl, f"lstm_recurrence_{_name}_triton", ("cpu", "cuda"), _run)
    for _suffix in ("", "_triton"):
        part_of(f"lstm_recurrence_{_name}{_suffix}", "lstm_gpu_forward")


def recurrence_forward(kernels: Kernels, *args: Any) -> tuple[Tensor, ...]:
    """The forward operator of the kernels, with the axis of directions."""
    if kernels == "cuda":
        return torch.ops.throughtime.lstm_recurrence_forward.default(*args)  # type: ignore[no-any-return]
    projected, bias, h_0, c_0, weight_hh, lengths, reset, reverse, save = args
    results = torch.ops.throughtime.lstm_recurrence_forward_triton.default(
        projected.squeeze(2), _first(bias), h_0[0], c_0[0], weight_hh[0], lengths, _first(reset),
        reverse, save,
    )  # fmt: skip
    output, h_n, c_n, gates, cells = results
    if save:  # else they are empty
        gates, cells = gates.unsqueeze(2), cells.unsqueeze(2)
    return output.unsqueeze(2), h_n.unsqueeze(0), c_n.unsqueeze(0), gates, cells


def recurrence_backward(kernels: Kernels, *args: Any) -> tuple[Tensor, ...]:
    """The backward operator of the kernels, with the axis of directions."""
    if kernels == "cuda":
        return torch.ops.throughtime.lstm_recurrence_backward.default(*args)  # type: ignore[no-any-return]
    grad_output, grad_h_n, grad_c_n, c_0, weight_hh, gates, cells, *masks, reverse = args
    lengths, reset, detach_mask = masks
    if detach_mask is not None:  # Triton's [T] or [T, B]
        detach_mask = detach_mask[0]
        detach_mask = detach_mask.squeeze(1) if detach_mask.size(1) == 1 else detach_mask
    da, dh, dc = torch.ops.throughtime.lstm_recurrence_backward_triton.default(
        None if grad_output is None else grad_output.squeeze(2), _first(grad_h_n),
        _first(grad_c_n), c_0[0], weight_hh[0], gates.squeeze(2), cells.squeeze(2), lengths,
        _first(reset), detach_mask, reverse,
    )  # fmt: skip
    return da.unsqueeze(2), dh.unsqueeze(0), dc.unsqueeze(0)


def _first(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[0]


def sums(dtype: torch.dtype) -> torch.dtype:
    """A, the dtype of sums and of c."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def _forward(
    kernels: Kernels,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    detach_mask: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, ...]:
    biases = [bias for bias in (bias_ih, bias_hh) if bias is not None]
    bias = None if not biases else biases[0] if len(biases) == 1 else biases[0] + biases[1]
    projected = project(input, weight_ih)
    return recurrence_forward(
        kernels, projected, bias, h_0, c_0, weight_hh, lengths, reset, reverse, save
    )


def _backward(
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
    kernels: Kernels,
    reverse: bool,
    need_input: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    da, grad_h_0, grad_c_0 = recurrence_backward(
        kernels, grad_output, grad_h_n, grad_c_n, c_0, weight_hh, gates, cells, lengths, reset,
        detach_mask, reverse,
    )  # fmt: skip
    grad_input, *weights, bias = products(
        da, input, h_0, weight_ih, output, lengths, reset, reverse, need_input, need_weights
    )
    return grad_input, grad_h_0.to(h_0.dtype), grad_c_0, *weights, bias, bias.clone()


def _definition(
    kernels: Kernels,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    detach_mask: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, ...]:
    def part(x: Tensor | None, direction: int) -> Tensor | None:
        return None if x is None else x[direction]

    results = []
    for d in range(h_0.size(0)):
        mask = part(detach_mask, d)
        result, (h, c) = reference.lstm(
            input, (h_0[d], c_0[d].to(h_0.dtype)), weight_ih[d], weight_hh[d], part(bias_ih, d),
            part(bias_hh, d), detach_mask=None if mask is None else mask.expand(input.shape[:2]),
            lengths=lengths, reset=part(reset, d), reverse=reverse != (d == 1),
        )  # fmt: skip
        results.append((result, h, c))
    output, h_n, c_n = zip(*results, strict=True)
    nothing = input.new_empty(0)
    return torch.stack(output, 2), torch.stack(h_n), torch.stack(c_n).to(c_0), nothing, nothing


for _name, _run in (("forward", _forward), ("backward", _backward)):
    register(torch.library.impl, f"lstm_gpu_{_name}", ("cpu", "cuda"), _run)
    register(torch.library.register_fake, f"lstm_gpu_{_name}", _run)  # by the recurrence's fakes

_lstm = Differentiable("lstm_gpu", "LSTM", _definition)


def products(
    da: Tensor,
    input: Tensor,
    h_0: Tensor,
    weight_ih: Tensor,
    output: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    need_input: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The large products after the walk: gradients of input, weight_ih, weight_hh and bias.

    Empty where they are not needed.
    """
    nothing = da.new_empty(0)
    rows = da.flatten(0, 1).flatten(1)  # [T B, D 4H]
    grad_input = (rows @ weight_ih.flatten(0, 1)).view(input.shape) if need_input else nothing
    if not need_weights:
        return grad_input, nothing, nothing, nothing
    if lengths is not None:  # the input's padding may hold anything
        steps = torch.arange(input.size(0), device=input.device).unsqueeze(1)
        input = input.masked_fill((steps >= lengths).unsqueeze(2), 0.0)
    return (
        grad_input,
        (rows.t() @ input.flatten(0, 1)).view(weight_ih.shape),
        _weight_gradients(da, h_0, output, lengths, reset, reverse),
        da.sum((0, 1), dtype=sums(da.dtype)),
    )


def _weight_gradients(
    da: Tensor,
    h_0: Tensor,
    output: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
) -> Tensor:
    """dW_hh ``[D, 4H, H]``."""
    if reset is not None:  # nothing entered from before
        da = da.masked_fill(reset.permute(1, 2, 0).unsqueeze(3), 0.0)
    grads = [
        _weight_gradient(da[:, :, d], h_0[d], output[:, :, d], lengths, reverse != (d == 1))
        for d in range(h_0.size(0))
    ]
    return grads[0].unsqueeze(0) if len(grads) == 1 else torch.stack(grads)


def _weight_gradient(
    da: Tensor, h_0: Tensor, output: Tensor, lengths: Tensor | None, reverse: bool
) -> Tensor:
    """da^T h_before: the outputs shifted by one step, and h_0 before each sample's first."""
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
    kernels: Kernels,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    detach_mask: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer on a GPU; arguments are taken as checked.

    Args:
        kernels: ``"cuda"``, which wants H to be a multiple of 8, or ``"triton"``, for D = 1.
        input: ``[T, B, I]``, of dtype S: any of float16, bfloat16, float32; Triton: float64 too.
        h_0: S ``[D, B, H]``.
        c_0: ``[D, B, H]``, of the dtype of sums.
        weight_ih, weight_hh: S ``[D, 4H, I]`` and ``[D, 4H, H]``, gate rows i, f, g, o.
        bias_ih, bias_hh: ``[D, 4H]`` of the dtype of sums, or None.
        lengths: int64 ``[B]`` or None.
        reset: bool ``[D, T, B]`` or None.
        detach_mask: bool ``[D, T, 1 or B]`` or None.
        reverse: direction 0 travels from the last step to the first; direction 1 always travels
            against it.

    Returns:
        output S ``[T, B, D, H]``, h_n S ``[D, B, H]``, c_n ``[D, B, H]`` of the dtype of sums;
        differentiable once.
    """
    output, h_n, c_n, *_ = _lstm(
        kernels, input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reset,
        detach_mask, reverse,
    )  # fmt: skip
    return output, h_n, c_n
