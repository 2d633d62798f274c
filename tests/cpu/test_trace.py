"""The gradients of h_t and c_t that the backward kernels hold, for each instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Shape, plain_steps, random
from closeness import assert_all_close, rms
from samples import (
    LAYERS,
    Given,
    Layer,
    Recurrence,
    arguments,
    definition,
    detached,
    doubled,
    operate,
)  # fmt: skip
from throughtime import _ext
from throughtime.ops.precision import multiplies_bfloat16

if _ext.extension is None:
    pytest.skip("the compiled kernels are not in this installation", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poison")

# A team; two groups; the ring of gate gradients wraps; projected by a team; one step, unpacked.
SHAPES = (
    Shape(9, 3, 2, 40),
    Shape(5, 21, 40, 19),
    Shape(70, 2, 5, 33),
    Shape(5, 3, 30, 70, 50),
    Shape(1, 9, 13, 40, 7),
)
OPTIONS = ("plain", "mask-T", "mask-TB-reverse", "lengths", "all", "all-reverse")
CASES = [Recurrence(shape, option) for shape in SHAPES[:-1] for option in OPTIONS]
CASES += [Recurrence(SHAPES[-1], option) for option in ("plain", "mask-TB-reverse")]
CASES += [Recurrence(SHAPES[0], option, anew=True) for option in ("reset", "all-reverse")]
TRACE = ("trace_h", "trace_c")


def given_of(case: Recurrence, dtype: torch.dtype, cells: bool = True) -> Given:
    shape, given = case.shape, case.inputs(dtype)
    if cells:
        given["grad_cells"] = random(shape.T, shape.B, shape.H, seed=40, dtype=dtype)
    return given | {"recompute": False, "trace_every": 1}


def traced(given: Given) -> dict[str, Tensor]:
    """Every c_t, and all that the trace gives, in one call of each operator."""
    with torch.no_grad():
        found = operate("lstm_cells_forward", given)
        return {"cells": found["cells"]} | operate("lstm_backward_trace", given | found)


def expected(given: Given) -> dict[str, Tensor]:
    gradients = {name.removeprefix("grad_"): x for name, x in given.items() if "grad_" in name}
    names = ("detach_mask", "lengths", "reset", "reverse")
    return plain_steps(given, gradients, **{name: given.get(name) for name in names})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_step_has_the_gradient_of_the_loop(isa: str, case: Recurrence) -> None:
    exact = expected(doubled(given_of(case, torch.float32)))
    for dtype in (torch.float64, torch.float32):
        given = given_of(case, dtype)
        found = traced(given)
        wanted = expected(given) if dtype == torch.float64 else exact
        assert_all_close({name: found[name] for name in wanted}, {
            name: x.to(dtype) for name, x in wanted.items()
        })  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_have_the_bits_of_a_backward_without_trace(
    isa: str, case: Recurrence, threads: None
) -> None:
    dtypes = [torch.float32, *[torch.bfloat16] * multiplies_bfloat16()]
    for dtype in dtypes:
        given = given_of(case, dtype, cells=False)
        torch.set_num_threads(1)
        with torch.no_grad():
            kept = operate("lstm_forward", given)
            plain = operate("lstm_backward", given | kept)
            again = operate("lstm_forward", given | {"recompute": True})
        found = traced(given)
        assert all(torch.equal(found[name], x) for name, x in plain.items())
        torch.set_num_threads(3)
        other = traced(given)
        assert all(torch.equal(other[name], x) for name, x in found.items())
        if dtype == torch.float32:  # bfloat16 kernels round the gates that they save
            with torch.no_grad():
                other = operate("lstm_backward_trace", given | again | {"recompute": True})
            assert all(torch.equal(x, found[name]) for name, x in other.items())


@pytest.mark.parametrize("every", [2, 3, 100, 2**63 - 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_nth_step_up_to_the_last_in_the_direction_of_travel(
    isa: str, case: Recurrence, every: int
) -> None:
    given = given_of(case, torch.float32)
    whole, found = traced(given), traced(given | {"trace_every": every})
    steps = len(whole["trace_h"])
    first = 0 if given["reverse"] else (steps - 1) % every
    for name, x in whole.items():
        wanted = x[first :: min(every, steps)].contiguous() if name in TRACE else x
        assert torch.equal(found[name], wanted), name


def test_a_trace_of_no_step() -> None:
    given = given_of(CASES[0], torch.float32) | {"trace_every": 0}
    with torch.no_grad():
        given |= operate("lstm_cells_forward", given)
        with pytest.raises(
            RuntimeError, match=r"lstm_backward_trace: trace_every should be at least 1, got 0"
        ):
            operate("lstm_backward_trace", given)


def steps_of_layer(given: Given) -> dict[str, Tensor]:
    """The whole gradients of every h_t and c_t of a RelLSTM, by the definition."""
    steps: list[tuple[Tensor, Tensor]] = []
    results = definition("rel_lstm", given | {"observe": lambda t, h, c: steps.append((h, c))})
    names = ("output", "h_n", "c_n", "context_n")
    found = torch.autograd.grad(
        [results[name] for name in names],
        [x for step in steps for x in step],
        [given[f"grad_{name}"] for name in names],
    )
    return {"trace_h": torch.stack(found[::2]), "trace_c": torch.stack(found[1::2])}


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_the_steps_of_a_rel_lstm(isa: str, case: Layer) -> None:
    exact = steps_of_layer(case.inputs())
    for dtype in (torch.float64, torch.float32):
        given = case.inputs(dtype) | {"trace_every": 1}
        with torch.no_grad():
            given |= operate("rel_lstm_forward", given)
            plain = operate("rel_lstm_backward", given)
            found = operate("rel_lstm_backward_trace", given)
            other = operate("rel_lstm_backward_trace", given | {"trace_every": 2})
        assert all(torch.equal(found[name], x) for name, x in plain.items())
        assert_all_close({name: found[name] for name in exact}, {
            name: x.to(dtype) for name, x in exact.items()
        })  # fmt: skip
        for name in TRACE:
            assert torch.equal(other[name], found[name][(case.T - 1) % 2 :: 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("outputs", [0, 64])
def test_a_large_trace_has_the_bits_of_a_small_one(
    isa: str, dtype: torch.dtype, outputs: int, threads: None
) -> None:
    """Those beyond 2 MB go past the caches; a sample's bits do not depend on its batch."""
    shape, one = Shape(60, 72, 3, 128, outputs), slice(40, 41)
    torch.set_num_threads(2)
    given = given_of(Recurrence(shape, "mask-TB"), dtype)
    batch = ("input", "detach_mask", "h_0", "c_0", "grad_")
    alone = {
        name: x[..., one, :] if name.startswith(batch) and name != "detach_mask" else x
        for name, x in given.items()
    }
    alone["detach_mask"] = given["detach_mask"][:, one]
    whole, part = traced(given), traced(alone)
    for name in TRACE:
        assert torch.equal(whole[name][:, one], part[name])


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor multiplies no bfloat16")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_operands(case: Recurrence) -> None:
    """They have 8 bits; the trace itself is float32."""
    given = given_of(case, torch.bfloat16)
    found, wanted = traced(given), expected(doubled(given))
    assert found["cells"].dtype == torch.bfloat16
    assert all(found[name].dtype == torch.float32 for name in TRACE)
    for name, x in wanted.items():
        assert rms(found[name], x) <= 2e-2, name


