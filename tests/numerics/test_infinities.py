"""Infinities, NaN and huge numbers in one place: they go no further than in plain PyTorch."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import OPTIONS, Shape, call, options_for, random, tensors, with_gradients
from closeness import assert_close
from samples import Attention, Layer, doubled, expect, numbers, run
from throughtime import LSTM, _ext
from throughtime.functional import lstm

if _ext.extension is None:
    pytest.skip("the compiled kernels are not in this installation", allow_module_level=True)

T, B, INPUT_SIZE = 7, 3, 4
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


def results(layer: nn.Module, x: Tensor, states: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    leaves = {"input": x, "h_0": states[0], "c_0": states[1]}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    result = layer(leaves["input"], (leaves["h_0"], leaves["c_0"]))
    return with_gradients(result, leaves | dict(layer.named_parameters()))


def pair(hidden: int, dtype: torch.dtype, **options: Any) -> tuple[nn.LSTM, LSTM]:
    theirs = nn.LSTM(INPUT_SIZE, hidden, dtype=dtype, **options)
    ours = LSTM(INPUT_SIZE, hidden, dtype=dtype, backend="cpu", **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", ["input", "h_0", "c_0"])
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("hidden", [5, 16, 37])
def test_lstm(isa: str, hidden: int, proj_size: int, place: str, value: str) -> None:
    options = {"num_layers": 2, "bidirectional": True, "proj_size": proj_size}
    theirs, ours = pair(hidden, torch.float64, **options)
    given = {
        "input": random(T, B, INPUT_SIZE, seed=1),
        "h_0": random(4, B, proj_size or hidden, seed=2),
        "c_0": random(4, B, hidden, seed=3),
    }
    given[place][-2, 1, 1] = VALUES[value]
    arguments = given["input"], (given["h_0"], given["c_0"])
    assert_no_further(results(ours, *arguments), results(theirs, *arguments))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", ["input", "h_0", "c_0"])
@pytest.mark.parametrize("option", OPTIONS)
def test_lstm_as_the_reference(isa: str, option: str, place: str, value: str) -> None:
    """Also in a sample that has ended, at a cut, or before an episode's border."""
    shape = Shape(6, 4, 3, 5)
    named = tensors(shape)
    with torch.no_grad():
        for sample in (0, 2):
            named[place][(-1, sample, 1)[-named[place].dim() :]] = VALUES[value]
    found = []
    for backend in ("cpu", "reference"):
        result = call(lstm, named, backend=backend, **options_for(shape)[option])
        found.append(with_gradients(result, named))
    for actual, expected in (found, found[::-1]):
        assert_no_further(actual, expected)


@pytest.mark.parametrize("value", HUGE, ids=str)
@pytest.mark.parametrize("hidden", [5, 48])
@pytest.mark.parametrize("place", ["input", "c_0"])
def test_lstm_with_one_huge_number(isa: str, place: str, hidden: int, value: float) -> None:
    """Within the usual tolerance of float64: a saturated gate has no gradient at all."""
    theirs, ours = pair(hidden, torch.float32)
    given = {
        "input": random(T, B, INPUT_SIZE, seed=1, dtype=torch.float32),
        "h_0": random(1, B, hidden, seed=2, dtype=torch.float32),
        "c_0": random(1, B, hidden, seed=3, dtype=torch.float32),
    }
    given[place][0, 1, 1] = value
    found = results(ours, given["input"], (given["h_0"], given["c_0"]))
    given = {name: x.double() for name, x in given.items()}
    exact = results(theirs.double(), given["input"], (given["h_0"], given["c_0"]))
    for name, wanted in exact.items():
        tolerance = 2e-6 * max(1e-3, wanted.abs().max().item())
        assert (found[name].double() - wanted).abs().max() <= tolerance, name


SCREENED = (
    Layer(8, 3, 3, 5, 6, 3, 2),
    Layer(8, 3, 3, 16, 16, 3, 2, lengths=True, mask="T"),
    Layer(6, 3, 2, 21, 3, 3, 2, lengths=True, before=7),
    Attention(2, 2, 12, 5, 6, 3, 2),
    Attention(2, 2, 12, 16, 16, 3, 2, additive=True),
    Attention(2, 1, 9, 3, 7, 3, 2, lengths=True, before=6),
)
PLACES = ("input", "h_0", "c_0", "context_0", "memory", "query", "key", "value")


def spoiled(case: Attention | Layer, place: str, value: float, step: int = -1) -> dict[str, Any]:
    """The arguments with the value in one place."""
    given = case.inputs()
    with torch.no_grad():
        if isinstance(case, Attention):
            given[place][0, 0, step, 1] = value
        else:
            given[place][(step, 1, 1)[-given[place].dim() :]] = value
    return given


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("case", SCREENED, ids=str)
def test_screening(isa: str, case: Attention | Layer, value: str) -> None:
    for place in [name for name in PLACES if name in case.inputs()]:
        for step in (0, 4) if isinstance(case, Attention) else (-1,):
            given = spoiled(case, place, VALUES[value], step)
            assert_as_far(run(case, given), expect(case, given))


@pytest.mark.parametrize("value", HUGE, ids=str)
@pytest.mark.parametrize("case", SCREENED[:3], ids=str)
def test_rel_lstm_with_one_huge_number(isa: str, case: Layer, value: float) -> None:
    given = case.inputs(torch.float32)
    with torch.no_grad():
        given["input"][2, 1, 1] = value
    exact, found = expect(case, doubled(given)), run(case, given)
    assert torch.equal(found["last"], exact["last"])
    for name, wanted in numbers(exact, exact).items():
        tolerance = 4e-6 * max(1e-3, wanted.abs().max().item())
        assert (found[name].double() - wanted).abs().max() <= tolerance, name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by numpy
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("case", "place"), [(2, "input"), (2, "memory"), (4, "value")])
def test_triton_goes_no_further_either(case: int, place: str) -> None:
    """In the interpreter, which is slow: one place of each kind."""
    given = spoiled(SCREENED[case], place, math.inf)
    assert_as_far(run(SCREENED[case], given, "_triton"), expect(SCREENED[case], given))
