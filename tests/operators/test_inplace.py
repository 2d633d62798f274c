"""What a call returned, changed in place before the backward: right gradients or torch's error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils import _pytree as pytree

import calls
from calls import GATES, B, H, I, T
from cases import random, runnable
from throughtime import LSTM, RelevancyAttention, RelevancyCache, RelLSTM, accelerate, functional

Change = Callable[[Tensor], Any]


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.mul_(2)


# A change in place, and the same change out of place.
CHANGES: dict[str, tuple[Change, Change]] = {
    "detach_": (lambda x: x.detach_(), lambda x: x.detach()),
    "mul_": (lambda x: x.mul_(0), lambda x: x * 0),
    "relu_": (lambda x: x.relu_(), lambda x: x.relu()),
    "copy_": (lambda x: x.copy_(torch.ones_like(x)), lambda x: torch.ones_like(x)),
    "slice": (lambda x: x[0].mul_(2), lambda x: torch.cat([x[:1] * 2, x[1:]])),
    "no_grad": (without_grad, lambda x: x + x.detach()),
}


def differentiable(result: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(result) if getattr(x, "requires_grad", False)]


def gradients(
    run: Callable[[list[Tensor]], Any], leaves: list[Tensor], which: int, change: Change, new: bool
) -> list[Tensor] | str:
    """Gradients of a sum over all outputs, of which one was changed, or replaced (``new``).

    Instead of them, what torch refuses the change with.
    """
    outputs = differentiable(run(leaves))
    try:
        changed = change(outputs[which])
        if new:
            outputs[which] = changed
        loss = sum((x * random(*x.shape, seed=k)).sum() for k, x in enumerate(outputs))
        loss += sum(0 * x.sum() for x in leaves)  # has a gradient whatever was changed
        return list(torch.autograd.grad(loss, leaves, materialize_grads=True))
    except RuntimeError as error:
        return str(error)


def check(run: Callable[[list[Tensor]], Any], leaves: list[Tensor], theirs: Any = None) -> None:
    """Every change to every output: never wrong, and allowed where ``theirs`` allows it."""
    count = len(differentiable(run(leaves)))
    assert count
    for which in range(count):
        for name, (in_place, out_of_place) in CHANGES.items():
            found = gradients(run, leaves, which, in_place, new=False)
            if isinstance(found, str):
                said = ("modified by an inplace operation", "views in-place", "detached in-place")
                assert any(words in found for words in said), found
                assert theirs is None or isinstance(
                    gradients(theirs, leaves, which, in_place, new=False), str
                ), f"output {which}, {name}: {found}"
                continue
            wanted = gradients(run, leaves, which, out_of_place, new=True)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, msg=f"output {which}, {name}")


OPTIONS: list[dict[str, Any]] = [
    {}, {"num_layers": 2, "batch_first": True}, {"bidirectional": True}, {"proj_size": 2},
    {"proj_size": 2, "num_layers": 2, "bidirectional": True},
]  # fmt: skip
FORMS: dict[str, Callable[[Tensor], Tensor | PackedSequence]] = {
    "padded": lambda x: x,
    "packed": lambda x: pack_sequence([x[:, 0], x[:3, 1]]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lstm_as_theirs(backend: str, options: dict[str, Any], form: str) -> None:
    theirs = nn.LSTM(I, H, **options, dtype=torch.float64)
    ours = LSTM.from_torch(theirs, backend=backend)
    x = random(T, B, I, seed=9).requires_grad_()

    def of(layer: nn.Module) -> Callable[[list[Tensor]], Any]:
        def run(leaves: list[Tensor]) -> Any:
            weights = dict(zip(dict(layer.named_parameters()), leaves[1:], strict=True))
            output, states = torch.func.functional_call(layer, weights, (FORMS[form](leaves[0]),))
            return (output.data if isinstance(output, PackedSequence) else output), states

        return run

    weights = [p.detach().clone().requires_grad_() for p in theirs.parameters()]
    check(of(ours), [x, *weights], of(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_accelerated_as_theirs(options: dict[str, Any], dtype: torch.dtype) -> None:
    lstm = nn.LSTM(I, H, **options, dtype=dtype)

    def run(leaves: list[Tensor]) -> Any:
        return lstm(leaves[0])

    def accelerated(leaves: list[Tensor]) -> Any:
        with accelerate() as handle:
            result = run(leaves)
        assert set(handle.calls) == {"cpu kernels"}
        return result

    x = random(T, B, I, seed=9, dtype=dtype).requires_grad_()
    check(accelerated, [x, *lstm.parameters()], run)


def rel_lstm_twice(backend: Any, x: Tensor, *weights: Tensor) -> Any:
    _, state = calls.rel_lstm(backend, x, *weights)
    return functional.rel_lstm(
        x, state, *weights[:2], None, None, *weights[2:], 2, 2, backend=backend
    )


def rel_layer(backend: Any, x: Tensor) -> Any:
    return RelLSTM(I, H, 2, window_size=2, top_k=2, backend=backend, dtype=x.dtype)(x)


def attention_layer(backend: Any, x: Tensor) -> Any:
    cache = RelevancyCache()
    return RelevancyAttention(I, 1, 2, 2, backend=backend, dtype=x.dtype)(x, cache=cache), cache


CALLS = calls.CALLS | {
    "rel_lstm": (rel_lstm_twice, calls.CALLS["rel_lstm"][1]),
    "RelLSTM": (rel_layer, ((T, B, I),)),
    "RelevancyAttention": (attention_layer, ((B, T, I),)),
}


@pytest.mark.parametrize("name", CALLS)
def test_never_wrong(name: str, backend: str) -> None:
    function, shapes = CALLS[name]
    leaves = [random(*shape, seed=k).requires_grad_() for k, shape in enumerate(shapes)]

    def run(leaves: list[Tensor]) -> Any:
        torch.manual_seed(0)
        return function(backend, *leaves)

    check(run, leaves)


@pytest.mark.parametrize("backend", [*runnable(), "triton"])
def test_states_can_be_detached(backend: str) -> None:
    """A state is no view of what a kernel returned: torch refuses to detach a view in place."""
    x = random(T, B, I, seed=0).requires_grad_()
    weights = [random(*shape, seed=1) for shape in GATES]
    for result in (
        calls.lstm(backend, x, *weights)[1],
        calls.both(backend, x, *weights, *weights)[1],
        rel_layer(backend, x)[1],
        LSTM(I, H, backend=backend, dtype=x.dtype)(x)[1],
    ):
        for state in differentiable(result):
            assert not state.detach_().requires_grad
