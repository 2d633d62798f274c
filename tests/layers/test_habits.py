"""What training code does with an ``nn.LSTM``, done with ours: same results, same errors."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from throughtime import LSTM, RelevancyAttention, RelLSTM

X = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))


def train(layer: nn.Module, x: Tensor = X, hx: Any = None) -> list[Any]:
    layer(x, hx)[0].sum().backward()
    return [None if p.grad is None else list(p.grad.shape) for p in layer.parameters()]


def reparametrize(layer: nn.Module) -> Any:
    parametrizations.weight_norm(layer, "weight_hh_l0")
    parametrizations.orthogonal(layer, "weight_ih_l0")
    return train(layer)


def pruned(layer: nn.Module) -> Any:
    prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
    return train(layer), train(layer)


def hook_backward(layer: nn.Module) -> Any:
    seen: list[Any] = []
    layer.register_full_backward_pre_hook(lambda _, grads: seen.append(len(grads)))
    layer.register_full_backward_hook(lambda *given: seen.append([len(x) for x in given[1:]]))
    train(layer, X.clone().requires_grad_())
    return seen


def vectors(layer: nn.Module) -> Any:
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(vector * 2, layer.parameters())
    return train(layer)[:4], nn.utils.clip_grad_norm_(layer.parameters(), 1.0) > 0


def halves(layer: nn.Module) -> Any:
    return [layer.to(dtype)(X.to(dtype))[0].dtype for dtype in (torch.half, torch.bfloat16)]


def double_by_default(layer: nn.Module) -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        return layer(X)[0].dtype, type(layer)(4, 4)(torch.randn(2, 1, 4))[0].dtype
    finally:
        torch.set_default_dtype(torch.float32)


def assigned(layer: nn.Module) -> Any:
    other = type(layer)(4, 4)
    layer.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)
    return torch.equal(layer(X)[0], other(X)[0])


def shared(layer: nn.Module) -> Any:
    return train(layer.share_memory())[:4], layer.weight_hh_l0.is_shared()


def output_of_inference(layer: nn.Module) -> Any:
    with torch.inference_mode():
        output, _ = layer(X)
    return nn.Linear(4, 1)(output)


def state_of_inference(layer: nn.Module) -> Any:
    with torch.inference_mode():
        _, state = layer(X)
    return train(layer, X, state)


def gradients_on_in_inference(layer: nn.Module) -> Any:
    with torch.inference_mode(), torch.enable_grad():
        output, _ = layer(X)
    return output.requires_grad, output.grad_fn


def stepped_before_backward(layer: nn.Module) -> Any:
    output, _ = layer(X)
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    output.sum().backward()


def backward_twice(layer: nn.Module) -> Any:
    loss = layer(X)[0].sum()
    loss.backward()
    loss.backward()


HABITS: list[Callable[[nn.Module], Any]] = [
    reparametrize,
    pruned,
    hook_backward,
    vectors,
    halves,
    double_by_default,
    assigned,
    shared,
    output_of_inference,
    state_of_inference,
    gradients_on_in_inference,
    stepped_before_backward,
    backward_twice,
]


def outcome(habit: Callable[[nn.Module], Any], layer: nn.Module) -> Any:
    """What it gives, or the beginning of torch's error."""
    try:
        return habit(layer)
    except RuntimeError as error:
        return str(error)[:60]


@pytest.mark.parametrize("layer_type", [LSTM, RelLSTM])
@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.__name__)
def test_as_with_theirs(habit: Callable[[nn.Module], Any], layer_type: type[nn.Module]) -> None:
    theirs, ours = outcome(habit, nn.LSTM(4, 4)), outcome(habit, layer_type(4, 4))
    if layer_type is RelLSTM and habit in (reparametrize, pruned):
        assert None not in ours  # it has more parameters
    else:
        assert ours == theirs


@pytest.mark.parametrize("layer_type", [LSTM, RelLSTM])
def test_a_backend_can_be_chosen_after_a_parametrization(layer_type: type[nn.Module]) -> None:
    layer = layer_type(4, 4)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    layer.backend = "reference"
    assert copy.deepcopy(layer)(X)[0].shape == X.shape


@pytest.mark.parametrize("packed", [None, torch.tensor([5, 1])], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True, "proj_size": 2}, {"bidirectional": True}], ids=str
)
def test_expected_sizes(options: dict[str, Any], packed: Tensor | None) -> None:
    """Subclasses call these."""
    theirs, ours = (cls(4, 5, 2, **options) for cls in (nn.LSTM, LSTM))
    for name in ("get_expected_hidden_size", "get_expected_cell_size"):
        assert getattr(ours, name)(X, packed) == getattr(theirs, name)(X, packed)
    states = [X.new_zeros(getattr(ours, name)(X, packed)) for name in (
        "get_expected_hidden_size", "get_expected_cell_size",
    )]  # fmt: skip
    order = torch.arange(states[0].size(1)).flip(0)
    for one, other in zip(*(m.permute_hidden(states, order) for m in (ours, theirs)), strict=True):
        assert torch.equal(one, other)
    ours.check_forward_args(X.flatten(0, 1) if packed is not None else X, states, packed)


@pytest.mark.parametrize(
    "layer", [LSTM(4, 64), RelLSTM(4, 32), RelevancyAttention(4, 1, 3, 2)], ids=type
)
def test_a_worker_forked_after_a_call(layer: nn.Module) -> None:
    """A DataLoader forks its worker from a process with threads; the worker has one thread."""
    x, threads = X.repeat(10, 8, 1), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = layer(x)[0]
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            torch.set_num_threads(1)
            os._exit(0 if torch.equal(layer(x)[0], wanted) else 1)
        assert os.waitpid(child, 0)[1] == 0 and torch.equal(layer(x)[0], wanted)
    finally:
        torch.set_num_threads(threads)
