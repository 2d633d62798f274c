"""backend="cuda" from Python down to the kernels, which run on the CPU here (cuda_on_cpu/).

Only csrc/lstm/cuda/launch.cu and the checks of csrc/lstm/cuda/operators.cpp need a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import throughtime
from cases import (
    NAMES,
    Shape,
    as_dtype,
    random,
    random_mask,
    results,
    tensors,
    with_gradients,
)
from closeness import TOLERANCE, assert_all_close
from throughtime import functional
from throughtime.backends.backend import OPERATIONS
from throughtime.nn import LSTM
from throughtime.ops.lstm.recurrence import saved_gates

SMALL = {"compute": 90, "multiprocessors": 6, "shared_bytes": 48 << 10, "cluster": 2}
LENGTHS = torch.tensor([3, 0, 4])
RESET = random_mask(4, 3, p=0.4, seed=1)
MASK = random_mask(4, 3, p=0.5, seed=2)
LOW_PRECISION = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # relative to the largest entry


class HostKernels:
    """Implements the recurrence operators on the CPU by the kernels' own sources."""

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = kernels
        self.tiers: list[int] = []  # of the plans that ran

    def run(
        self, backward: bool, T: int, like: Tensor, tensors: dict[str, Any], **numbers: int
    ) -> None:
        D, H = like.size(0), like.size(2)
        B = tensors["c_0"].size(1)
        shape = {"T": T, "B": B, "D": D, "H": H}
        plan = self.kernels.plan(**shape, scalar_bytes=like.itemsize, backward=backward, **SMALL)
        self.tiers.append(plan["tier"])
        cut = {name: value for name, value in plan.items() if isinstance(value, int)}
        given = {n: x.contiguous() for n, x in tensors.items() if x is not None}
        addresses = {name: x.data_ptr() for name, x in given.items()}
        dtype = str(like.dtype).removeprefix("torch.")
        self.kernels.run(dtype, backward, addresses, {**shape, **cut, **numbers})

    def forward(
        self, projected: Tensor, bias: Tensor | None, h_0: Tensor, c_0: Tensor, weight_hh: Tensor,
        lengths: Tensor | None, reset: Tensor | None, reverse: bool, save: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        T, B, D, gates = projected.shape
        H = weight_hh.size(2)
        results = {
            "output": h_0.new_empty(T, B, D, H), "h_n": h_0.clone(), "c_n": c_0.clone(),
            "gates": h_0.new_empty(T if save else 0, B, D, gates, dtype=saved_gates(h_0.dtype)),
            "cells": c_0.new_empty(T if save else 0, B, D, H),
        }  # fmt: skip
        if B > 0:
            saved = results if save else {k: results[k] for k in ("output", "h_n", "c_n")}
            inputs = {
                "projected": projected, "bias": bias, "h_0": h_0, "c_0": c_0,
                "weight_hh": weight_hh, "lengths": lengths, "reset": reset,
            }  # fmt: skip
            self.run(False, T, weight_hh, {**inputs, **saved}, reverse=int(reverse))
        return tuple(results.values())

    def backward(
        self, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None,
        c_0: Tensor, weight_hh: Tensor, gates: Tensor, cells: Tensor, lengths: Tensor | None,
        reset: Tensor | None, detach_mask: Tensor | None, reverse: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        def start(state: Tensor | None) -> Tensor:
            return torch.zeros_like(c_0) if state is None else state.to(c_0.dtype, copy=True)

        results = (torch.empty_like(gates, dtype=weight_hh.dtype), start(grad_h_n), start(grad_c_n))
        if c_0.size(1) > 0:
            mask = None if detach_mask is None else detach_mask.contiguous()
            strides = (0, 0, 0) if mask is None else mask.stride()
            inputs = {
                "grad_output": grad_output, "grad_h_n": grad_h_n, "grad_c_n": grad_c_n,
                "c_0": c_0, "weight_hh": weight_hh, "gates": gates, "cells": cells,
                "lengths": lengths, "reset": reset, "detach_mask": mask,
                **dict(zip(("grad_gates", "grad_h_0", "grad_c_0"), results, strict=True)),
            }  # fmt: skip
            self.run(
                True, gates.size(0), weight_hh, inputs, reverse=int(reverse),
                detach_stride_d=strides[0], detach_stride_t=strides[1],
                detach_stride_b=strides[2],
            )  # fmt: skip
        return results


@pytest.fixture
def host(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostKernels]:
    """backend="cuda" may run on the CPU."""
    made = HostKernels(kernels)
    anywhere = replace(OPERATIONS["lstm"]["cuda"], requirements=())
    monkeypatch.setitem(OPERATIONS["lstm"], "cuda", anywhere)
    library = torch.library.Library("throughtime", "IMPL")
    library.impl("lstm_recurrence_forward", made.forward, "CPU")
    library.impl("lstm_recurrence_backward", made.backward, "CPU")
    yield made
    library._destroy()


def assert_matches(found: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Against results in float64."""
    if dtype in TOLERANCE:
        return assert_all_close(found, {n: x.to(dtype) for n, x in exact.items()})
    for name, wanted in exact.items():
        assert found[name].dtype == dtype, name
        error = (found[name].double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)
        assert error <= LOW_PRECISION[dtype], f"{name}: {error:.2e}"
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden", [5, 16, 40])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"detach_mask": MASK[:, 0], "reverse": True},
        {"detach_mask": MASK, "reset": RESET, "lengths": LENGTHS},
        {"detach_mask": MASK, "reset": RESET, "lengths": LENGTHS, "reverse": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_layer_matches_the_reference(
    options: dict[str, Any], hidden: int, dtype: torch.dtype, host: HostKernels
) -> None:
    """5 units are padded to 8; 40 take several blocks."""
    shape = Shape(4, 3, 2, hidden)
    given = {name: x.detach().to(dtype) for name, x in tensors(shape).items() if name in NAMES[:7]}
    exact = results(functional.lstm, as_dtype(given, torch.float64), backend="reference", **options)
    if "lengths" in options:
        given["input"][torch.arange(4).unsqueeze(1) >= LENGTHS] = torch.nan
    found = results(functional.lstm, as_dtype(given, dtype), backend="cuda", **options)
    assert host.tiers and 0 not in host.tiers
    assert_matches(found, exact, dtype)


def both_directions(
    given: dict[str, Tensor], backend: Any, hidden: int, **options: Any
) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    weights = [(*(leaves[f"{name} {d}"] for name in NAMES[3:7]), None) for d in range(2)]
    output, (h_n, c_n) = functional.bidirectional_lstm(
        leaves["input"], (leaves["h_0"], leaves["c_0"]), (weights[0], weights[1]),
        backend=backend, **options,
    )  # fmt: skip
    assert output.shape == (4, 3, 2 * hidden)
    return with_gradients((output, (h_n, c_n)), leaves)


@pytest.mark.parametrize("hidden", [5, 24])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"detach_mask": (MASK, None), "lengths": LENGTHS},
        {"detach_mask": (MASK[:, 0], MASK), "reset": (RESET, RESET.flip(0)), "lengths": LENGTHS},
        {"detach_mask": (MASK[:, 0], MASK[:, 1]), "reset": (None, RESET)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_both_directions_match_the_reference(
    options: dict[str, Any], hidden: int, host: HostKernels
) -> None:
    given = {"input": random(4, 3, 2, seed=1), "h_0": random(2, 3, hidden, seed=2)}
    given["c_0"] = random(2, 3, hidden, seed=3)
    for d in range(2):
        drawn = tensors(Shape(4, 3, 2, hidden))
        given |= {f"{n} {d}": drawn[n] * (1 + d) for n in NAMES[3:7]}
    exact = both_directions(given, "reference", hidden, **options)
    single = {name: x.float() for name, x in given.items()}
    found = both_directions(single, "cuda", hidden, **options)
    assert len(host.tiers) == 2  # one launch for both directions, in each pass
    assert_matches(found, exact, torch.float32)


@pytest.mark.parametrize("left_out", [("bias_ih",), ("bias_ih", "bias_hh"), ("h_0", "c_0")])
def test_what_may_be_missing(left_out: tuple[str, ...], host: HostKernels) -> None:
    given = {n: x.float() for n, x in tensors(Shape(4, 3, 2, 5)).items() if n in NAMES[:7]}
    given = {n: x for n, x in given.items() if n not in left_out}
    found = [
        results(functional.lstm, as_dtype(given, torch.float32), backend=backend)
        for backend in ("cuda", "reference")
    ]
    assert_all_close(*found)


def test_module_in_both_directions(host: HostKernels) -> None:
    layer = LSTM(2, 5, num_layers=2, bidirectional=True, detach_prob=0.5, dropout=0.0)
    x, hx = random(4, 3, 2, seed=1).float(), (random(4, 3, 5, seed=2).float(),) * 2
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        x, torch.tensor([4, 2, 3]), enforce_sorted=False
    )
    for input in (x, packed):
        mask = random_mask(4, 4, 1, p=0.5, seed=3)
        found = []
        for backend in ("cuda", "reference"):
            layer.backend = backend  # type: ignore[assignment]
            layer.zero_grad()
            output, states = layer(input, hx, detach_mask=mask)
            data = output if isinstance(output, Tensor) else output.data
            (data.square().sum() + states[0].sum() + states[1].square().sum()).backward()
            grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
            found.append({"output": data.detach(), "h_n": states[0].detach(), **grads})
        assert len(found[0]) == 18
        assert_all_close(*found)


def test_empty_batch_and_no_gradient(host: HostKernels) -> None:
    layer = throughtime.LSTM(2, 5, backend="cuda")
    output, (h_n, c_n) = layer(torch.zeros(4, 0, 2))
    assert output.shape == (4, 0, 5) and h_n.shape == c_n.shape == (1, 0, 5)
    with torch.no_grad():
        output, _ = layer(torch.ones(4, 1, 2))
    assert not output.requires_grad and output.is_contiguous()
