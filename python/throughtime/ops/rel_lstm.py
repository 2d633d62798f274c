"""The RelLSTM operators: one layer, with h-detach in the backward pass.

``throughtime::rel_lstm_forward`` computes, for every step t::

    s_t = (h_{t-1} + o_{t-1}) / 2
    i, f, g, o = split(x_t W_ih^T + s_t W_hh^T + bias)    (sigmoid, sigmoid, tanh, sigmoid)
    c_t = f * c_{t-1} + i * g,    h_t = o * tanh(c_t)
    o_t = relevancy attention of s_t V_a^T over keys h_j U_a^T and values h_j, j <= t

and ``throughtime::rel_lstm_backward`` its gradient, where a step with ``detach_mask`` set passes
none into the h_{t-1} of s_t. Positions and memory are those of :mod:`throughtime.ops.relevancy`,
with the time axis first; ``memory`` holds the hidden states of an earlier call. ``saved`` is
private to the backend.

Schemas and fakes are here; the C++ implementation is in ``csrc/rel_lstm``, the Triton one, under
names that end in ``_triton``, in ``triton_kernels/rel_lstm.py``.

Source: Kerg, Kanuparthi et al., NeurIPS 2020, arXiv 2006.09471.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime import reference
from throughtime.ops.differentiable import Differentiable
from throughtime.ops.fakes import check_dims, check_sizes
from throughtime.ops.registration import register
from throughtime.ops.relevancy import memory_sizes
from throughtime.ops.triton import check_runnable

_UNITS = 16  # kRelLstmUnits of csrc/rel_lstm/cpu/params.h

_FORWARD = (
    "(Tensor input, Tensor h_0, Tensor c_0, Tensor context_0, Tensor? memory, Tensor? relevance, "
    "Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor weight_query, "
    "Tensor weight_key, Tensor weight_score, Tensor? lengths, Tensor? detach_mask, "
    "SymInt retained, SymInt window_size, SymInt top_k, bool keep_first, bool save) -> "
    "(Tensor output, Tensor h_n, Tensor c_n, Tensor context_n, "
    "Tensor last, Tensor memory_index, Tensor memory_relevance, Tensor saved)"
)
_BACKWARD = (
    "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_context_n, "
    "Tensor input, Tensor c_0, Tensor weight_ih, Tensor weight_hh, Tensor weight_query, "
    "Tensor weight_key, Tensor weight_score, Tensor? lengths, Tensor? detach_mask, Tensor last, "
    "Tensor saved, SymInt retained, SymInt window_size, bool need_input, bool need_weights) "
    "-> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor grad_context_0, "
    "Tensor grad_memory, Tensor grad_weight_ih, Tensor grad_weight_hh, "
    "Tensor grad_bias_ih, Tensor grad_bias_hh, "
    "Tensor grad_weight_query, Tensor grad_weight_key, Tensor grad_weight_score)"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)

for _suffix in ("", "_triton"):
    register(torch.library.define, f"rel_lstm_forward{_suffix}", _FORWARD, tags=_TAGS)
    register(torch.library.define, f"rel_lstm_backward{_suffix}", _BACKWARD, tags=_TAGS)


def _saved_by_cpu(length: int, batch: int, prefix: int, hidden: int, attention: int) -> int:
    """saved_numbers of csrc/rel_lstm/cpu/params.h."""
    units, attention = ((n + _UNITS - 1) // _UNITS * _UNITS for n in (hidden, attention))
    keys = (prefix + length) * (units + attention)
    return batch * (keys + length * (6 * units + attention))


def _saved_by_triton(length: int, batch: int, prefix: int, hidden: int, attention: int) -> int:
    module = import_module("throughtime.triton_kernels.rel_lstm")
    return int(module.saved_numbers(length, batch, prefix, hidden, attention))


def _forward_fake(
    saved_numbers: Callable[[int, int, int, int, int], int],
) -> Callable[..., tuple[Tensor, ...]]:
    def fake(
        input: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        context_0: Tensor,
        memory: Tensor | None,
        relevance: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight_query: Tensor,
        weight_key: Tensor,
        weight_score: Tensor,
        lengths: Tensor | None,
        detach_mask: Tensor | None,
        retained: int,
        window_size: int,
        top_k: int,
        keep_first: bool,
        save: bool,
    ) -> tuple[Tensor, ...]:
        check_dims("rel_lstm_forward", "input", input, "T, B, I")
        check_dims("rel_lstm_forward", "weight_hh", weight_hh, "4H, H")
        check_dims("rel_lstm_forward", "weight_score", weight_score, "A")
        length, batch, features = input.shape
        hidden, attention = weight_hh.shape[1], weight_score.shape[0]
        prefix = 0 if memory is None else memory.shape[0]
        check_sizes(
            "rel_lstm_forward",
            input,
            h_0=(h_0, (batch, hidden)),
            c_0=(c_0, (batch, hidden)),
            context_0=(context_0, (batch, hidden)),
            memory=(memory, (prefix, batch, hidden)),
            relevance=(relevance, (prefix, batch)),
            weight_ih=(weight_ih, (4 * hidden, features)),
            weight_hh=(weight_hh, (4 * hidden, hidden)),
            bias_ih=(bias_ih, (4 * hidden,)),
            bias_hh=(bias_hh, (4 * hidden,)),
            weight_query=(weight_query, (attention, hidden)),
            weight_key=(weight_key, (attention, hidden)),
            weight_score=(weight_score, (attention,)),
            lengths=(lengths, (batch,)),
        )
        left = sum(memory_sizes(length, prefix, retained, window_size, top_k))
        saved = saved_numbers(length, batch, prefix, hidden, attention) if save else 0
        return (
            input.new_empty(length, batch, hidden),
            input.new_empty(batch, hidden),
            input.new_empty(batch, hidden),
            input.new_empty(batch, hidden),
            input.new_empty(prefix + length, batch, dtype=torch.int64),
            input.new_empty(left, batch, dtype=torch.int64),
            input.new_empty(left, batch),
            input.new_empty(saved),
        )

    return fake


def _backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_context_n: Tensor | None,
    input: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_query: Tensor,
    weight_key: Tensor,
    weight_score: Tensor,
    lengths: Tensor | None,
    detach_mask: Tensor | None,
    last: Tensor,
    saved: Tensor,
    retained: int,
    window_size: int,
    need_input: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    check_dims("rel_lstm_backward", "input", input, "T, B, I")
    check_dims("rel_lstm_backward", "last", last, "S, B")
    check_dims("rel_lstm_backward", "weight_hh", weight_hh, "4H, H")
    check_dims("rel_lstm_backward", "c_0", c_0, "B, H")
    check_dims("rel_lstm_backward", "saved", saved, "numbers")
    check_dims("rel_lstm_backward", "weight_query", weight_query, "A, H")
    check_dims("rel_lstm_backward", "weight_score", weight_score, "A")
    length, batch, _ = input.shape
    check_sizes(
        "rel_lstm_backward",
        input,
        grad_output=(grad_output, (length, *c_0.shape)),
        grad_h_n=(grad_h_n, c_0.shape),
        grad_c_n=(grad_c_n, c_0.shape),
        grad_context_n=(grad_context_n, c_0.shape),
        c_0=(c_0, (batch, weight_hh.shape[-1])),
        weight_ih=(weight_ih, (weight_hh.shape[0], input.shape[2])),
        weight_hh=(weight_hh, (4 * weight_hh.shape[-1], weight_hh.shape[-1])),
        weight_query=(weight_query, (*weight_score.shape, weight_hh.shape[-1])),
        weight_key=(weight_key, (*weight_score.shape, weight_hh.shape[-1])),
        weight_score=(weight_score, weight_query.shape[:1]),
        lengths=(lengths, (batch,)),
        detach_mask=(detach_mask, input.shape[: 1 if detach_mask is None else detach_mask.dim()]),
        last=(last, (last.shape[0], batch)),
        saved=(saved, saved.shape),
    )
    bias = weight_hh[:, 0]
    weights = (weight_ih, weight_hh, bias, bias, weight_query, weight_key, weight_score)
    return (
        input.new_empty(input.shape if need_input else (0,)),
        input.new_empty(c_0.shape),
        input.new_empty(c_0.shape),
        input.new_empty(c_0.shape),
        input.new_empty(last.shape[0] - input.shape[0], *c_0.shape),
        *(input.new_empty(w.shape if need_weights else (0,)) for w in weights),
    )


def _triton(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """The Triton implementation, imported when it is first called: Triton may be missing."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        check_runnable(args)
        module = import_module("throughtime.triton_kernels.rel_lstm")
        return getattr(module, name)(*args)  # type: ignore[no-any-return]

    return run


