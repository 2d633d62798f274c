"""The one list of shapes and dtypes, inputs for them, and an LSTM written by hand to compare with.

``plain_lstm`` takes every decision (detach, reset, end of a sample) as a Python ``if`` on one
sample at a time; it shares no idea with the code under test but the four equations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from throughtime.backends import ORDER, Request, passed_over

Result = tuple[Tensor, tuple[Tensor, Tensor]]

DTYPES = (torch.float64, torch.float32)
LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer; ``P`` = 0 means without projection."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int = 0

    def __str__(self) -> str:
        return f"T{self.T}-B{self.B}-I{self.I}-H{self.H}" + (f"-P{self.P}" if self.P else "")


SHAPES = (
    Shape(1, 1, 1, 1),
    Shape(1, 3, 4, 5),
    Shape(6, 1, 3, 1),
    Shape(7, 3, 1, 17),
    Shape(5, 4, 9, 8),
    Shape(12, 2, 3, 33),
)
PROJECTED = (Shape(5, 3, 4, 6, 2), Shape(4, 2, 3, 9, 1))
SMALL = Shape(6, 3, 4, 5)

RESULTS = ("output", "h_n", "c_n")
# For hx, weights, biases and projection: everything that has a gradient, in call order.
NAMES = ("input", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def runnable(proj_size: int = 0, dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends that are meant for the CPU of this machine: not Triton's interpreter."""
    request = Request("lstm", 8, proj_size, torch.device("cpu"), dtype)
    return [name for name in ORDER if passed_over(name, request) is None]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that depend on the seed and the shape alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def random_mask(*shape: int, p: float, seed: int) -> Tensor:
    """True with probability p."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < p


def tensors(
    shape: Shape, dtype: torch.dtype = torch.float64, bias: bool = True
) -> dict[str, Tensor]:
    """Leaves that require a gradient, weights large enough that every gate matters."""
    out = shape.P or shape.H
    sizes = {
        "input": (shape.T, shape.B, shape.I),
        "h_0": (shape.B, out),
        "c_0": (shape.B, shape.H),
        "weight_ih": (4 * shape.H, shape.I),
        "weight_hh": (4 * shape.H, out),
    }
    if bias:
        sizes |= {"bias_ih": (4 * shape.H,), "bias_hh": (4 * shape.H,)}
    if shape.P:
        sizes["weight_hr"] = (shape.P, shape.H)
    made = {}
    for seed, (name, size) in enumerate(sizes.items()):
        scale = 1.5 / max(1, size[-1]) ** 0.5 if name.startswith("weight") else 0.8
        made[name] = (scale * random(*size, seed=seed)).to(dtype).requires_grad_()
    return made


def starts(shape: Shape, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What h and c start anew from, as leaves: ``reset_hx`` of a call that gets them by name."""
    sizes = {"reset_h": shape.P or shape.H, "reset_c": shape.H}
    return {
        name: random(shape.T, shape.B, size, seed=50 + k, dtype=dtype).requires_grad_()
        for k, (name, size) in enumerate(sizes.items())
    }


