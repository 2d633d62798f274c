"""The LSTM's recurrence in Triton, in the interpreter, against a loop over single samples."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import random, random_mask
from cases_gpu import DTYPES, TRUNCATED
from cases_recurrence import Case, assert_remembers, check, expect, inputs, long_memory, run
from closeness import assert_close

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from throughtime.triton_kernels import lstm
from triton.runtime import interpreter

forward: Any = torch.ops.throughtime.lstm_recurrence_forward_triton
backward: Any = torch.ops.throughtime.lstm_recurrence_backward_triton

# The interpreter takes milliseconds per operation: few and small.
CASES = (
    Case(4, 3, 5, reset=True),
    Case(4, 3, 5, lengths=True, mask="T"),
    Case(4, 3, 5, reverse=True, reset=True, mask="T"),
    Case(5, 3, 5, lengths=True, reset=True, reverse=True, mask="TB"),
    Case(3, 17, 20, lengths=True, reset=True, mask="TB"),
    Case(4, 3, 5, torch.float16, lengths=True, reverse=True, mask="TB"),
    Case(4, 3, 20, torch.bfloat16, lengths=True, reset=True, mask="TB"),
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_way_matches_the_loop(case: Case, way: str, poison: None) -> None:
    check(case, 1, forward, backward, TRUNCATED)


@pytest.mark.parametrize("case", LARGEST + MANY_UNITS, ids=str)
def test_what_is_chosen_matches_the_loop(case: Case) -> None:
    assert lstm.fused(case.H, case.dtype) == (case not in MANY_UNITS)
    check(case, 1, forward, backward, TRUNCATED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_memory_keeps_its_gradient(dtype: torch.dtype) -> None:
    case, given = long_memory(dtype, 400 if dtype == torch.bfloat16 else 200)
    (found,) = run(case, [given], forward, backward)
    assert_remembers(found, case, given)


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
    case = Case(4, 3, 5)
    made, product = [], interpreter.InterpreterBuilder.create_dot

    def counted(*args: Any) -> Any:
        made.append(1)
        return product(*args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)

    def back(*args: Any) -> Any:
        made.clear()  # of the forward
        return backward(*args)

    def products(reset: Tensor | None, mask: Tensor | None) -> int:
        given = inputs(case)
        given.reset, given.detach_mask = reset, mask
        run(case, [given], forward, back)
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
    states = (x.unsqueeze(0) for x in (given.h_0, given.c_0, given.weight_hh))
    found = forward(given.projected.unsqueeze(2), None, *states, None, None, False, False, False)
    assert found[3].numel() == found[4].numel() == 0
    expected = expect(case, given)
    for name, tensor in zip(("output", "h_n", "c_n"), found, strict=False):
        assert_close(tensor.view(expected[name].shape), expected[name], name)
    for H in (5, 65):
        empty = Case(3, 0, H)
        (found,) = run(empty, [inputs(empty)], forward, backward)
        shapes = [(3, 0, H), (0, H), (0, H), (3, 0, 4 * H), (0, H), (0, H)]
        assert [tuple(x.shape) for x in found.values()] == shapes


def spread(x: Tensor) -> Tensor:
    """The same values, each between two others."""
    other = ~x if x.dtype == torch.bool else torch.full_like(x, 9)
    return torch.stack((other, x, other), -1)[..., 1]


T, B, H = 4, 3, 5
LENGTHS = torch.tensor([3, 0, 4])
RESET, MASK = (random_mask(1, T, B, p=0.5, seed=seed) for seed in (1, 2))
BIAS, H_0, C_0, WEIGHT = (
    random(1, *shape, seed=k) for k, shape in enumerate(((4 * H,), (B, H), (B, H), (4 * H, H)))
)


@pytest.mark.parametrize("reverse", [False, True])
def test_operators_take_any_strides(reverse: bool) -> None:
    whole = random(T, 1, 1, 4 * H, seed=5).expand(T, B, 1, -1)
    mask = MASK[..., :1].expand(1, T, B)
    given = (whole, BIAS, H_0, C_0, WEIGHT, LENGTHS, mask)
    assert not (whole.is_contiguous() or mask.is_contiguous())
    dense = forward(*(x.contiguous() for x in given), reverse, True, False)
    strided = forward(*given[:1], *map(spread, given[1:]), reverse, True, False)
    valid = torch.arange(T).unsqueeze(1) < LENGTHS
    for one, other in zip(dense, strided, strict=True):
        assert torch.equal(*((x[valid] if x.dim() == 4 else x) for x in (one, other)))
    states = (random(1, B, H, seed=seed) for seed in (7, 8))
    grads = (random(B, T, 1, H, seed=6).transpose(0, 1), *states)
    after = (*grads, C_0, WEIGHT, *(x.nan_to_num() for x in dense[3:]), LENGTHS, mask, mask)
    found = backward(*after[:1], *map(spread, after[1:]), reverse, False)
    whole = backward(*(x.contiguous() for x in after), reverse, False)
    for one, other in zip(whole, found, strict=True):
        assert torch.equal(one, other) and one.any()


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_operators_pass_opcheck(lengths: Tensor | None) -> None:
    # Fakes and schemas; gradients are lstm_gpu_forward's.
    checks = ("test_schema", "test_faketensor")
    args = (
        random(T, B, 1, 4 * H, seed=5),
        BIAS,
        H_0,
        C_0,
        WEIGHT,
        lengths,
        RESET,
        True,
        True,
        False,
    )
    torch.library.opcheck(forward.default, args, test_utils=checks)
    output, h_n, c_n, gates, cells = forward(*args)
    # Past the end they are unset; opcheck compares all elements.
    gates, cells = gates.nan_to_num(), cells.nan_to_num()
    grads = (output, h_n, c_n, C_0, WEIGHT, gates, cells, lengths, RESET, MASK, True, False)
    torch.library.opcheck(backward.default, grads, test_utils=checks)
