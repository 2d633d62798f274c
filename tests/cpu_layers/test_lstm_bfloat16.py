"""The LSTM with bfloat16 operands, by every instruction that multiplies them.

AMX is a stand-in here: functions with the bits of its instructions, in the very kernels. Where the
processor has the unit, the two are compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from closeness import rms
from lstm_cases import WEIGHTS, Case, case, expected, run

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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [slice(3, 20), slice(3, 18), slice(7, 8)], ids=str)
def test_bits_of_a_sample_do_not_depend_on_the_batch(
    layer: Any, rows: slice, recompute: bool
) -> None:
    """The fewest rows are less than a tile of AMX, where x is multiplied before the steps."""
    whole = case(9, 37, 33, 20, form="ragged")
    given = {name: x if name in WEIGHTS or x is None else x[..., rows, :].contiguous()
             for name, x in whole.tensors.items()}  # fmt: skip
    assert whole.lengths is not None and whole.reset is not None and whole.detach is not None
    grads = [g[..., rows, :].contiguous() for g in whole.grads]
    masks = [x[:, rows].contiguous() for x in (whole.reset, whole.detach)]
    part = Case(given, grads, whole.lengths[rows], *masks, reverse=False)
    all_rows, found = (run(layer, x, recompute=recompute) for x in (whole, part))
    for name in found.keys() - set(WEIGHTS):
        assert torch.equal(found[name], all_rows[name][..., rows, :]), name


def test_memory_for_a_row_of_the_batch(layer: Any) -> None:
    """What waits for its step takes as many rows as there are, not whole tiles of each step."""
    steps, inputs, units = 300, 300, 128
    run(layer, case(steps, 1, inputs, units))
    weights = 2 * 4 * units * (inputs + units)  # bytes
    waiting = steps * (2 * inputs + 4 * 4 * units)  # x and its gate sums
    assert layer("scratch_bytes", 0) <= 1.2 * (weights + waiting)


@pytest.mark.parametrize("forget_bias", [6, 17, 20, 200])
def test_a_long_memory_keeps_its_gradient(layer: Any, forget_bias: float) -> None:
    """T 2000: c, dc and the saved gate must not be bfloat16's; a gate may be exactly 1."""
    given = case(2000, 2, 4, 16)
    bias = given.tensors["bias"]
    assert bias is not None
    bias[16:32] = forget_bias
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
