"""The scores of relevancy attention: for each a pair of functions, and a line in ``SCORES``.

    scores(q, k, w)         s = score of rows q and k            [X]
    gradients(ds, q, k, w)  ds times ds/dq, ds/dk and ds/dw      [X, D] each

q and k are ``[X, D]``, one of them may be ``[1, D]``; w is ``[1, D]``, zeros for a score without a
weight. Kernels take the pair as compile-time arguments ``SCORES`` and ``GRADIENTS``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from throughtime.triton_kernels.common import tanh


@triton.jit
def dot_scores(q, k, w):
    """The dot product q . k."""
    return tl.sum(q * k, axis=1)


@triton.jit
def dot_gradients(ds, q, k, w):
    """The gradients ds k and ds q."""
    return ds[:, None] * k, ds[:, None] * q, tl.zeros_like(q)


@triton.jit
def additive_scores(q, k, w):
    """The product w . tanh(q + k)."""
    return tl.sum(w * tanh(q + k), axis=1)


@triton.jit
def additive_gradients(ds, q, k, w):
    """Twice ds w (1 - tanh^2), and ds tanh."""
    t = tanh(q + k)
    to_both = ds[:, None] * w * (1.0 - t * t)
    return to_both, to_both, ds[:, None] * t


SCORES = {
    "dot": {"SCORES": dot_scores, "GRADIENTS": dot_gradients},
    "additive": {"SCORES": additive_scores, "GRADIENTS": additive_gradients},
}
