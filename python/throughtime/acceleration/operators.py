"""What stands behind ``aten::lstm.input`` and ``aten::lstm.data``: ours, or the original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from throughtime.acceleration.call import Call, why_not
from throughtime.acceleration.handle import Acceleration, innermost
from throughtime.functional import autocast_dtype
from throughtime.nn.episodes import Episodes
from throughtime.nn.stacked import run
from throughtime.packed import unpack

_Results = tuple[Tensor, Tensor, Tensor]

_input = torch.ops.aten.lstm.input
_data = torch.ops.aten.lstm.data
_DispatchKey = torch._C.DispatchKey


def lstm_input(
    input: Tensor,
    hx: Sequence[Tensor],
    parameters: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> _Results:
    """``aten::lstm.input``."""
    options = (has_biases, num_layers, dropout, train, bidirectional)
    found = _accelerated(input, None, hx, parameters, *options, batch_first=batch_first)
    return found or _original(_input, input, hx, parameters, *options, batch_first)


def lstm_data(
    data: Tensor,
    batch_sizes: Tensor,
    hx: Sequence[Tensor],
    parameters: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> _Results:
    """``aten::lstm.data``."""
    options = (has_biases, num_layers, dropout, train, bidirectional)
    found = _accelerated(data, batch_sizes, hx, parameters, *options)
    return found or _original(_data, data, batch_sizes, hx, parameters, *options)


KERNELS: dict[str, Callable[..., _Results]] = {
    "aten::lstm.input": lstm_input,
    "aten::lstm.data": lstm_data,
}


def _accelerated(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *options: Any,
    batch_first: bool = False,
) -> _Results | None:
    """The results of ours, or None where the original runs."""
    handle = innermost()
    if handle is None:
        return None
    with torch._C.DisableTorchFunction():  # no mode of the caller sees what happens here
        x = input.transpose(0, 1) if batch_first and input.dim() == 3 else input
        call = _taken(handle, x, batch_sizes, hx, parameters, *options)
        if call is None:
            return None
        output, h_n, c_n = _run(handle, call)
        return output.transpose(0, 1) if batch_first else output, h_n, c_n


def _taken(
    handle: Acceleration,
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *options: Any,
) -> Call | None:
    """The call if ours runs it; counts it in any case."""
    if len(hx) != 2:
        handle.count(f"original: {len(hx)} states")
        return None
    call = Call(input, batch_sizes, (hx[0], hx[1]), parameters, *options)
    reason = why_not(call)
    handle.count(f"{call.backend} kernels" if reason is None else f"original: {reason}")
    return call if reason is None else None


def _original(operator: Any, *args: Any) -> _Results:
    """The composition that torch has, as if nothing stood in its place."""
    found: _Results
    if torch._C._dispatch_tls_is_dispatch_key_included(_DispatchKey.PythonDispatcher):
        found = operator.decompose(*args)  # as AOTAutograd and torch.export would have it
        return found
    with torch._C.DisableTorchFunction():
        found = operator._op_dk(_DispatchKey.CompositeImplicitAutograd, *args)
        return found


def _run(handle: Acceleration, call: Call) -> _Results:
    """The layers of ``throughtime.LSTM``, with results in the original's dtypes."""
    x, lengths = call.input, None
    if call.batch_sizes is not None:
        x, lengths = unpack(PackedSequence(call.input, call.batch_sizes))
    detach_masks = handle._masks(
        None, call.num_layers * call.directions, x.size(0), x.size(1), training=call.training,
        device=x.device, generator=handle.generator,
    )  # fmt: skip
    output, (h_n, c_n) = run(call, x, call.hx, detach_masks, Episodes(None, None), lengths)
    if lengths is not None:
        output = pack_padded_sequence(output, lengths).data
    dtypes = _dtypes(call)
    return output.to(dtypes[0]), h_n.to(dtypes[1]), c_n.to(dtypes[2])


def _dtypes(call: Call) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """The dtypes of the original's results: under autocast a CPU's c stays wider in its loops."""
    autocast = autocast_dtype(call.input)
    if autocast is None or call.input.is_cuda:
        dtype = autocast or call.input.dtype
        return dtype, dtype, dtype
    wider = torch.promote_types(autocast, call.hx[1].dtype)
    if call.projects:
        return autocast, autocast, wider
    dtype = autocast if call.batch_sizes is None else wider
    return dtype, dtype, dtype
