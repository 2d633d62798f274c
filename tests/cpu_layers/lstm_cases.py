"""Calls of the LSTM kernels alone: arguments, results and gradients by name, and what to expect."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime.ops.lstm import reference
from throughtime.ops.lstm.arguments import LstmArguments

STATES = ("input", "h_0", "c_0")
WEIGHTS = ("weight_ih", "weight_hh", "weight_hr", "bias")


class Case(NamedTuple):
    """Arguments by name, and gradients of y, h_n, c_n."""

    tensors: dict[str, Tensor | None]
    grads: list[Tensor]
    lengths: Tensor | None
    reset: Tensor | None
    detach: Tensor | None
    reverse: bool


def case(
    steps: int, batch: int, inputs: int, units: int, outputs: int = 0, form: str = "",
    dtype: torch.dtype = torch.bfloat16,
) -> Case:  # fmt: skip
    """Numbers of a dtype; a form may be "ragged" or "reverse": with lengths, resets and a mask."""
    R = outputs or units
    scale = {"weight_ih": 0.3, "weight_hh": 0.8 * R**-0.5, "weight_hr": units**-0.5}
    shapes: dict[str, tuple[int, ...]] = {
        "input": (steps, batch, inputs), "h_0": (batch, R), "c_0": (batch, units),
        "weight_ih": (4 * units, inputs), "weight_hh": (4 * units, R), "weight_hr": (R, units),
        "bias": (4 * units,),
    }  # fmt: skip
    tensors: dict[str, Tensor | None] = {
        name: (scale.get(name, 1) * (2 * torch.rand(*shape) - 1)).to(dtype)
        for name, shape in shapes.items()
    }
    if not outputs:
        tensors["weight_hr"] = None
    grads = [torch.randn(*s).to(dtype) for s in ((steps, batch, R), (batch, R), (batch, units))]
    lengths = torch.randint(0, steps + 1, (batch,)).sort(descending=True).values
    lengths[0] = steps
    reset, detach = torch.rand(steps, batch) < 0.1, torch.rand(steps, batch) < 0.3
    kept = (lengths, reset, detach) if form else (None, None, None)
    return Case(tensors, grads, *kept, reverse=form == "reverse")


def run(
    layer: Any, case: Case, threads: int = 1, recompute: bool = False, more: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """Results, gradients and trace by name; ``more`` is what these kernels take beside sizes."""
    given = {
        name: x if x is None or name in ("input", "h_0") else x.float()
        for name, x in case.tensors.items()
    }
    x, y = case.tensors["input"], torch.full_like(case.grads[0], torch.nan)
    assert x is not None
    units, outputs = case.grads[2].size(1), y.size(2)
    options = (case.reverse, threads, recompute, x.size(1))
    sizes = torch.tensor([*x.shape, units, outputs, *options, *more])
    call = (*given.values(), case.lengths, torch.arange(x.size(1)), case.reset)
    saved = torch.full((layer("saved_size", x, sizes),), torch.nan)
    h_n, c_n = (torch.full_like(g, torch.nan, dtype=torch.float32) for g in case.grads[1:])
    # What is past the end of a sample is not written.
    cells, trace_h, trace_c = (torch.zeros(*x.shape[:2], n) for n in (units, outputs, units))
    layer("forward", sizes, [*call, y, h_n, c_n, saved, cells])
    found = {
        name: None if v is None else torch.full_like(v, torch.nan, dtype=torch.float32)
        for name, v in case.tensors.items()
    }
    found["input"] = torch.zeros_like(x)
    grads = (case.grads[0], *(g.float() for g in case.grads[1:]))
    into = [found[name] for name in (*STATES, "weight_ih", "weight_hh", "bias", "weight_hr")]
    layer("backward", sizes, [*call, y, saved, *grads, case.detach, *into, trace_h, trace_c])
    results = {"y": y, "h_n": h_n, "c_n": c_n, "cells": cells, **found}
    results |= {"trace_h": trace_h, "trace_c": trace_c}
    return {name: x for name, x in results.items() if x is not None}


def expected(case: Case) -> dict[str, Tensor]:
    """The same by the reference in float64."""
    leaves = {
        name: None if x is None else x.double().requires_grad_() for name, x in case.tensors.items()
    }
    given = {name: x for name, x in leaves.items() if name != "bias"}
    steps: dict[int, tuple[Tensor, Tensor]] = {}
    results = reference.run(
        LstmArguments(**given, bias_ih=leaves["bias"], bias_hh=None, lengths=case.lengths,
                      reset=case.reset, reset_h=None, reset_c=None, detach_mask=case.detach,
                      reverse=case.reverse, recompute=False),
        lambda t, h_t, c_t: steps.update({t: (h_t, c_t)}),
    )  # fmt: skip
    states = [steps[t] for t in range(len(steps))]
    for x in itertools.chain(*states):
        x.retain_grad()
    torch.autograd.backward(list(results), [g.double() for g in case.grads])
    named = dict(zip(("y", "h_n", "c_n"), (x.detach() for x in results), strict=True))
    inside = torch.ones(1) if case.lengths is None else inside_of(case.lengths, len(steps))
    named["cells"] = torch.where(inside > 0, torch.stack([c for _, c in states]).detach(), 0.0)
    named |= {name: x.grad for name, x in leaves.items() if x is not None}
    traces = zip(*states, strict=True)
    return named | {
        name: torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for x in trace])
        for name, trace in zip(("trace_h", "trace_c"), traces, strict=True)
    }


def inside_of(lengths: Tensor, steps: int) -> Tensor:
    """1 within a sample, ``[T, B, 1]``."""
    return (torch.arange(steps).unsqueeze(1) < lengths).float().unsqueeze(2)
