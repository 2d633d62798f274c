"""What holds for every operation on every backend, in one table: layouts, gradients, NaN, bits.

The samples are small; that the values are right is tested per operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import calls
from cases import LOW_PRECISION, PROJECTED, SMALL, random
from closeness import rms
from samples import CHOICE, Attention, Given, Layer, Recurrence, Sample, assert_same, expect
from throughtime.ops.precision import multiplies_bfloat16

pytestmark = pytest.mark.usefixtures("poison")

CASES = (
    Recurrence(SMALL, "all", anew=True),
    Recurrence(PROJECTED[0], "mask-TB-reverse"),
    Layer(9, 3, 4, 5, 6, 3, 2, lengths=True, before=5, mask="TB"),
    Attention(3, 2, 9, 4, 6, 3, 2, additive=True, lengths=True, before=5),
    Attention(3, 1, 9, 4, 6, 3, 2, group=2, lengths=True, before=5),
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def leaves(given: Given) -> list[str]:
    """Names of what has a gradient."""
    return [name for name, x in given.items() if isinstance(x, Tensor) and x.requires_grad]


def changed(given: Given, change: Callable[[Tensor], Tensor]) -> Given:
    """The same arguments with every tensor changed; leaves stay leaves."""
    return {
        name: change(x.detach()).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for name, x in given.items()
    }


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-2, -1).contiguous().transpose(-2, -1) if x.dim() > 1 else sliced(x)


def offset(x: Tensor) -> Tensor:
    return torch.cat([x.flatten()[:3], x.flatten()])[3:].view(x.shape)


def sliced(x: Tensor) -> Tensor:
    wide = torch.full([2 * size + 1 for size in x.shape], 1e30 if x.is_floating_point() else 1)
    index = tuple(slice(1, None, 2) for _ in x.shape)
    wide = wide.to(x.dtype)
    wide[index] = x
    return wide[index]


def expanded(x: Tensor) -> Tensor:
    """Equal along the first dimension of two or more, in one place; lengths as they are."""
    return x[:1].expand(x.shape) if x.dim() > 1 else x


@pytest.mark.parametrize("layout", [sliced, transposed, expanded, offset], ids=lambda f: f.__name__)
@every_case
def test_any_strides(case: Sample, layout: Callable[[Tensor], Tensor], backend: str) -> None:
    """Of arguments, masks and arriving gradients."""
    strange = changed(case.inputs(), layout)
    tensors = [x for x in strange.values() if isinstance(x, Tensor)]
    assert layout is offset or sum(not x.is_contiguous() for x in tensors) >= len(tensors) / 2
    dense = changed(strange, lambda x: x.clone(memory_format=torch.contiguous_format))
    assert_same(expect(case, strange, backend), expect(case, dense, backend))


@every_case
def test_one_result_or_one_argument_alone(case: Sample, backend: str) -> None:
    """The same gradients where others are not wanted, and where others do not arrive."""
    given = case.inputs()
    names, full = leaves(given), expect(case, given, backend)
    for name in names:
        only = {n: x.detach() if n in names and n != name else x for n, x in given.items()}
        assert torch.equal(expect(case, only, backend)[f"grad_{name}"], full[f"grad_{name}"]), name
    grads = [n for n in given if n.startswith("grad_")]
    for name in grads:
        alone = {n: x for n, x in given.items() if n == name or n not in grads}
        zeros = given | {n: torch.zeros_like(given[n]) for n in grads if n != name}
        assert_same(expect(case, alone, backend), expect(case, zeros, backend))


def of_sample(case: Sample, name: str, x: Tensor) -> Tensor:
    """A view with the sample as its first dimension."""
    return x if isinstance(case, Attention) else x.movedim(-1 if name in CHOICE else -2, 0)


@pytest.mark.parametrize("case", [Recurrence(SMALL, "lengths"), *CASES[1:]], ids=str)
def test_nan_stays_in_its_sample(case: Sample, backend: str) -> None:
    """In one row of one argument, for each argument that has rows of samples."""
    clean = expect(case, case.inputs(), backend)
    per_sample = [name for name in clean if "weight" not in name and "bias" not in name]
    lengths = case.inputs().get("lengths")
    spoiled = 1 if lengths is None else int(lengths.argmax())
    others = [b for b in range(3) if b != spoiled]
    for place in [name for name in leaves(case.inputs()) if f"grad_{name}" in per_sample]:
        given = case.inputs()
        row = of_sample(case, place, given[place].detach())[spoiled]
        row.view(-1, row.size(-1))[-1 if "_0" in place else 2] = torch.nan
        found = expect(case, given, backend)
        assert any(x.isnan().any() for x in found.values()), f"{place}: the test shows nothing"
        for name in per_sample:
            rows, wanted = (of_sample(case, name, x[name]) for x in (found, clean))
            assert torch.equal(rows[others], wanted[others]), f"{name}, with NaN in {place}"


@every_case
def test_nothing_past_the_end_is_read(case: Sample, backend: str) -> None:
    """Neither padding nor its gradient."""
    given = case.inputs()
    if given.get("lengths") is None:
        given["lengths"] = torch.tensor([2, 5, 0])
    clean = expect(case, given, backend)
    with torch.no_grad():
        for name in ("input", "query", "key", "value", "grad_output"):
            for b, length in enumerate(given["lengths"] if name in given else ()):
                rows = given[name][b] if isinstance(case, Attention) else given[name][:, b]
                steps = given["grad_output"].size(-2 if isinstance(case, Attention) else 0)
                rows.narrow(-2, rows.size(-2) - steps + length, steps - length).fill_(torch.nan)
    found = expect(case, given, backend)
    for name, x in found.items():
        assert torch.equal(x, clean[name]), name


@every_case
def test_bit_equal_from_run_to_run_and_arguments_unchanged(case: Sample, backend: str) -> None:
    given = case.inputs(torch.float32)
    before = changed(given, torch.clone)
    first, again = (expect(case, given, backend) for _ in range(2))
    assert all(torch.equal(again[name], x) for name, x in first.items())
    assert all(torch.equal(given[n], x) for n, x in before.items() if isinstance(x, Tensor))


# The same for the functions, which cast their arguments.


def outcome(
    name: str, backend: str, leaves: list[Tensor], autocast: torch.dtype | None = None
) -> tuple[list[Any], list[Tensor]]:
    """All results, and the gradients for a fixed one of the output."""
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        found = pytree.tree_leaves(calls.CALLS[name][0](backend, *leaves))
    grad = random(*found[0].shape, seed=9).bfloat16().to(found[0].dtype)
    return found, list(torch.autograd.grad(found[0], leaves, grad))


def rounded(x: Any, like: Any) -> Any:
    return x.to(like.dtype) if isinstance(x, Tensor) else x


def assert_bit_equal(actual: Any, expected: Any) -> None:
    for one, other in zip(*map(pytree.tree_leaves, (actual, expected)), strict=True):
        assert type(one) is type(other) and getattr(one, "dtype", 0) == getattr(other, "dtype", 0)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


every_call = pytest.mark.parametrize("name", calls.CALLS)


# The input of a bidirectional layer has two gradients, which are added after they are rounded.
@pytest.mark.parametrize("name", [name for name in calls.CALLS if name != "bidirectional_lstm"])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision_is_float32_rounded_once(name: str, dtype: torch.dtype, backend: str) -> None:
    """Whether the tensors have the dtype or autocast casts them; relevance stays float32.

    Kernels that multiply bfloat16 round the operands of every product instead.
    """
    low = [x.detach().to(dtype).requires_grad_() for x in calls.leaves(name)]
    single = [x.detach().float().requires_grad_() for x in low]
    exact, found = (outcome(name, backend, x) for x in (single, low))
    assert found[0][0].dtype == dtype and {x.dtype for x in found[1]} == {dtype}
    others = {x.dtype for x in found[0] if isinstance(x, Tensor)} - {dtype}
    assert others <= {torch.int64, torch.float32}
    if backend == "cpu" and dtype == torch.bfloat16 and multiplies_bfloat16():
        pairs = zip(*map(pytree.tree_leaves, (found, exact)), strict=True)
        tensors = [pair for pair in pairs if isinstance(pair[0], Tensor)]
        numbers = [pair for pair in tensors if pair[0].is_floating_point()]
        assert all(rms(one, other) <= 1e-2 for one, other in numbers)
        chosen = [pair for pair in tensors if not pair[0].is_floating_point()]
        assert all(torch.equal(one, other) for one, other in chosen)
    else:
        assert_bit_equal(found, pytree.tree_map(rounded, exact, found))
    output, gradients = outcome(name, backend, single, dtype)
    assert_bit_equal(output, found[0])
    assert {x.dtype for x in gradients} == {torch.float32}
    assert_bit_equal([x.to(dtype) for x in gradients], found[1])


@every_call
def test_autocast_leaves_float64_alone(name: str, backend: str) -> None:
    leaves = calls.leaves(name)
    found = outcome(name, backend, leaves, torch.bfloat16)
    assert_bit_equal(found, outcome(name, backend, leaves))


@every_call
def test_nothing_is_saved_without_gradients(name: str, backend: str) -> None:
    found = calls.CALLS[name][0](backend, *(x.detach() for x in calls.leaves(name)))
    assert not any(x.requires_grad for x in pytree.tree_leaves(found) if isinstance(x, Tensor))
