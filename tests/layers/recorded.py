"""What tests of ``gradient_flow`` share: a loss, and the gradient of weights in two parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import throughtime
from cases import random


def loss_of(*results: Tensor) -> Tensor:
    total = sum((x * random(*x.shape, seed=k)).sum() for k, x in enumerate(results))
    assert isinstance(total, Tensor)
    return total


def row_of_weights(
    layer: nn.Module, run: Callable[..., Iterable[Tensor]], given: dict[str, Any], steps: int
) -> dict[str, Any]:
    """The row of ``flow.parameters()``, checked by a second call with every step detached.

    ``run`` calls the layer with options and gives its results.
    """
    grads = []
    for options in (given | {"detach_mask": torch.ones(steps, dtype=torch.bool)}, given):
        with throughtime.gradient_flow(layer) as flow:
            loss_of(*run(**options)).backward()
        weights = [x for name, x in layer.named_parameters() if "bias_hh" not in name]
        grads.append(torch.cat([x.grad.flatten() for x in weights]))
        layer.zero_grad()
    (row,) = flow.parameters()
    cell, whole = grads
    assert row["norm"] == pytest.approx(whole.norm().item(), rel=1e-12)
    assert row["cell_share"] == pytest.approx((cell.norm() / whole.norm()).item(), rel=1e-12)
    cosine = nn.functional.cosine_similarity(whole, cell, dim=0).item()
    assert row["cosine"] == pytest.approx(cosine, rel=1e-12)
    return row
