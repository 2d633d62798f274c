"""Relevancy attention and RelLSTM: the Triton kernels on a GPU, against the reference."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

import throughtime
from cases import random
from cases_gpu import (
    DEVICE,
    STAND_IN,
    gpu,
    may_hang,
    not_interpreted,
    on_device,
)
from samples import ATTENTION, LAYERS, Attention, Layer, assert_same, doubled, expect, run
from throughtime import functional

# The operators have no "reference" of their own: that stand-in is the CPU kernels here.
SUFFIX = "" if STAND_IN in ("cpu", "reference") else "_triton"

pytestmark = [
    *gpu,
    may_hang,
    pytest.mark.skipif(
        SUFFIX == "_triton" and importlib.util.find_spec("triton") is None,
        reason="Triton is not installed",
    ),
    not_interpreted,
]

BACKEND: Any = STAND_IN or "triton"
# Sizes as they are used. Of so many float32 comparisons some may be ties but for rounding, so
# float32 gets those sizes without a choice to make.
LONG = Attention(2, 4, 700, 64, 64, 64, 64, lengths=True)
WIDE = Layer(60, 33, 10, 128, 25, 10, 15, lengths=True, mask="TB")
NO_CHOICE = (Attention(2, 4, 300, 64, 64, 300, 0), Layer(40, 33, 10, 128, 25, 40, 0, mask="T"))
FLOATS = (torch.float64, torch.float32)


def cases_of(small: tuple[Any, ...], large: Any, no_choice: Any) -> pytest.MarkDecorator:
    pairs = [(case, dtype) for dtype in FLOATS for case in (*small, no_choice)]
    return pytest.mark.parametrize(("case", "dtype"), [*pairs, (large, torch.float64)], ids=str)


def on_cpu(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in found.items()}


def check(case: Attention | Layer, dtype: torch.dtype) -> None:
    """The same keys are chosen, exactly."""
    given = case.inputs(dtype)
    found = run(case, on_device(given), SUFFIX)
    plain = expect(case, given) if dtype == torch.float32 else None
    assert_same(on_cpu(found), expect(case, doubled(given)), plain)


@cases_of(ATTENTION, LONG, NO_CHOICE[0])
def test_attention(case: Attention, dtype: torch.dtype) -> None:
    check(case, dtype)


@cases_of(LAYERS, WIDE, NO_CHOICE[1])
def test_layer(case: Layer, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", [ATTENTION[2], LONG], ids=str)
def test_repeats_are_bit_equal(case: Attention) -> None:
    given = on_device(case.inputs(torch.float32))
    first = on_cpu(run(case, given, SUFFIX))
    for _ in range(20):
        again = on_cpu(run(case, given, SUFFIX))
        assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    """Arithmetic is float32's for 16-bit numbers, so the result is that of the same numbers."""
    q, k, v = (random(2, 2, 100, 32, seed=s, dtype=dtype).to(DEVICE) for s in range(3))
    found = functional.relevancy_attention(q, k, v, 16, 8, backend=BACKEND)
    wide = q.float(), k.float(), v.float()
    wanted = functional.relevancy_attention(*wide, 16, 8, backend=BACKEND)
    error = (found.float() - wanted).abs().max()
    assert found.dtype == dtype and error <= torch.finfo(dtype).eps * wanted.abs().max()


def test_calls_one_after_the_other_are_one_call() -> None:
    torch.manual_seed(0)
    layer = throughtime.RelLSTM(5, 40, window_size=6, top_k=4, backend=BACKEND).to(DEVICE)
    x = random(30, 9, 5, seed=1, dtype=torch.float32).to(DEVICE)
    with torch.no_grad():
        whole, _ = layer(x)
        parts, state = [], None
        for part in x.split(7):  # type: ignore[no-untyped-call]
            output, state = layer(part, state)
            parts.append(output)
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)
    assert whole.device == x.device and whole.abs().max() > 0.01