def as_dtype(named: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same numbers as leaves of another dtype."""
    return {name: x.detach().to(dtype).requires_grad_() for name, x in named.items()}


def call(function: Callable[..., Result], named: dict[str, Tensor], **options: object) -> Result:
    """Call a function that has the signature of ``functional.lstm``."""
    hx = (named["h_0"], named["c_0"]) if "h_0" in named else None
    arguments = [named.get(name) for name in NAMES[3:]]
    if "reset_h" in named:
        options["reset_hx"] = (named["reset_h"], named["reset_c"])
    return function(named["input"], hx, *arguments, **options)


def results(
    function: Callable[..., Result], named: dict[str, Tensor], **options: object
) -> dict[str, Tensor]:
    """Outputs, final states, and the gradient of everything through all three of them at once."""
    return with_gradients(call(function, named, **options), named)


def with_gradients(
    result: tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]],
    named: dict[str, Tensor],
    used: tuple[str, ...] = RESULTS,
) -> dict[str, Tensor]:
    """``results`` of a call that has been made already, also of a module's."""
    output, (h_n, c_n) = result
    output = output.data if isinstance(output, PackedSequence) else output
    found = {"output": output, "h_n": h_n, "c_n": c_n}
    # float32 numbers, so that they are the same in float64.
    single = [random(*x.shape, seed=100 + k).float() for k, x in enumerate(found.values())]
    loss = sum(
        (x * weights.to(x.dtype)).sum()
        for (name, x), weights in zip(found.items(), single, strict=True)
        if name in used
    )
    # A leaf that is detached everywhere, as h_0 may be, has a gradient of zero.
    gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    found = {name: x.detach() for name, x in found.items()}
    return found | {f"grad {name}": x for name, x in zip(named, gradients, strict=True)}


def plain_lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    detach_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_hx: tuple[Tensor, Tensor] | None = None,
    reverse: bool = False,
    frozen: dict[tuple[int, int], Tensor] | None = None,
    steps: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer, one direction, one sample at a time, by hand, in the dtype of the input.

    ``frozen`` replaces ``.detach()``: the hidden state that enters step t of sample b is taken from
    ``frozen[t, b]`` where it is detached. With recorded values this is an ordinary function whose
    true derivative at that point is the h-detach gradient. ``steps`` gets h and c of step t of
    sample b at ``[t, b]``.
    """
    length, batch, _ = input.shape
    columns, last_h, last_c = [], [], []
    for b in range(batch):
        sizes = (weight_hh.size(1), len(weight_hh) // 4)
        h, c = (input.new_zeros(n) for n in sizes) if hx is None else (hx[0][b], hx[1][b])
        end = length if lengths is None else int(lengths[b])
        rows: list[Tensor] = [torch.zeros_like(h)] * length
        for t in reversed(range(end)) if reverse else range(end):
            if reset is not None and reset[t, b]:
                h, c = (
                    (torch.zeros_like(h), torch.zeros_like(c))
                    if reset_hx is None
                    else (reset_hx[0][t, b], reset_hx[1][t, b])
                )
            h_in = h
            if detach_mask is not None and detach_mask[(t, b)[: detach_mask.dim()]]:
                h_in = h.detach() if frozen is None else frozen[t, b]
            gates = weight_ih @ input[t, b] + weight_hh @ h_in
            for bias in (bias_ih, bias_hh):
                gates = gates if bias is None else gates + bias
            i, f, g, o = gates.chunk(4)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            if weight_hr is not None:
                h = weight_hr @ h
            rows[t] = h
            if steps is not None:
                steps[t, b] = h, c
        columns.append(torch.stack(rows))
        last_h.append(h)
        last_c.append(c)
    return torch.stack(columns, 1), (torch.stack(last_h), torch.stack(last_c))


def plain_steps(
    named: dict[str, Tensor], gradients: dict[str, Tensor], **options: object
) -> dict[str, Tensor]:
    """Every c_t, and the whole gradients of every h_t and c_t, by ``plain_lstm``; else zeros.

    Args:
        named: as in :func:`call`.
        gradients: of ``output``, ``h_n``, ``c_n`` and perhaps ``cells``.
        options: as in :func:`call`.

    Returns:
        ``cells``, ``trace_h`` and ``trace_c``, each ``[T, B, H or P]``.
    """
    steps: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    output, (h_n, c_n) = call(plain_lstm, named, steps=steps, **options)
    pairs = [(output, gradients["output"]), (h_n, gradients["h_n"]), (c_n, gradients["c_n"])]
    if "cells" in gradients:
        pairs += [(c, gradients["cells"][at]) for at, (_, c) in steps.items()]
    outputs, grads = zip(*[(x, g) for x, g in pairs if x.requires_grad], strict=True)
    states = [x for step in steps.values() for x in step]
    found = torch.autograd.grad(outputs, states, grads, materialize_grads=True)
    made = {
        "cells": torch.zeros(*output.shape[:2], c_n.size(1), dtype=output.dtype),
        "trace_h": torch.zeros_like(output),
        "trace_c": torch.zeros(*output.shape[:2], c_n.size(1), dtype=output.dtype),
    }
    for k, (at, (_, c)) in enumerate(steps.items()):
        made["cells"][at], made["trace_h"][at] = c.detach(), found[2 * k]
        made["trace_c"][at] = found[2 * k + 1]
    return made


def options_for(shape: Shape) -> dict[str, dict[str, Any]]:
    """Every optional argument of a layer, alone and together, by a readable name."""
    T, B = shape.T, shape.B
    by_step, by_sample = random_mask(T, p=0.5, seed=1), random_mask(T, B, p=0.5, seed=2)
    lengths = torch.arange(B) * 2 % (T + 1)
    reset = random_mask(T, B, p=0.3, seed=3)
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "mask-T": {"detach_mask": by_step},
        "mask-TB": {"detach_mask": by_sample},
        "mask-all": {"detach_mask": torch.ones(T, dtype=torch.bool)},
        "lengths": {"lengths": lengths},
        "reset": {"reset": reset},
        "all": {"detach_mask": by_sample, "lengths": lengths, "reset": reset},
    }
    for name in ("mask-TB", "lengths", "reset"):
        options[f"{name}-reverse"] = options[name] | {"reverse": True}
    options["all-reverse"] = options["all"] | {"detach_mask": by_step, "reverse": True}
    return options | {"reverse": {"reverse": True}}


OPTIONS = tuple(options_for(SMALL))
