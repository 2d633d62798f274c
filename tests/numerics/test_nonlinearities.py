"""The derivatives of sigmoid and tanh in the CPU kernels, over all floating point numbers.

The functions alone: cpu_layers/test_vec.py.
"""

from __future__ import annotations

import torch

import compiled_kernels  # noqa: F401
from throughtime.functional import lstm
from ulps import DTYPES, LEAST_LOG, ULPS, assert_few_ulps, exact, known


@DTYPES
def test_derivatives(isa: str, dtype: torch.dtype) -> None:
    """dL/da of the input gate with dL/dc = g = 1 is sigmoid'(a), and 0 where sigmoid is 0."""
    x, _ = known("sigmoid", dtype)
    x = x[x < 0]
    hidden = len(x)
    bias = torch.zeros(4, hidden, dtype=dtype)
    bias[0], bias[2] = x, 50.0  # g = 1
    bias = bias.flatten().requires_grad_()
    zeros = torch.zeros(4 * hidden, 1, dtype=dtype)
    recurrent = torch.zeros(1, 1, dtype=dtype).expand(4 * hidden, 1)
    _, (_, c_n) = lstm(
        torch.zeros(1, 1, 1, dtype=dtype),
        None,
        zeros,
        recurrent,
        bias,
        weight_hr=torch.zeros(1, hidden, dtype=dtype),
        backend="cpu",
    )
    c_n.sum().backward()
    assert bias.grad is not None
    i = exact("sigmoid", x)
    assert_few_ulps(bias.grad[:hidden], i * (1 - i), x, ULPS + 2)
    assert not bias.grad[:hidden][x < LEAST_LOG[dtype] - 1.5].any()
    assert not bias.grad[2 * hidden : 3 * hidden].any()  # tanh'(50)
