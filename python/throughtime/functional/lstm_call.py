"""One checked call of ``functional.lstm``, and how each backend runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from throughtime import reference
from throughtime.functional.checks import LOW_PRECISION, as_dtype
from throughtime.ops import lstm_gpu
from throughtime.ops.lstm import lstm_layer

States = tuple[Tensor, Tensor]

_UNITS = 8  # H of the CUDA kernels is a multiple of it: kSlabUnits of csrc/lstm/cuda/layout.h


class LstmCall(NamedTuple):
    """The arguments of ``functional.lstm``, checked, of one dtype."""

    input: Tensor
    hx: States | None
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    detach_mask: Tensor | None
    lengths: Tensor | None
    reset: Tensor | None
    reverse: bool

    def states(self) -> States:
        """The initial states: as given, or zeros."""
        if self.hx is None:
            shape = (self.input.size(1), self.weight_hh.size(1))
            cells = (self.input.size(1), self.weight_hh.size(0) // 4)
            return self.input.new_zeros(shape), self.input.new_zeros(cells)
        return self.hx


def run(backend: str, call: LstmCall) -> tuple[Tensor, States]:
    """One direction: ``(output [T, B, H or P], (h_n, c_n))``."""
    return _RUN[backend](call)


def run_both(backend: str, one: LstmCall, other: LstmCall) -> tuple[Tensor, States]:
    """Two directions of one layer, the second against the first.

    Returns:
        ``(output [T, B, 2 (H or P)], (h_n [2, B, H or P], c_n [2, B, H]))``.
    """
    if backend == "cuda":
        return _cuda(one, other)
    first, (h, c) = run(backend, one)
    second, (h_other, c_other) = run(backend, other)
    output = torch.cat((first, second), dim=2)
    return output, (torch.stack((h, h_other)), torch.stack((c, c_other)))


def _reference(call: LstmCall) -> tuple[Tensor, States]:
    return reference.lstm(
        call.input,
        call.hx,
        call.weight_ih,
        call.weight_hh,
        call.bias_ih,
        call.bias_hh,
        call.weight_hr,
        detach_mask=call.detach_mask,
        lengths=call.lengths,
        reset=call.reset,
        reverse=call.reverse,
    )


def _cpu(call: LstmCall) -> tuple[Tensor, States]:
    """The compiled kernels, which know float32 and float64."""
    dtype = call.input.dtype
    if dtype in LOW_PRECISION:
        call = call._replace(
            input=call.input.float(),
            hx=None if call.hx is None else (call.hx[0].float(), call.hx[1].float()),
            weight_ih=call.weight_ih.float(),
            weight_hh=call.weight_hh.float(),
            bias_ih=as_dtype(call.bias_ih, torch.float32),
            bias_hh=as_dtype(call.bias_hh, torch.float32),
            weight_hr=as_dtype(call.weight_hr, torch.float32),
        )
    output, h_n, c_n = lstm_layer(
        call.input,
        *call.states(),
        call.weight_ih,
        call.weight_hh,
        call.bias_ih,
        call.bias_hh,
        call.weight_hr,
        call.lengths,
        call.reset,
        call.detach_mask,
        call.reverse,
    )
    if output.requires_grad and (call.weight_hr is not None or dtype == torch.float64):
        # The backward reads the output, and nn.LSTM lets its user overwrite it in these cases.
        output = output.clone()
    return output.to(dtype), (h_n.to(dtype), c_n.to(dtype))


def _triton(call: LstmCall) -> tuple[Tensor, States]:
    output, (h_n, c_n) = _gpu("triton", call)
    return output.squeeze(2), (_first(h_n), _first(c_n))


def _cuda(*calls: LstmCall) -> tuple[Tensor, States]:
    """The CUDA kernels, which take a multiple of ``_UNITS`` units: the rest is padding.

    A unit whose weights, bias and state are zero stays zero, and so do its gradients.
    """
    hidden = calls[0].weight_hh.size(1)
    missing = -hidden % _UNITS
    if missing:
        calls = tuple(_padded(call, missing) for call in calls)
    output, (h_n, c_n) = _gpu("cuda", *calls)
    if missing:
        output, h_n, c_n = (x[..., :hidden].contiguous() for x in (output, h_n, c_n))
    output = output.flatten(2)
    if len(calls) == 1:
        return output, (_first(h_n), _first(c_n))
    return output, (h_n, c_n)


def _first(state: Tensor) -> Tensor:
    """``state [1, B, H]`` without its first dimension: no view, which detach_() would refuse."""
    return torch.ops.aten._unsafe_view.default(state, state.shape[1:])  # type: ignore[no-any-return]


def _padded(call: LstmCall, units: int) -> LstmCall:
    def rows(weight: Tensor) -> Tensor:
        """Zero rows after those of each gate."""
        gates = weight.reshape(4, -1, *weight.shape[1:])
        return F.pad(gates, (*(0, 0) * (gates.dim() - 2), 0, units)).flatten(0, 1)

    h_0, c_0 = call.states()
    return call._replace(
        hx=(F.pad(h_0, (0, units)), F.pad(c_0, (0, units))),
        weight_ih=rows(call.weight_ih),
        weight_hh=F.pad(rows(call.weight_hh), (0, units)),
        bias_ih=None if call.bias_ih is None else rows(call.bias_ih),
        bias_hh=None if call.bias_hh is None else rows(call.bias_hh),
    )


def _gpu(kernels: lstm_gpu.Kernels, *calls: LstmCall) -> tuple[Tensor, States]:
    """One or two directions side by side, c in float32 for 16-bit numbers.

    Returns:
        ``(output [T, B, D, H], (h_n [D, B, H], c_n [D, B, H]))``, contiguous.
    """
    first = calls[0]
    dtype = first.input.dtype
    accumulate = lstm_gpu.sums(dtype)
    states = [call.states() for call in calls]
    masks = [call.detach_mask for call in calls]
    output, h_n, c_n = lstm_gpu.lstm_layer(
        kernels,
        first.input,
        _stack([h for h, _ in states]),
        _stack([c.to(accumulate) for _, c in states]),
        _stack([call.weight_ih for call in calls]),
        _stack([call.weight_hh for call in calls]),
        _stack_biases([call.bias_ih for call in calls], accumulate),
        _stack_biases([call.bias_hh for call in calls], accumulate),
        first.lengths,
        _stack_masks([call.reset for call in calls]),
        _stack_masks([mask if mask is None else _per_sample(mask) for mask in masks]),
        first.reverse,
    )
    return output, (h_n, c_n.to(dtype))


def _stack_biases(biases: list[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """None where the directions, which have the same biases, have none."""
    given = [bias.to(dtype) for bias in biases if bias is not None]
    return _stack(given) if given else None


def _per_sample(mask: Tensor) -> Tensor:
    """``[T, 1 or B]``."""
    return mask.unsqueeze(1) if mask.dim() == 1 else mask


def _stack(tensors: list[Tensor]) -> Tensor:
    """A leading axis of directions; a view where there is one direction."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _stack_masks(masks: list[Tensor | None]) -> Tensor | None:
    """Masks of both directions, where one may be missing, or shared by the batch."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    shape = torch.broadcast_shapes(*(mask.shape for mask in given))  # type: ignore[no-untyped-call]
    whole = [given[0].new_zeros(shape) if mask is None else mask.expand(shape) for mask in masks]
    return _stack(whole)


_RUN: dict[str, Callable[[LstmCall], tuple[Tensor, States]]] = {
    "reference": _reference,
    "cpu": _cpu,
    "triton": _triton,
    "cuda": _cuda,
}
