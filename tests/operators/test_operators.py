"""The operators themselves: schema, fake, registration, errors, and what the gradient refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import compiled_kernels  # noqa: F401
from cases import PROJECTED, SHAPES, Shape
from samples import (
    ATTENTION,
    BEYOND_PAPER,
    LAYERS,
    Attention,
    Recurrence,
    Sample,
    arguments,
    detached,
    operate,
    run,
)
from throughtime.ops.precision import multiplies_bfloat16, sums

ops: Any = torch.ops.throughtime
CASES: tuple[Sample, ...] = (
    *(Recurrence(SHAPES[0]), Recurrence(SHAPES[5], "all"), Recurrence(PROJECTED[0], "reverse")),
    Recurrence(PROJECTED[0], "all-reverse", anew=True),
    *(ATTENTION[1], ATTENTION[4], BEYOND_PAPER[2], LAYERS[1], LAYERS[3]),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Sample, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and (not multiplies_bfloat16() or getattr(case, "additive", False)):
        pytest.skip("the processor or this score has no products of bfloat16")
    forward, backward = f"{case.op}_forward", f"{case.op}_backward"
    given = detached(case.inputs(dtype))
    given |= {
        n: given[n].to(sums(dtype)) for n in ("relevance", "given") if given.get(n) is not None
    }
    check = torch.library.opcheck
    check(getattr(ops, forward).default, arguments(forward, given | {"save": False}))
    # What is saved for steps past the end of a sample is never read and so never written: two
    # calls differ there, which the checks that compare values would take for an error.
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    check(getattr(ops, forward).default, arguments(forward, given), test_utils=checks)
    given |= operate(forward, given)
    check(getattr(ops, backward).default, arguments(backward, given))
    given |= {"need_input": False, "need_weights": False}
    check(getattr(ops, backward).default, arguments(backward, given))


@pytest.mark.parametrize("case", [Recurrence(PROJECTED[0]), LAYERS[1], LAYERS[3]], ids=str)
def test_what_is_not_wanted_is_not_made_and_changes_nothing(case: Sample) -> None:
    given = detached(case.inputs())
    forward, full = operate(f"{case.op}_forward", given), run(case, given)
    without = operate(f"{case.op}_forward", given | {"save": False})
    assert without.pop("saved").numel() == 0
    assert all(torch.equal(x, forward[name]) for name, x in without.items())
    always = {"grad_h_0", "grad_c_0", "grad_context_0", "grad_memory"}
    for need_input in (False, True):
        for need_weights in (False, True):
            wanted = given | forward | {"need_input": need_input, "need_weights": need_weights}
            for name, grad in operate(f"{case.op}_backward", wanted).items():
                made = need_input if name == "grad_input" else name in always or need_weights
                if made and full[name].numel():
                    assert torch.equal(grad, full[name]), name
                else:
                    assert grad.numel() == 0, name


@pytest.mark.parametrize("case", [Recurrence(SHAPES[4]), LAYERS[0], ATTENTION[0]], ids=str)
def test_what_has_a_gradient_and_that_the_backwards_own_names_the_way_out(case: Sample) -> None:
    given = case.inputs()
    found = operate(f"{case.op}_forward", given)
    differentiable = {name for name, x in found.items() if x.requires_grad}
    assert differentiable == {name for name in found if f"grad_{name}" in given}
    kept = {name: x.detach() for name, x in found.items()}
    first = operate(f"{case.op}_backward", given | kept)
    with pytest.raises(RuntimeError, match=r'second derivative.*backend="reference"'):
        sum(x.square().sum() for x in first.values() if x.requires_grad).backward()


LSTM = Recurrence(Shape(5, 4, 9, 8))
STREAM = Attention(1, 1, 3, 2, 2, 2, 2)
LONGER = dict.fromkeys(("key", "value"), torch.zeros(1, 1, 8, 2))
LONGER |= {"retained": 2, "window_size": 9}


# Tensors of a wrong size, dtype or device: errors/test_crashes.py.
@pytest.mark.parametrize(
    ("case", "changed", "message"),
    [
        (LSTM, {"input": torch.zeros(5, 4)}, r"input should be \[T, B, I\], got 2 dimensions"),
        (LSTM, {"input": torch.zeros(5, 4, 9).half()}, r"float32 or float64, got Half"),
        (LSTM, {"input": torch.zeros(0, 4, 9)}, r"sequence length to be larger than 0 in RNN"),
        (LSTM, {"weight_hh": torch.zeros(32)}, r"weight_hh should be \[4H, H or P\]"),
        (LSTM, {"lengths": torch.tensor([1, 2, 3, 6])}, r"in \[0, 5\].*got 6 for sample 3"),
        (LSTM, {"lengths": torch.tensor([1, 2, -3, 5])}, r"in \[0, 5\].*got -3 for sample 2"),
        (STREAM, {"query": torch.zeros(2, 5, 8)}, r"query should be \[B, heads, T, D\], got 3 dim"),
        (STREAM, {"window_size": 0}, "window_size should be at least 1"),
        (STREAM, {"lengths": torch.tensor([4])}, r"in \[0, 3\].*got 4 for sample 0"),
        (STREAM, LONGER | {"top_k": 4}, "relevance should be given for the 5 keys"),
        (
            STREAM,
            LONGER | {"relevance": torch.zeros(1, 1, 5), "top_k": 1},
            r"at most top_k = 1 retained positions.*got 2 and 3",
        ),
    ],
)
def test_refuses(case: Sample, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        operate(f"{case.op}_forward", detached(case.inputs(torch.float32)) | changed)
