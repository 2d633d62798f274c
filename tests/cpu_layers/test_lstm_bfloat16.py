"""The LSTM with bfloat16 operands, by every instruction that multiplies them.

AMX is a stand-in here: functions with the bits of its instructions, in the very kernels. Where the
processor has the unit, the two are compared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from closeness import rms
from throughtime.ops.lstm import reference
from throughtime.ops.lstm.arguments import LstmArguments

WEIGHTS = ("weight_ih", "weight_hh", "weight_hr", "bias")


class Case(NamedTuple):
    """Arguments by name, in bfloat16's numbers, and gradients of y, h_n, c_n."""

    tensors: dict[str, Tensor | None]
    grads: list[Tensor]
    lengths: Tensor | None
    reset: Tensor | None
    detach: Tensor | None
    reverse: bool


def case(steps: int, batch: int, inputs: int, units: int, outputs: int = 0, form: str = "") -> Case:
    """A form may be "ragged" or "reverse": with lengths, resets and a mask."""
    R = outputs or units
    scale = {"weight_ih": 0.3, "weight_hh": 0.8 * R**-0.5, "weight_hr": units**-0.5}
    shapes: dict[str, tuple[int, ...]] = {
        "input": (steps, batch, inputs), "h_0": (batch, R), "c_0": (batch, units),
        "weight_ih": (4 * units, inputs), "weight_hh": (4 * units, R), "weight_hr": (R, units),
        "bias": (4 * units,),
    }  # fmt: skip
    tensors: dict[str, Tensor | None] = {
        name: (scale.get(name, 1) * (2 * torch.rand(*shape) - 1)).bfloat16()
        for name, shape in shapes.items()
    }
    if not outputs:
        tensors["weight_hr"] = None
    grads = [torch.randn(*s).bfloat16() for s in ((steps, batch, R), (batch, R), (batch, units))]
    lengths = torch.randint(0, steps + 1, (batch,)).sort(descending=True).values
    lengths[0] = steps
    reset, detach = torch.rand(steps, batch) < 0.1, torch.rand(steps, batch) < 0.3
    kept = (lengths, reset, detach) if form else (None, None, None)
    return Case(tensors, grads, *kept, reverse=form == "reverse")


def run(layer: Any, case: Case, threads: int = 1, recompute: bool = False) -> dict[str, Tensor]:
    """Results and gradients by name."""
    given = {
        name: x if x is None or name in ("input", "h_0") else x.float()
        for name, x in case.tensors.items()
    }
    x, y = case.tensors["input"], torch.full_like(case.grads[0], torch.nan)
    assert x is not None
    units, outputs = case.grads[2].size(1), y.size(2)
    sizes = torch.tensor([*x.shape, units, outputs, case.reverse, threads, recompute])
    call = (sizes, case.lengths, torch.arange(x.size(1)), case.reset, *given.values())
    saved = torch.full((layer("saved_size", x, sizes),), torch.nan)
    h_n, c_n = (torch.full_like(g, torch.nan, dtype=torch.float32) for g in case.grads[1:])
    layer("forward", *call, y, h_n, c_n, saved)
    found = {
        name: None if v is None else torch.full_like(v, torch.nan, dtype=torch.float32)
        for name, v in case.tensors.items()
    }
    found["input"] = torch.zeros_like(x)  # what is past the end is not written
    grads = (case.grads[0], *(g.float() for g in case.grads[1:]))
    layer("backward", *call, y, saved, case.detach, *grads, *found.values())
    results = {"y": y, "h_n": h_n, "c_n": c_n, **found}
    return {name: x for name, x in results.items() if x is not None}


def expected(case: Case) -> dict[str, Tensor]:
    """The same by the reference in float64."""
    leaves = {
        name: None if x is None else x.double().requires_grad_() for name, x in case.tensors.items()
    }
    given = {name: x for name, x in leaves.items() if name != "bias"}
    results = reference.run(
        LstmArguments(**given, bias_ih=leaves["bias"], bias_hh=None, lengths=case.lengths,
                      reset=case.reset, reset_h=None, reset_c=None, detach_mask=case.detach,
                      reverse=case.reverse, recompute=False)
    )  # fmt: skip
    torch.autograd.backward(list(results), [g.double() for g in case.grads])
    named = dict(zip(("y", "h_n", "c_n"), (x.detach() for x in results), strict=True))
    return named | {name: x.grad for name, x in leaves.items() if x is not None}


