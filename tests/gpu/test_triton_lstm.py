"""The LSTM's recurrence in Triton, in the interpreter, against a loop over single samples."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import random
from cases_recurrence import (
    Case,
    Given,
    assert_matches,
    assert_remembers,
    expect,
    inputs,
    long_memory,
)
from closeness import assert_close

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from throughtime.triton_kernels import lstm
from triton.runtime import interpreter

from throughtime.ops.lstm.recurrence import BackwardArguments, ForwardArguments

# Relative to the largest entry. The interpreter truncates to bfloat16 where a GPU rounds.
LOW_PRECISION = {torch.float16: 4e-3, torch.bfloat16: 6e-2}


# The interpreter takes milliseconds per operation: few and small.
CASES = (
    Case(1, 1, 1),
    Case(4, 3, 5, reset=True),
    Case(4, 3, 5, lengths=True, mask="T"),
    Case(4, 3, 5, reverse=True, reset=True, mask="T"),
    Case(5, 3, 5, lengths=True, reset=True, reverse=True, mask="TB"),
    Case(3, 17, 20, lengths=True, reset=True, mask="TB"),
    Case(3, 17, 20, torch.float32, lengths=True, reset=True, reverse=True, mask="TB"),
    Case(4, 1, 20, torch.float16, mask="T"),
    Case(4, 3, 5, torch.float16, lengths=True, reverse=True, mask="TB"),
    Case(4, 3, 20, torch.bfloat16, lengths=True, reset=True, mask="TB"),
    Case(4, 3, 5, grads="h"),
    Case(4, 3, 5, lengths=True, grads="c"),
    Case(4, 3, 5, reverse=True, grads="output"),
)
LARGEST = (  # of a walk
    Case(2, 3, 64, lengths=True, mask="TB"),
    Case(2, 1, 128, torch.float32, mask="T"),
    Case(2, 1, 128, torch.bfloat16, reverse=True, mask="TB"),
    Case(2, 1, 128, torch.float16),
)
MANY_UNITS = (
    Case(3, 3, 65, lengths=True, reset=True, mask="TB"),
    Case(3, 3, 65, lengths=True, reset=True, reverse=True, mask="T", grads="output c"),
    Case(2, 1, 129, torch.float32, mask="TB"),
    Case(2, 1, 129, torch.bfloat16),
    Case(2, 1, 129, torch.float16),
)


@pytest.fixture(params=["held", "streamed", "stepwise"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way through the steps, for every size and dtype."""
    name: str = request.param
    most = 0 if name == "stepwise" else 1024
    monkeypatch.setattr(lstm, "WALKED_UNITS", dict.fromkeys((2, 4, 8), most))
    chosen = lstm.options

    def options(*args: Any) -> dict[str, int]:
        found = chosen(*args)
        return found if name == "stepwise" else found | {"HELD": name == "held"}

    monkeypatch.setattr(lstm, "options", options)
    return name


def forward(*args: Any) -> tuple[Tensor, ...]:
    return lstm.recurrence_forward(ForwardArguments(*args))


def backward(*args: Any) -> tuple[Tensor, ...]:
    call = BackwardArguments(*args)
    mask = call.detach_mask
    if mask is not None and mask.dim() == 1:
        mask = mask.unsqueeze(1).expand(call.gates.shape[:2]).contiguous()
    return lstm.recurrence_backward(call._replace(detach_mask=mask))


def run(case: Case, given: Given) -> dict[str, Tensor]:
    bias = random(4 * case.H, seed=20, dtype=case.dtype)
    output, h_n, c_n, gates, cells = forward(
        given.projected - bias, bias, given.h_0, given.c_0, given.weight_hh, given.lengths,
        given.reset, case.reverse, True,
    )  # fmt: skip
    da, dh, dc = backward(
        *given.grads, given.c_0, given.weight_hh, gates, cells, given.lengths, given.reset,
        given.detach_mask, case.reverse,
    )  # fmt: skip
    found = {"output": output, "h_n": h_n, "c_n": c_n}
    return found | {"grad_gates": da, "grad_h_0": dh, "grad_c_0": dc}


