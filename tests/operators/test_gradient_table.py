"""Gradients by every route that torch offers: the table of gradient_table.py, in part."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from allpairspy import AllPairs

import compiled_kernels  # noqa: F401
from gradient_table import (
    DERIVATIVES,
    LAYERS,
    ROUTES,
    TRAINABLE,
    Case,
    build,
    exact,
    example,
    judge,
)
from throughtime import functional

QUICK = [route for route in ROUTES if route != "AOTInductor"]  # which compiles C++ for each case
# Any two values meet in one of these.
PAIRS = [Case(*values) for values in AllPairs([QUICK, DERIVATIVES, LAYERS, TRAINABLE])]
FINE = ("right", "refused", "n/a")


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_gradient(case: Case) -> None:
    outcome = judge(case)
    assert outcome.kind in FINE, outcome.why


def test_most_of_the_table_applies() -> None:
    # Otherwise the test above would pass on errors alone.
    ways = (("eager", "backward"), ("functional_call", "func.grad"))
    sure = [Case(*way, layer, "all") for way in ways for layer in LAYERS]
    kinds = [judge(case).kind for case in sure]
    assert len(kinds) >= 16 and kinds.count("right") == len(kinds), list(
        zip(sure, kinds, strict=True)
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own
def test_an_aotinductor_program_has_no_gradient_instead_of_a_wrong_one(tmp_path: Path) -> None:
    layer, x = build("functional.lstm", "cpu"), example().requires_grad_()
    path = str(tmp_path / "layer.pt2")
    exported = torch.export.export(layer, (x,))
    torch._inductor.aoti_compile_and_package(exported, package_path=path)
    found = torch._inductor.aoti_load_package(path)(x)
    for one, other in zip(found, layer(x), strict=True):
        torch.testing.assert_close(one, other.detach())
        assert not one.requires_grad


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("derivative", ["func.grad", "func.jvp", "vmap(grad)"])
@pytest.mark.parametrize("layer", ["functional.lstm", "functional.rel_lstm", "RelevancyAttention"])
def test_triton_operators(derivative: str, layer: str) -> None:
    """Their registrations; the code above them is the same as for the CPU operators."""
    case = Case("functional_call", derivative, layer, "all")
    outcome = judge(case, kernels="triton")
    assert outcome.kind == "right", outcome.why


def test_a_wrong_gradient_is_seen() -> None:
    case = Case("eager", "func.grad", "functional.lstm", "all")
    exact(case.layer)["x"].mul_(1 + 1e-6)
    try:
        assert judge(case).kind == "wrong"
    finally:
        exact.cache_clear()


def test_no_two_gradients_share_memory() -> None:
    weights = [torch.randn(s, requires_grad=True) for s in ((8, 3), (8, 2), (8,), (8,))]
    output, _ = functional.lstm(torch.randn(4, 2, 3), None, *weights, backend="cpu")
    attention = [torch.randn(s, requires_grad=True) for s in ((5, 2), (5, 2), (5,))]
    other, _ = functional.rel_lstm(
        torch.randn(4, 2, 3), None, *weights, *attention, 2, 2, backend="cpu"
    )
    for y, leaves in ((output, weights), (other, [*weights, *attention])):
        grads = torch.autograd.grad(y.sum(), leaves)
        assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)
        expected = [g.clone() * 0.5 for g in grads]
        torch._foreach_mul_(list(grads), 0.5)
        for g, right in zip(grads, expected, strict=True):
            assert torch.equal(g, right)


def test_parts_of_an_operator_refuse() -> None:
    part = torch.ops.throughtime.lstm_recurrence_forward
    projected = torch.randn(2, 1, 1, 8, requires_grad=True)
    state = torch.zeros(1, 1, 2)
    with pytest.raises(RuntimeError, match=r"has no gradient of its own.*lstm_gpu_forward"):
        part(projected, None, state, state, torch.zeros(1, 8, 2), None, None, False, False, False)