for _suffix, _numbers in (("", _saved_by_cpu), ("_triton", _saved_by_triton)):
    register(torch.library.register_fake, f"rel_lstm_forward{_suffix}", _forward_fake(_numbers))
    register(torch.library.register_fake, f"rel_lstm_backward{_suffix}", _backward_fake)
for _name in ("forward", "backward"):
    register(torch.library.impl, f"rel_lstm_{_name}_triton", ("cpu", "cuda"), _triton(_name))


def _definition(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    context_0: Tensor,
    memory: Tensor | None,
    relevance: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_query: Tensor,
    weight_key: Tensor,
    weight_score: Tensor,
    lengths: Tensor | None,
    detach_mask: Tensor | None,
    retained: int,
    window_size: int,
    top_k: int,
    keep_first: bool,
) -> tuple[Tensor, ...]:
    result = reference.rel_lstm(
        input, h_0, c_0, context_0, memory, relevance, weight_ih, weight_hh, bias_ih, bias_hh,
        weight_query, weight_key, weight_score, lengths=lengths, detach_mask=detach_mask,
        retained=retained, window_size=window_size, top_k=top_k, keep_first=keep_first,
    )  # fmt: skip
    state = (result.output, result.h_n, result.c_n, result.context_n)
    left = (result.memory.positions, result.memory.relevance)
    return (*state, result.last, *left, input.new_empty(0))


