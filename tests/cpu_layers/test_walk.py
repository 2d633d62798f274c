"""A walk through time with a new cell: Elman's network, against a loop and autograd in float64.

The cell is one file, tanh_cell.h: the package has no operator for it, and needs no other change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
each_threads = pytest.mark.parametrize("threads", [1, 4])
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}


class Given(NamedTuple):
    """What a walk is run on, in float64."""

    inputs: list[Tensor]  # x, h_0, weight_ih, weight_hh, bias
    grads: list[Tensor]  # of the output and of h_n
    lengths: Tensor | None
    detach: Tensor | None  # [T, B], or [T, 1] of all samples
    reverse: bool


def given(
    steps: int,
    batch: int,
    inputs: int,
    units: int,
    lengths: list[int] | None = None,
    detach: int = 0,
    reverse: bool = False,
) -> Given:
    sizes = ((steps, batch, inputs), (batch, units), (units, inputs), (units, units), (units,))
    scales = (0.5, 1, 0.5, units**-0.5, 1)
    grads = [torch.randn(*s, dtype=torch.float64) for s in ((steps, batch, units), (batch, units))]
    return Given(
        [k * torch.randn(*s, dtype=torch.float64) for k, s in zip(scales, sizes, strict=True)],
        grads,
        None if lengths is None else torch.tensor(lengths),
        torch.rand(steps, detach) < 0.6 if detach else None,
        reverse,
    )


def run(layer: Any, given: Given, dtype: torch.dtype, threads: int) -> list[Tensor]:
    """The walk: y, h_n, and the gradients of the inputs.

    With bfloat16 operands all is float32 but x, y and h_0, and their gradients but that of h_0.
    """
    sums = torch.float32 if dtype == torch.bfloat16 else dtype
    x, h_0 = (v.to(dtype) for v in given.inputs[:2])
    weight_ih, weight_hh, bias = (v.to(sums) for v in given.inputs[2:])
    (steps, batch, inputs), units = x.shape, h_0.size(1)
    columns = 1 if given.detach is None else given.detach.size(1)
    sizes = torch.tensor(
        [steps, batch, inputs, units, units, given.reverse, threads, False, columns]
    )
    # The cell has no c, and nothing is projected or traced.
    order = torch.arange(batch)
    call = (x, h_0, None, weight_ih, weight_hh, None, bias, given.lengths, order, None)
    dtypes = (dtype, sums, dtype, sums, sums, sums, sums)
    results = [
        torch.full_like(v, torch.nan, dtype=kind)
        for v, kind in zip((*given.grads, *given.inputs), dtypes, strict=True)
    ]
    if given.lengths is not None:
        results[2].zero_()  # what is past the end is not written
    saved = torch.full((layer("saved_size", x, sizes),), torch.nan, dtype=sums)
    y, h_n, dx, dh_0, *dweights = results
    layer("forward", sizes, [*call, y, h_n, None, saved, None])
    grads = [v.to(kind) for v, kind in zip(given.grads, dtypes, strict=False)]
    into = [dx, dh_0, None, *dweights, None, None, None]
    layer("backward", sizes, [*call, y, saved, *grads, None, given.detach, *into])
    return results


def expected(given: Given) -> list[Tensor]:
    """The same by a loop; every choice is a Python ``if``."""
    leaves = [v.clone().requires_grad_() for v in given.inputs]
    x, h_0, weight_ih, weight_hh, bias = leaves
    steps, batch, _ = x.shape
    y, final = [], []
    for b in range(batch):
        h, end = h_0[b], steps if given.lengths is None else int(given.lengths[b])
        rows = [torch.zeros_like(h)] * steps
        for t in reversed(range(end)) if given.reverse else range(end):
            if given.detach is not None and given.detach[t].expand(batch)[b]:
                h = h.detach()
            rows[t] = h = torch.tanh(weight_ih @ x[t, b] + bias + weight_hh @ h)
        y.append(torch.stack(rows))
        final.append(h)
    results = [torch.stack(y, 1), torch.stack(final)]
    grads = torch.autograd.grad(results, leaves, given.grads, materialize_grads=True)
    return [*(v.detach() for v in results), *grads]


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The worst, relative to the largest entry of its tensor."""
    pairs = zip(found, wanted, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize(
    "options",
    [
        *({"reverse": reverse, "sizes": sizes}
          for reverse in (False, True)
          for sizes in ((1, 1, 1, 1), (9, 5, 3, 17), (30, 37, 60, 40), (4, 3, 2, 300))),
        {"sizes": (12, 6, 4, 21), "lengths": [12, 12, 9, 4, 4, 1]},
        {"sizes": (12, 6, 4, 21), "detach": 1},
        {"sizes": (12, 6, 4, 21), "detach": 6},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)  # fmt: skip
@each_dtype
@each_threads
def test_against_a_loop(layer: Any, options: Any, dtype: torch.dtype, threads: int) -> None:
    case = given(*options["sizes"], **{n: x for n, x in options.items() if n != "sizes"})
    assert error(run(layer, case, dtype, threads), expected(case)) <= TOLERANCE[dtype]


@each_threads
def test_operands_of_16_bits(layer: Any, threads: int) -> None:
    """bfloat16 operands with float32 sums: the same walk, with one storage type more."""
    case = given(30, 9, 20, 40, lengths=[30, 30, 30, 22, 22, 15, 9, 9, 1])
    found = error(run(layer, case, torch.bfloat16, threads), expected(case))
    assert 1e-4 < found <= 2e-2  # they are bfloat16