@pytest.mark.parametrize("case", CASES[1:6] + CASES[8:10], ids=str)
def test_every_way_matches_the_loop(case: Case, way: str, poison: None) -> None:
    """Twice the same, from the same inputs, of which nothing past the end is read."""
    given, unchanged = inputs(case), inputs(case)
    given.projected[given.past] = torch.nan
    if given.grads[0] is not None:
        given.grads[0][given.past] = torch.nan
    found, again = run(case, given), run(case, given)
    assert all(torch.equal(x, again[name]) for name, x in found.items())
    for name in ("h_0", "c_0", "weight_hh"):
        assert torch.equal(getattr(given, name), getattr(unchanged, name)), name
    assert_matches(found, expect(case, unchanged), case.dtype, LOW_PRECISION)
    for name in ("output", "grad_gates"):
        assert (found[name][given.past] == 0).all(), name


@pytest.mark.parametrize("case", CASES + LARGEST + MANY_UNITS, ids=str)
def test_what_is_chosen_matches_the_loop(case: Case) -> None:
    assert lstm.fused(case.H, case.dtype) == (case not in MANY_UNITS)
    given = inputs(case)
    assert_matches(run(case, given), expect(case, given), case.dtype, LOW_PRECISION)


@pytest.mark.parametrize(
    ("dtype", "steps"),
    [(torch.bfloat16, 2000), (torch.float16, 200), (torch.float32, 200), (torch.float64, 200)],
    ids=str,
)
def test_a_long_memory_keeps_its_gradient(dtype: torch.dtype, steps: int) -> None:
    case, given = long_memory(dtype, steps)
    assert_remembers(run(case, given), case, given)


def test_weights_are_held_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def held(shared_bytes: int) -> list[int]:
        monkeypatch.setattr(lstm, "_shared_bytes", lambda device: shared_bytes)
        chosen = (
            lstm.options(1, H, torch.bfloat16, torch.device("cuda", 0)) for H in range(1, 129)
        )
        return [H for H, option in enumerate(chosen, 1) if option["HELD"]]

    assert held(232448) == held(166912) == list(range(1, 129))  # H100, A100
    assert held(101376) == held(65536) == list(range(1, 65))  # RTX 4090, MI300
    assert not lstm.options(1, 16, torch.float32, torch.device("cpu"))["HELD"]


def test_a_step_detached_in_all_samples_has_no_product(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(Case(4, 3, 5))
    saved = forward(
        given.projected, None, given.h_0, given.c_0, given.weight_hh, None, None, False, True
    )[3:]
    made, product = [], interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda *args: made.append(1) or product(*args),
    )

    def products(reset: Tensor | None, mask: Tensor | None) -> int:
        made.clear()
        backward(*given.grads, given.c_0, given.weight_hh, *saved, None, reset, mask, False)
        return len(made)

    whole = torch.ones(4, dtype=torch.bool)
    most = whole.unsqueeze(1).repeat(1, 3)
    most[2, 1] = False
    assert products(None, whole) == products(most | whole.unsqueeze(1), None) == 0
    assert products(~most, most) == 0, "step 2 of sample 1 is reset, the others are detached"
    one = products(None, most)
    assert one > 0 and products(None, None) == 4 * one == 4 * products(most, None)


def test_without_save_and_with_an_empty_batch() -> None:
    case = Case(3, 3, 5)
    given = inputs(case)
    found = forward(
        given.projected, None, given.h_0, given.c_0, given.weight_hh, None, None, False, False
    )
    assert found[3].numel() == found[4].numel() == 0
    expected = expect(case, given)
    for name, tensor in zip(("output", "h_n", "c_n"), found, strict=False):
        assert_close(tensor, expected[name], name)
    for H in (5, 65):
        empty = run(Case(3, 0, H), inputs(Case(3, 0, H)))
        shapes = [(3, 0, H), (0, H), (0, H), (3, 0, 4 * H), (0, H), (0, H)]
        assert [tuple(x.shape) for x in empty.values()] == shapes
