"""One RelLSTM layer, with h-detach in the backward pass: its arguments and results.

For every step t::

    s_t = (h_{t-1} + o_{t-1}) / 2
    i, f, g, o = split(x_t W_ih^T + s_t W_hh^T + bias)    (sigmoid, sigmoid, tanh, sigmoid)
    c_t = f * c_{t-1} + i * g,    h_t = o * tanh(c_t)
    o_t = relevancy attention of s_t V_a^T over keys h_j U_a^T and values h_j, j <= t

A step with ``detach_mask`` set passes no gradient into the h_{t-1} of s_t. Positions and memory are
those of :mod:`throughtime.ops.relevancy.arguments`, with the time axis first; ``memory`` holds the
hidden states of an earlier call.

T steps, B samples, I inputs, H units, A units of attention, P slots of an earlier call.

Source: Kerg, Kanuparthi et al., NeurIPS 2020, arXiv 2006.09471.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from throughtime.ops.precision import sums
from throughtime.ops.record import Mask, Real, Whole


def dtype_of_sums(args: Any) -> torch.dtype:
    """The dtype of relevance, and of what is saved."""
    return sums(args.input.dtype)


class RelLstmArguments(NamedTuple):
    """Arguments; floating point tensors have one dtype, but for the relevance.

    CPU kernels that multiply bfloat16 take float32 weights too, as autocast has them.
    """

    input: Annotated[Tensor, Real("T, B, I")]
    h_0: Annotated[Tensor, Real("B, H", backward=False)]
    c_0: Annotated[Tensor, Real("B, H")]
    context_0: Annotated[Tensor, Real("B, H", backward=False)]
    memory: Annotated[Tensor | None, Real("P, B, H", backward=False, absent="P = 0")]
    relevance: Annotated[
        Tensor | None, Real("P, B", dtype=dtype_of_sums, differentiable=False, backward=False)
    ]
    weight_ih: Annotated[Tensor, Real("4H, I", like="weight_ih")]  # gate rows i, f, g, o
    weight_hh: Annotated[Tensor, Real("4H, H", like="weight_ih")]
    bias_ih: Annotated[Tensor | None, Real("4H", backward=False, like="weight_ih")]
    bias_hh: Annotated[Tensor | None, Real("4H", backward=False, like="weight_ih")]
    weight_query: Annotated[Tensor, Real("A, H", like="weight_ih")]
    weight_key: Annotated[Tensor, Real("A, H", like="weight_ih")]
    weight_score: Annotated[Tensor, Real("A", like="weight_ih")]
    lengths: Annotated[Tensor | None, Whole("B")]
    detach_mask: Annotated[Tensor | None, Mask("T, B")]
    retained: int
    window_size: int
    top_k: int
    keep_first: bool  # retain the first keys, whatever their relevance


class RelLstmResults(NamedTuple):
    """Results of every backend; ``saved`` for the backward pass follows in the operators."""

    output: Annotated[Tensor, Real("T, B, H", backward=False)]
    h_n: Annotated[Tensor, Real("B, H", backward=False)]
    c_n: Annotated[Tensor, Real("B, H", backward=False)]
    context_n: Annotated[Tensor, Real("B, H", backward=False)]
    last: Annotated[Tensor, Whole("P + T, B")]
    memory_index: Annotated[Tensor, Whole("left, B", backward=False)]
    memory_relevance: Annotated[
        Tensor, Real("left, B", dtype=dtype_of_sums, differentiable=False, backward=False)
    ]
