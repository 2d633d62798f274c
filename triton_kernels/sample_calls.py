"""Calls of the launchers that together launch every kernel in every way that compiles another code.

For ``compile.py`` and tests: no kernel need run, and none of the numbers matters.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from throughtime.triton_kernels import lstm, rel_lstm, relevancy

import throughtime  # noqa: F401  # defines the operators
from throughtime.ops.lstm.recurrence import saved_gates, sums


def call(op: str, **given: Any) -> Any:
    """The arguments of an operator by name; those that are not given are None."""
    schema = getattr(torch.ops.throughtime, op).default._schema
    names = [argument.name for argument in schema.arguments]
    return namedtuple("Call", names, defaults=[None] * len(names))(**given)


def run_lstm(device: torch.device, dtype: torch.dtype, B: int, H: int, everything: bool) -> None:
    """Both passes of a walk, or of single steps, with every option or with none."""
    made = partial(torch.zeros, dtype=dtype, device=device)
    sum_of = partial(torch.zeros, dtype=sums(dtype), device=device)
    mask = torch.zeros(1, B, dtype=torch.bool, device=device) if everything else None
    given = {
        "projected": sum_of(1, B, 4 * H),
        "bias": sum_of(4 * H) if everything else None,
        "h_0": made(B, H),
        "c_0": sum_of(B, H),
        "weight_hh": made(4 * H, H),
        "reset": mask,
        "reverse": not everything,
    }
    lstm.recurrence_forward(call("lstm_recurrence_forward", **given, save=everything))
    given = {name: given[name] for name in ("c_0", "weight_hh", "reset", "reverse")}
    given |= {
        "grad_output": made(1, B, H) if everything else None,
        "gates": torch.zeros(1, B, 4 * H, dtype=saved_gates(dtype), device=device),
        "cells": sum_of(1, B, H),
        "detach_mask": mask,
    }
    lstm.recurrence_backward(call("lstm_recurrence_backward", **given))


def run_streamed(device: torch.device) -> None:
    """Both passes of a walk that streams 16-bit weights, as where they do not fit the chip."""
    with mock.patch.object(lstm, "_shared_bytes", return_value=0):
        run_lstm(device, torch.bfloat16, 64, 128, True)


def run_relevancy(
    device: torch.device, dtype: torch.dtype, D: int, W: int, K: int, additive: bool
) -> None:
    """Both passes of attention; values have one feature less than keys, if those have some."""
    made = partial(torch.zeros, dtype=dtype, device=device)
    heads = 2 if D > 1 else 1
    given = {
        "query": made(1, heads, 3, D),
        "key": made(1, heads, 3, D),
        "value": made(1, heads, 3, D),
        "score_weight": made(heads, D) if additive else None,
        "retained": 0,
        "scale": 1.0,
        "keep_first": not additive,
        "window_size": W,
        "top_k": K,
    }
    output, lse, last, _, _ = relevancy.forward(call("relevancy_forward", **given))
    after = {"output": output, "lse": lse, "last": last, "grad_output": output}
    relevancy.backward(call("relevancy_backward", **given, **after))


def run_rel_lstm(device: torch.device, dtype: torch.dtype, H: int, A: int, W: int, K: int) -> None:
    """Both passes of RelLSTM, over steps that fill the window and the retained set."""
    made = partial(torch.zeros, dtype=dtype, device=device)
    T = W + K
    given = {
        "input": made(T, 1, 1),
        "h_0": made(1, H),
        "c_0": made(1, H),
        "context_0": made(1, H),
        "weight_ih": made(4 * H, 1),
        "weight_hh": made(4 * H, H),
        "weight_query": made(A, H),
        "weight_key": made(A, H),
        "weight_score": made(A),
        "retained": 0,
        "window_size": W,
        "top_k": K,
        "keep_first": H == 1,
    }
    *_, saved = rel_lstm.forward(call("rel_lstm_forward", **given, save=True))
    last = torch.full((T, 1), T - 1, device=device)  # as if the kernel had run
    after = {"last": last, "saved": saved, "need_input": False, "need_weights": False}
    rel_lstm.backward(call("rel_lstm_backward", **given, **after))


def sample_calls(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and call.

    Of the LSTM sizes that are multiples of 16, about which the compiler is told, with every option,
    and others with none. A size of 1 is a constant to the compiler.
    """
    yield "bfloat16, H 128, every option, streamed", partial(run_streamed, device)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        walked = lstm.WALKED_UNITS[dtype.itemsize]
        sizes: tuple[int, ...] = (1, 16, 64, walked - 1, walked, 257, 512)
        if dtype == torch.float16:  # compiled as bfloat16 is
            sizes = (walked, 257)
        for H in dict.fromkeys(sizes):
            everything = H % 16 == 0
            name = f"{short}, H {H}, {'every option' if everything else 'no option'}"
            B = 64 if everything else 3
            yield name, partial(run_lstm, device, dtype, B, H, everything)
        if dtype.itemsize < 4:
            continue  # the others compute in float32
        for D, W, K, additive in (
            (64, 64, 64, False), (128, 10, 15, True), (1, 1, 0, False), (19, 2, 3, True)
        ):  # fmt: skip
            score = "additive" if additive else "dot"
            name = f"{short}, D {D}, window {W}, top_k {K}, {score}"
            yield name, partial(run_relevancy, device, dtype, D, W, K, additive)
        for H, A, W, K in ((512, 512, 10, 15), (128, 25, 10, 15), (19, 18, 2, 2), (1, 1, 1, 1)):
            name = f"{short}, H {H}, A {A}, window {W}, top_k {K}"
            yield name, partial(run_rel_lstm, device, dtype, H, A, W, K)