def test_the_trace_has_no_gradient_of_its_own() -> None:
    given = given_of(CASES[0], torch.float64)
    with pytest.raises(RuntimeError, match="lstm_backward_trace has no gradient of its own"):
        operate("lstm_backward_trace", given | operate("lstm_cells_forward", given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    """As test_operators.py has it for the operators that every operation has."""
    if dtype == torch.bfloat16 and not multiplies_bfloat16():
        pytest.skip("this processor multiplies no bfloat16")
    given = detached(given_of(Recurrence(SHAPES[3], "all"), dtype))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    ops: Any = torch.ops.throughtime
    name = "lstm_cells_forward"
    torch.library.opcheck(ops.lstm_cells_forward.default, arguments(name, given), test_utils=checks)
    given |= operate(name, given)
    for name in ("lstm_cells_backward", "lstm_backward_trace"):
        for wanted in (True, False):
            given |= {"need_input": wanted, "need_weights": wanted}
            torch.library.opcheck(
                getattr(ops, name).default, arguments(name, given), test_utils=checks
            )
    given = detached(LAYERS[2].inputs(dtype)) | {"trace_every": 2}
    given |= operate("rel_lstm_forward", given)
    name = "rel_lstm_backward_trace"
    torch.library.opcheck(getattr(ops, name).default, arguments(name, given), test_utils=checks)
