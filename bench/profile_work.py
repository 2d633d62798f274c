"""What ``bench profile`` runs, and how much each phase of it computes and moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

import throughtime
from bench.cell import fixed_mask
from throughtime import functional

BYTES = 4  # of a float32
SAVED_UNITS = 16  # what the forward pass saves is padded to whole vectors of this many numbers
SAVED = 5  # i, f, g, o, c


@dataclass(frozen=True)
class Amount:
    """Operations (a multiply-add is two) and bytes of one phase of one iteration."""

    operations: float = 0.0
    bytes: float = 0.0


Amounts = Mapping[tuple[str, str], Amount]  # by pass and phase


@dataclass(frozen=True)
class Job:
    """One iteration, forward and backward, and the operators it calls."""

    op: str
    shape: str
    iterate: Callable[[], object]
    passes: Mapping[str, str]  # operator -> pass
    amounts: Amounts = field(default_factory=dict)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _iteration(
    layer: torch.nn.Module, input: Tensor, grad: Tensor, **options: Tensor | None
) -> Callable[[], object]:
    parameters = list(layer.parameters())

    def iterate() -> object:
        output, _ = layer(input, **options)
        return torch.autograd.grad(output, parameters, grad)

    return iterate


def lstm(steps: int, batch: int, inputs: int, hidden: int, *, p: float = 0.0) -> Job:
    """One LSTM layer with a fraction ``p`` of its steps detached; the input needs no gradient.

    Example:
        >>> lstm(3, 2, 4, 5).amounts["forward", "input"].operations == 8 * 3 * 2 * 4 * 5
        True
    """
    torch.manual_seed(0)
    layer = throughtime.LSTM(inputs, hidden, backend="cpu")
    x = torch.randn(steps, batch, inputs, generator=_generator())
    grad = torch.randn(steps, batch, hidden, generator=_generator())
    mask = fixed_mask(steps, p)
    return Job(
        op="lstm",
        shape=f"{steps}, {batch}, {inputs}, {hidden}" + (f", p {p:g}" if p else ""),
        iterate=_iteration(layer, x, grad, detach_mask=mask),
        passes={"lstm_forward": "forward", "lstm_backward": "backward"},
        amounts=lstm_amounts(steps, batch, inputs, hidden, mask),
    )


def lstm_amounts(
    steps: int, batch: int, inputs: int, hidden: int, mask: Tensor | None = None
) -> Amounts:
    """What the phases of the LSTM kernels compute and have to move; ``mask`` is bool ``[T]``.

    Bytes are those that a perfect cache would leave: every array once.

    Example:
        >>> lstm_amounts(3, 2, 4, 5)["backward", "recurrent"].operations == 8 * 2 * 2 * 5 * 5
        True
    """
    rows = steps * batch
    cut = 0 if mask is None else int(mask[1:].sum())
    product = 8.0 * rows * hidden
    units = -(-hidden // SAVED_UNITS) * SAVED_UNITS
    saved = SAVED * rows * units
    weights = 4 * hidden * (inputs + hidden)
    pointwise = Amount(bytes=BYTES * (saved + rows * hidden))  # and the outputs or their gradients
    return {
        ("forward", "pack"): Amount(bytes=2 * BYTES * weights),
        ("forward", "gather"): Amount(bytes=2 * BYTES * rows * inputs),
        ("forward", "input"): Amount(product * inputs),
        ("forward", "recurrent"): Amount(product * hidden),
        ("forward", "pointwise"): pointwise,
        ("backward", "pack"): Amount(bytes=2 * BYTES * 4 * hidden * hidden),
        ("backward", "gather"): Amount(bytes=2 * BYTES * rows * (inputs + hidden)),
        # What the first step hands to the initial state is in "other".
        ("backward", "recurrent"): Amount(8.0 * batch * hidden * hidden * (steps - 1 - cut)),
        ("backward", "pointwise"): pointwise,
        ("backward", "weights"): Amount(product * (inputs + hidden + 1)),
        ("backward", "finish"): Amount(bytes=2 * BYTES * weights),
    }


def rel_lstm(steps: int, batch: int, inputs: int, hidden: int, window_size: int, top_k: int) -> Job:
    """One RelLSTM layer with as many attention units as hidden ones."""
    torch.manual_seed(0)
    layer = throughtime.RelLSTM(inputs, hidden, window_size=window_size, top_k=top_k, backend="cpu")
    x = torch.randn(steps, batch, inputs, generator=_generator())
    grad = torch.randn(steps, batch, hidden, generator=_generator())
    rows = steps * batch
    recurrent = Amount(12.0 * rows * hidden * hidden)  # gates, query and key
    return Job(
        op="rel-lstm",
        shape=f"{steps}, {batch}, {inputs}, {hidden}, {window_size}, {top_k}",
        iterate=_iteration(layer, x, grad),
        passes={"rel_lstm_forward": "forward", "rel_lstm_backward": "backward"},
        amounts={
            ("forward", "input"): Amount(8.0 * rows * hidden * inputs),
            ("forward", "recurrent"): recurrent,
            ("backward", "recurrent"): recurrent,
            ("backward", "weights"): Amount(rows * hidden * (12.0 * hidden + 8.0 * (inputs + 1))),
        },
    )


def relevancy(
    steps: int,
    batch: int,
    heads: int,
    width: int,
    window_size: int,
    top_k: int,
    *,
    score: Literal["dot", "additive"] = "dot",
) -> Job:
    """Relevancy attention of ``[batch, heads, steps, width]``, score "dot" or "additive"."""
    sizes = (batch, heads, steps, width)
    query, key, value = (
        torch.randn(*sizes, generator=torch.Generator().manual_seed(n)).requires_grad_()
        for n in range(3)
    )
    grad = torch.randn(*sizes, generator=_generator())
    weight = torch.randn(width, generator=_generator()) if score == "additive" else None

    def iterate() -> object:
        output = functional.relevancy_attention(
            query, key, value, window_size, top_k, score=score, score_weight=weight, backend="cpu"
        )
        return torch.autograd.grad(output, (query, key, value), grad)

    return Job(
        op="relevancy",
        shape=f"{steps}, {batch}, {heads}, {width}, {window_size}, {top_k}, {score}",
        iterate=iterate,
        passes={"relevancy_forward": "forward", "relevancy_backward": "backward"},
    )
