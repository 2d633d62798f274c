"""Infinities, NaN and huge numbers in one place: they go no further than in plain PyTorch."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compiled_kernels  # noqa: F401
from cases import OPTIONS, Shape, random, with_gradients
from closeness import assert_close
from samples import Attention, Layer, Recurrence, Sample, doubled, expect, numbers, run
from throughtime import LSTM

VALUES = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
HUGE = (1e30, 1e35, 1e37, 3e38)


def assert_no_further(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Finite wherever ``wanted`` is, and equal there."""
    assert list(found) == list(wanted)
    for name, due in wanted.items():
        finite = due.isfinite()
        assert found[name].isfinite()[finite].all(), (
            f"{name}: {int((~found[name].isfinite()).sum())} entries are not finite, "
            f"in plain PyTorch {int((~finite).sum())}"
        )
        assert_close(found[name][finite], due[finite].to(found[name].dtype), name)


def assert_as_far(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """What the reference makes of it is the definition, and so neither goes further."""
    results = [numbers(x, wanted) for x in (found, wanted)]
    for actual, expected in (results, results[::-1]):
        assert_no_further(actual, expected)


def results(layer: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    x, *states = leaves.values()
    return with_gradients(layer(x, tuple(states)), leaves | dict(layer.named_parameters()))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", ["input", "h_0", "c_0"])
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("hidden", [5, 16, 37])
def test_lstm(isa: str, hidden: int, proj_size: int, place: str, value: str) -> None:
    options = {"num_layers": 2, "bidirectional": True, "proj_size": proj_size}
    theirs = nn.LSTM(4, hidden, dtype=torch.float64, **options)
    given = {
        "input": random(7, 3, 4, seed=1),
        "h_0": random(4, 3, proj_size or hidden, seed=2),
        "c_0": random(4, 3, hidden, seed=3),
    }
    given[place][-2, 1, 1] = VALUES[value]
    ours = LSTM.from_torch(theirs, backend="cpu")
    assert_no_further(results(ours, given), results(theirs, given))


REL = (
    Layer(8, 3, 3, 5, 6, 3, 2),
    Layer(8, 3, 3, 16, 16, 3, 2, lengths=True, mask="T"),
    Layer(6, 3, 2, 21, 3, 3, 2, lengths=True, before=7),
)
ADDITIVE = Attention(2, 2, 12, 16, 16, 3, 2, additive=True)
CASES: tuple[Sample, ...] = (
    *(Recurrence(Shape(6, 4, 3, 5), option) for option in OPTIONS),
    *(Recurrence(Shape(6, 4, 3, 5), option, anew=True) for option in ("all", "reset-reverse")),
    *(*REL, ADDITIVE, Attention(2, 2, 12, 5, 6, 3, 2)),
    Attention(2, 1, 9, 3, 7, 3, 2, lengths=True, before=6),
)
PLACES = ("input", "h_0", "c_0", "context_0", "memory", "query", "key", "value")


def spoiled(case: Sample, place: str, value: float, step: int = -1) -> dict[str, Any]:
    """The arguments with the value in one place of a sample."""
    given = case.inputs()
    with torch.no_grad():
        if isinstance(case, Attention):
            given[place][0, 0, step, 1] = value
            return given
        for sample in (0, 2) if isinstance(case, Recurrence) else (1,):
            given[place][(step, sample, 1)[-given[place].dim() :]] = value
    return given


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_far_as_the_definition(isa: str, case: Sample, value: str) -> None:
    """Also in a sample that has ended, at a detached step, or before an episode's border."""
    for place in [name for name in PLACES if name in case.inputs()]:
        for step in (0, 4) if isinstance(case, Attention) else (-1,):
            given = spoiled(case, place, VALUES[value], step)
            assert_as_far(run(case, given), expect(case, given))


LARGE = [Recurrence(Shape(7, 3, 4, hidden)) for hidden in (5, 48)]


@pytest.mark.parametrize("value", HUGE, ids=str)
@pytest.mark.parametrize(
    ("case", "place"),
    [
        *((case, place) for case in LARGE for place in ("input", "c_0")),
        *((x, "input") for x in REL),
    ],
    ids=str,
)
def test_one_huge_number(isa: str, case: Sample, place: str, value: float) -> None:
    """Within the usual tolerance of float64: a saturated gate has no gradient at all."""
    given = case.inputs(torch.float32)
    with torch.no_grad():
        given[place][(2, 1, 1)[-given[place].dim() :]] = value
    exact, found = expect(case, doubled(given)), run(case, given)
    assert "last" not in found or torch.equal(found["last"], exact["last"])
    for name, wanted in numbers(exact, exact).items():
        tolerance = 2e-6 if isinstance(case, Recurrence) else 4e-6
        allowed = tolerance * max(1e-3, wanted.abs().max().item())
        assert (found[name].double() - wanted).abs().max() <= allowed, name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by numpy
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("case", "place"), [(REL[2], "input"), (REL[2], "memory"), (ADDITIVE, "value")]
)
def test_triton_goes_no_further_either(case: Sample, place: str) -> None:
    """In the interpreter, which is slow: one place of each kind."""
    given = spoiled(case, place, math.inf)
    assert_as_far(run(case, given, "_triton"), expect(case, given))
