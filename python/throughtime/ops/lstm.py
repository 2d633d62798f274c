"""The LSTM operators: one layer, one direction, with h-detach in the backward pass.

``throughtime::lstm_forward`` computes, for every step ``t`` in the order of travel::

    i, f, g, o = split(x_t W_ih^T + h_{t-1} W_hh^T + bias)    (sigmoid, sigmoid, tanh, sigmoid)
    c_t = f * c_{t-1} + i * g,    h_t = o * tanh(c_t)    (then times W_hr^T, if given)

and ``throughtime::lstm_backward`` its gradient, where a step with ``detach_mask`` set passes none
into ``h_{t-1}`` (h-detach: Kanuparthi et al., ICLR 2019, arXiv 1810.03023). The forward takes the
mask for its gradient's sake; its results do not depend on it.

Schemas and fakes are here, the implementations in ``csrc/lstm``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from throughtime import _ext, reference
from throughtime.ops.differentiable import Differentiable
from throughtime.ops.fakes import check_dims, check_sizes
from throughtime.ops.registration import register


def _saved_numbers(steps: int, batch: int, hidden: int) -> int:
    """saved_numbers of csrc/lstm/cpu/params.h: i, f, g, o and c in padded units, and a mark."""
    return 5 * steps * batch * ((hidden + 15) // 16 * 16) + 1


register(
    torch.library.define,
    "lstm_forward",
    "(Tensor input, Tensor h_0, Tensor c_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
    "Tensor? bias_hh, Tensor? weight_hr, Tensor? lengths, Tensor? reset, Tensor? detach_mask, "
    "bool reverse, bool save) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor saved)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
register(
    torch.library.define,
    "lstm_backward",
    "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor h_0, "
    "Tensor c_0, Tensor weight_ih, Tensor weight_hh, Tensor? weight_hr, Tensor? lengths, "
    "Tensor? reset, Tensor? detach_mask, Tensor output, Tensor saved, bool reverse, "
    "bool need_input, bool need_weights) -> (Tensor grad_input, Tensor grad_h_0, "
    "Tensor grad_c_0, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias_ih, "
    "Tensor grad_bias_hh, Tensor grad_weight_hr)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _lstm_forward_fake(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    detach_mask: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_dims("lstm_forward", "input", input, "T, B, I")
    check_dims("lstm_forward", "weight_hh", weight_hh, "4H, H or P")
    steps, batch, features = input.shape
    gates, outputs = weight_hh.shape
    check_sizes(
        "lstm_forward",
        input,
        h_0=(h_0, (batch, outputs)),
        c_0=(c_0, (batch, gates // 4)),
        weight_ih=(weight_ih, (gates, features)),
        weight_hh=(weight_hh, (gates // 4 * 4, gates // 4 if weight_hr is None else outputs)),
        bias_ih=(bias_ih, (gates,)),
        bias_hh=(bias_hh, (gates,)),
        weight_hr=(weight_hr, (outputs, gates // 4)),
        lengths=(lengths, (batch,)),
        reset=(reset, (steps, batch)),
        detach_mask=(detach_mask, input.shape[: 1 if detach_mask is None else detach_mask.dim()]),
    )
    return (
        input.new_empty(steps, batch, h_0.shape[1]),
        input.new_empty(h_0.shape),
        input.new_empty(c_0.shape),
        input.new_empty(_saved_numbers(steps, batch, gates // 4) if save else 0),
    )


def _lstm_backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    detach_mask: Tensor | None,
    output: Tensor,
    saved: Tensor,
    reverse: bool,
    need_input: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    check_dims("lstm_backward", "input", input, "T, B, I")
    check_dims("lstm_backward", "weight_hh", weight_hh, "4H, H or P")
    check_dims("lstm_backward", "h_0", h_0, "B, H or P")
    check_dims("lstm_backward", "c_0", c_0, "B, H")
    check_dims("lstm_backward", "output", output, "T, B, H or P")
    check_dims("lstm_backward", "weight_ih", weight_ih, "4H, I")
    check_sizes(
        "lstm_backward",
        input,
        grad_output=(grad_output, output.shape),
        grad_h_n=(grad_h_n, h_0.shape),
        grad_c_n=(grad_c_n, c_0.shape),
        h_0=(h_0, (input.shape[1], weight_hh.shape[-1])),
        c_0=(c_0, (input.shape[1], weight_hh.shape[0] // 4)),
        weight_ih=(weight_ih, (weight_hh.shape[0], input.shape[2])),
        weight_hh=(weight_hh, weight_hh.shape),
        weight_hr=(weight_hr, (weight_hh.shape[-1], weight_hh.shape[0] // 4)),
        lengths=(lengths, (input.shape[1],)),
        reset=(reset, input.shape[:2]),
        detach_mask=(detach_mask, input.shape[: 1 if detach_mask is None else detach_mask.dim()]),
        output=(output, (*input.shape[:2], weight_hh.shape[-1])),
        saved=(saved, (_saved_numbers(input.shape[0], input.shape[1], weight_hh.shape[0] // 4),)),
    )
    gates = weight_hh.shape[0] if need_weights else 0
    return (
        input.new_empty(input.shape if need_input else (0,)),
        input.new_empty(h_0.shape),
        input.new_empty(c_0.shape),
        input.new_empty(weight_ih.shape if need_weights else (0,)),
        input.new_empty(weight_hh.shape if need_weights else (0,)),
        input.new_empty(gates),
        input.new_empty(gates),
        input.new_empty(weight_hr.shape if need_weights and weight_hr is not None else (0,)),
    )


register(torch.library.register_fake, "lstm_forward", _lstm_forward_fake)
register(torch.library.register_fake, "lstm_backward", _lstm_backward_fake)


def _definition(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    detach_mask: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, (h_n, c_n) = reference.lstm(
        input, (h_0, c_0), weight_ih, weight_hh, bias_ih, bias_hh, weight_hr,
        detach_mask=detach_mask, lengths=lengths, reset=reset, reverse=reverse,
    )  # fmt: skip
    return output, h_n, c_n, input.new_empty(0)


_lstm = Differentiable("lstm", "LSTM", _definition)


def lstm_layer(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    detach_mask: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer in one direction on the compiled kernels; arguments are taken as checked.

    Args:
        input: ``[T, B, I]``, float32 or float64, like all other floating arguments.
        h_0, c_0: ``[B, H]``; with a projection h_0 is ``[B, P]``.
        weight_ih, weight_hh: ``[4H, I]`` and ``[4H, H]`` (``[4H, P]``), gate rows i, f, g, o.
        bias_ih, bias_hh: ``[4H]`` or None.
        weight_hr: projection ``[P, H]`` or None.
        lengths: int64 ``[B]`` or None.
        reset: bool ``[T, B]`` or None.
        detach_mask: bool ``[T]``, ``[T, B]`` or None.
        reverse: travel from the last step to the first.

    Returns:
        output ``[T, B, H or P]``, h_n ``[B, H or P]``, c_n ``[B, H]``; differentiable once.
    """
    output, h_n, c_n, _ = _lstm(
        input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, reset,
        detach_mask, reverse,
    )  # fmt: skip
    return output, h_n, c_n


def empty_cache() -> None:
    """Gives the CPU kernels' idle buffers back to the operating system."""
    if _ext.extension is not None:
        _ext.extension.empty_cache()
