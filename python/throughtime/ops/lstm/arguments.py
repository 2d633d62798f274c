"""One LSTM layer in one direction, with h-detach in the backward pass: its arguments and results.

For every step t in the order of travel::

    i, f, g, o = split(x_t W_ih^T + h_{t-1} W_hh^T + bias)    (sigmoid, sigmoid, tanh, sigmoid)
    c_t = f * c_{t-1} + i * g,    h_t = o * tanh(c_t)    (then times W_hr^T, if given)

A step with ``detach_mask`` set passes no gradient into ``h_{t-1}`` (h-detach: Kanuparthi et al.,
ICLR 2019, arXiv 1810.03023). The forward takes the mask for the sake of its gradient; its results
do not depend on it.

T steps, B samples, I inputs, H units; with a projection h has P units.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from torch import Tensor

from throughtime.ops.record import Mask, Real, Whole


class LstmArguments(NamedTuple):
    """Arguments; floating point tensors have one dtype.

    CPU kernels that multiply bfloat16 take float32 weights too, as autocast has them.
    """

    input: Annotated[Tensor, Real("T, B, I")]
    h_0: Annotated[Tensor, Real("B, H or P")]
    c_0: Annotated[Tensor, Real("B, H")]
    weight_ih: Annotated[Tensor, Real("4H, I", like="weight_ih")]  # gate rows i, f, g, o
    weight_hh: Annotated[Tensor, Real("4H, H or P", like="weight_ih")]
    bias_ih: Annotated[Tensor | None, Real("4H", backward="recompute", like="weight_ih")]
    bias_hh: Annotated[Tensor | None, Real("4H", backward="recompute", like="weight_ih")]
    weight_hr: Annotated[Tensor | None, Real("H or P, H", absent="H or P = H", like="weight_ih")]
    lengths: Annotated[Tensor | None, Whole("B")]
    reset: Annotated[Tensor | None, Mask("T, B")]
    reset_h: Annotated[Tensor | None, Real("T, B, H or P")]  # the state before a step that resets
    reset_c: Annotated[Tensor | None, Real("T, B, H")]  # together with it; zeros if None
    detach_mask: Annotated[Tensor | None, Mask("T, B")]
    reverse: bool  # travel from the last step to the first
    recompute: bool  # save c alone for the backward, which computes the gates again


class LstmResults(NamedTuple):
    """Results of every backend."""

    output: Annotated[Tensor, Real("T, B, H or P", backward=True)]
    h_n: Annotated[Tensor, Real("B, H or P", backward=False)]
    c_n: Annotated[Tensor, Real("B, H", backward=False)]


class LstmCellsResults(NamedTuple):
    """Results of backends that give every c_t; zero past the end of a sample."""

    output: Annotated[Tensor, Real("T, B, H or P", backward=True)]
    h_n: Annotated[Tensor, Real("B, H or P", backward=False)]
    c_n: Annotated[Tensor, Real("B, H", backward=False)]
    cells: Annotated[Tensor, Real("T, B, H", backward=False)]