_KERNELS = {
    backend: Differentiable("rel_lstm", "RelLSTM", _definition, suffix=suffix)
    for backend, suffix in (("cpu", ""), ("triton", "_triton"))
}


class RelLstmLayer(NamedTuple):
    """What :func:`rel_lstm_layer` returns, named as in the reference."""

    output: Tensor
    h_n: Tensor
    c_n: Tensor
    context_n: Tensor
    last: Tensor
    memory_index: Tensor
    memory_relevance: Tensor


def rel_lstm_layer(
    backend: str,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    context_0: Tensor,
    memory: Tensor | None,
    relevance: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_query: Tensor,
    weight_key: Tensor,
    weight_score: Tensor,
    *,
    lengths: Tensor | None,
    detach_mask: Tensor | None,
    retained: int,
    window_size: int,
    top_k: int,
    keep_first: bool,
) -> RelLstmLayer:
    """One RelLSTM layer on compiled kernels; arguments are taken as checked.

    Args:
        backend: ``"cpu"`` or ``"triton"``.
        input: ``[T, B, I]``, float32 or float64, like all other floating arguments.
        h_0, c_0, context_0: ``[B, H]``.
        memory, relevance: ``[P, B, H]`` and ``[P, B]`` of an earlier call, or None.
        weight_ih, weight_hh: ``[4H, I]`` and ``[4H, H]``, gate rows i, f, g, o.
        bias_ih, bias_hh: ``[4H]`` or None.
        weight_query, weight_key, weight_score: ``[A, H]``, ``[A, H]`` and ``[A]``.
        lengths: int64 ``[B]`` or None.
        detach_mask: bool ``[T]``, ``[T, B]`` or None.
        retained, window_size, top_k, keep_first: see :mod:`throughtime.ops.relevancy`.

    Returns:
        output ``[T, B, H]`` and the final states ``[B, H]``, differentiable once; last, and the
        memory's positions and relevance.
    """
    result = _KERNELS[backend](
        input, h_0, c_0, context_0, memory, relevance, weight_ih, weight_hh, bias_ih, bias_hh,
        weight_query, weight_key, weight_score, lengths, detach_mask, retained, window_size, top_k,
        keep_first,
    )  # fmt: skip
    return RelLstmLayer(*result[:7])
