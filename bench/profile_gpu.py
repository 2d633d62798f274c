"""Where the time of a GPU's LSTM goes: its parts timed one by one, by CUDA events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import throughtime
from bench.cell import fixed_mask
from throughtime.ops import lstm_gpu
from throughtime.ops.lstm_gpu import Kernels

Timer = Callable[[Callable[[], object], int], float]  # seconds of so many runs


@dataclass(frozen=True)
class Part:
    """What is timed, and the operations of its products."""

    where: str
    phase: str
    run: Callable[[], object]
    operations: float | None = None


def parts(
    shape: tuple[int, ...], p: float, dtype: torch.dtype, kernels: Kernels, device: str
) -> list[Part]:
    """Projection, walks and products of one layer, and an iteration of the module last.

    Args:
        shape: T, B, I and H, the last a multiple of 8 for ``"cuda"``.
        p: detached fraction of the steps, 0 to 1.
        dtype: of input and weights.
        kernels: which run.
        device: where.
    """
    steps, batch, inputs, hidden = shape
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    layer = throughtime.LSTM(inputs, hidden, backend=kernels, **made)
    x = torch.randn(steps, batch, inputs, **made)
    grad = torch.randn(steps, batch, hidden, **made)
    mask = fixed_mask(steps, p)
    mask = None if mask is None else mask.to(device)
    weights = {name: weight.detach() for name, weight in layer.named_parameters()}
    weight_ih, weight_hh = (weights[f"weight_{of}_l0"].unsqueeze(0) for of in ("ih", "hh"))
    accumulate = lstm_gpu.sums(dtype)
    bias = (weights["bias_ih_l0"] + weights["bias_hh_l0"]).to(accumulate).unsqueeze(0)
    h_0 = torch.zeros(1, batch, hidden, **made)
    c_0 = h_0.to(accumulate)
    projected = lstm_gpu.project(x, weight_ih)

    def forward() -> tuple[torch.Tensor, ...]:
        return lstm_gpu.recurrence_forward(
            kernels, projected, bias, h_0, c_0, weight_hh, None, None, False, True
        )

    output, _, _, gates, cells = forward()

    def backward() -> tuple[torch.Tensor, ...]:
        return lstm_gpu.recurrence_backward(
            kernels, grad.unsqueeze(2), None, None, c_0, weight_hh, gates, cells, None, None,
            None if mask is None else mask.view(1, -1, 1), False,
        )  # fmt: skip

    da = backward()[0]

    def iterate() -> None:
        layer.zero_grad()
        result, _ = layer(x, detach_mask=mask)
        torch.autograd.backward(result, grad)

    step = 8.0 * steps * batch * hidden
    cut = 0.0 if mask is None else float(mask.float().mean())
    return [
        Part("forward", "input", lambda: lstm_gpu.project(x, weight_ih), step * inputs),
        Part("forward", "recurrence", forward, step * hidden),
        Part("backward", "recurrence", backward, (1 - cut) * step * hidden),
        Part(
            "backward",
            "weights",
            lambda: lstm_gpu.products(
                da, x, h_0, weight_ih, output, None, None, False, False, True
            ),
            step * (inputs + hidden),
        ),
        Part("iteration", "whole", iterate),
    ]


def seconds(part: Part, timer: Timer, repeats: int) -> float:
    """The fastest of ``repeats`` runs after two that warm up."""
    timer(part.run, 2)
    return min(timer(part.run, 1) for _ in range(repeats))
