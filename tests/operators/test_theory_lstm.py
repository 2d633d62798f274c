"""What the h-detach paper proves, on our gradients: the two parts A and B of the backward pass.

Notation of the paper (arXiv 1810.03023, section 2): z_t stacks dh_t/dw, dc_t/dw and 1 for one
weight w, and z_t = (A_t + B_t) z_{t-1}. A holds the cell path, B all products with W_hh. A detached
step leaves B out: z_t = (A_t + (1 - m_t) B_t) z_{t-1}.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from throughtime import functional

T, I_SIZE, H = 6, 3, 4
ROW, COLUMN = 1, 2  # the weight w: gate row (input gate, unit 1) and input column of weight_ih
P = 0.3


@pytest.fixture(scope="module")
def problem() -> dict[str, Tensor]:
    torch.manual_seed(0)
    draw = {"input": (T, 1, I_SIZE), "weight_ih": (4 * H, I_SIZE), "weight_hh": (4 * H, H)}
    return {name: torch.randn(*size, dtype=torch.float64) for name, size in draw.items()}


def transitions(problem: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """A_t and B_t, square matrices over [dh, dc, 1], written out from the formulas."""
    input, weight_ih, weight_hh = (problem[name] for name in ("input", "weight_ih", "weight_hh"))
    w_i, w_f, w_g, w_o = weight_hh.chunk(4)
    h = c = torch.zeros(H, dtype=torch.float64)
    every_a, every_b = [], []
    for t in range(T):
        i, f, g, o = (weight_ih @ input[t, 0] + weight_hh @ h).chunk(4)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        direct = torch.zeros(H, dtype=torch.float64)  # dc_t / dw at fixed h_{t-1} and c_{t-1}
        direct[ROW] = (g * i * (1 - i))[ROW] * input[t, 0, COLUMN]
        psi = (
            (c * f * (1 - f)).unsqueeze(1) * w_f
            + (g * i * (1 - i)).unsqueeze(1) * w_i
            + (i * (1 - g * g)).unsqueeze(1) * w_g
        )
        c = f * c + i * g
        slope = o * (1 - c.tanh() ** 2)
        gate = (o * (1 - o) * c.tanh()).unsqueeze(1) * w_o
        h = o * c.tanh()

        a = torch.zeros(2 * H + 1, 2 * H + 1, dtype=torch.float64)
        a[:H, H:-1], a[:H, -1] = torch.diag(slope * f), slope * direct
        a[H:-1, H:-1], a[H:-1, -1] = torch.diag(f), direct
        a[-1, -1] = 1
        b = torch.zeros_like(a)
        b[:H, :H], b[H:-1, :H] = slope.unsqueeze(1) * psi + gate, psi
        every_a.append(a)
        every_b.append(b)
    return every_a, every_b


def product(matrices: list[Tensor]) -> Tensor:
    """(dh_T/dw, dc_T/dw) from the product of all transitions."""
    z = torch.zeros(2 * H + 1, dtype=torch.float64)
    z[-1] = 1
    for matrix in matrices:
        z = matrix @ z
    return z[:-1]


def derivative(problem: dict[str, Tensor], mask: Tensor, backend: str) -> Tensor:
    """(dh_T/dw, dc_T/dw) from the layer's own gradient."""
    weight_ih = problem["weight_ih"].clone().requires_grad_()
    _, (h_n, c_n) = functional.lstm(
        problem["input"],
        None,
        weight_ih,
        problem["weight_hh"],
        detach_mask=mask,
        backend=backend,
    )
    state = torch.cat([h_n, c_n], dim=1).flatten()
    rows = [torch.autograd.grad(x, weight_ih, retain_graph=True)[0] for x in state]
    return torch.stack(rows)[:, ROW, COLUMN]


@pytest.mark.usefixtures("poison")
def test_every_mask_and_their_mean_follow_the_transition_matrices(
    problem: dict[str, Tensor], backend: str
) -> None:
    every_a, every_b = transitions(problem)
    mean = torch.zeros(2 * H, dtype=torch.float64)
    for bits in itertools.product((False, True), repeat=T):
        found = derivative(problem, torch.tensor(bits), backend)
        kept = [a + (1 - bit) * b for a, b, bit in zip(every_a, every_b, bits, strict=True)]
        assert (found - product(kept)).abs().max() < 1e-13
        mean += found * P ** sum(bits) * (1 - P) ** (T - sum(bits))
        if all(bits):
            assert (found - product(every_a)).abs().max() < 1e-13
    scaled = [a + (1 - P) * b for a, b in zip(every_a, every_b, strict=True)]
    assert (mean - product(scaled)).abs().max() < 1e-13
    assert (product(every_a) - product(scaled)).abs().max() > 1e-3