SIZES = [(1, 1, 1, 1), (7, 5, 1, 16), (20, 33, 33, 40), (9, 70, 70, 33), (120, 1, 5, 30)]
PROJECTED = [(9, 70, 70, 33, 7), (20, 40, 65, 17, 5)]


@pytest.mark.parametrize("form", ["", "ragged", "reverse"])
@pytest.mark.parametrize("sizes", [*SIZES, *PROJECTED], ids=str)
def test_against_the_reference(layer: Any, sizes: tuple[int, ...], form: str) -> None:
    """bfloat16 rounds operands by at most 2^-9 of their size; nothing else rounds as much."""
    given = case(*sizes, form=form)
    wanted = expected(given)
    for recompute in (False, True):
        found = run(layer, given, recompute=recompute)
        assert found.keys() == wanted.keys()
        for name, x in found.items():
            assert rms(x, wanted[name]) <= 1e-2, name


@pytest.mark.parametrize("sizes", [(20, 70, 33, 70), (30, 2, 5, 140)], ids=str)
def test_bits_do_not_depend_on_threads(layer: Any, sizes: tuple[int, ...]) -> None:
    given = case(*sizes, form="ragged")
    one = run(layer, given)
    for threads in (2, 3, 8):
        assert all(torch.equal(x, one[name]) for name, x in run(layer, given, threads).items())


def test_bits_of_a_sample_do_not_depend_on_the_batch(layer: Any) -> None:
    whole = case(9, 37, 33, 20, form="ragged")
    rows = slice(3, 20)
    given = {name: x if name in WEIGHTS or x is None else x[..., rows, :].contiguous()
             for name, x in whole.tensors.items()}  # fmt: skip
    assert whole.lengths is not None and whole.reset is not None and whole.detach is not None
    grads = [g[..., rows, :].contiguous() for g in whole.grads]
    masks = [x[:, rows].contiguous() for x in (whole.reset, whole.detach)]
    part = Case(given, grads, whole.lengths[rows], *masks, reverse=False)
    all_rows, found = run(layer, whole), run(layer, part)
    for name in found.keys() - set(WEIGHTS):
        assert torch.equal(found[name], all_rows[name][..., rows, :]), name


def test_a_long_memory_keeps_its_gradient(layer: Any) -> None:
    """T 2000 with a forget gate of 0.9975: c, dc and the saved gate must not be bfloat16's."""
    given = case(2000, 2, 4, 16)
    bias = given.tensors["bias"]
    assert bias is not None
    bias[16:32] = 6
    for grad in given.grads[:2]:
        grad.zero_()
    wanted, found = expected(given), run(layer, given)
    for name in ("c_0", "weight_ih", "weight_hh", "bias"):
        assert rms(found[name], wanted[name]) <= 1e-2, name


def test_infinity_and_nan_stay_in_their_sample(layer: Any) -> None:
    given = case(6, 20, 3, 17)
    x = given.tensors["input"]
    assert x is not None
    clean = run(layer, given)
    x[2, 4, 1], x[2, 5, 1] = torch.inf, torch.nan
    found = run(layer, given)
    others = [row for row in range(20) if row not in (4, 5)]
    for name in ("y", "h_n", "c_n", "input", "h_0", "c_0"):
        assert torch.equal(found[name][..., others, :], clean[name][..., others, :]), name
    assert found["y"][2:, 5].isnan().all() and found["y"][2:, 4].isfinite().all()


def test_the_stand_in_has_the_bits_of_amx(layer: Any, stand_in: Any) -> None:
    if layer.isa != "amx":
        pytest.skip("this processor has no AMX, or this is another instruction set's turn")
    for sizes in (*SIZES, *PROJECTED):
        given = case(*sizes, form="ragged")
        one, other = run(layer, given), run(stand_in, given)
        assert all(torch.equal(x, other[name]) for name, x in one.items())
