"""Layers and states on their way through files, pytrees, exported programs and meta tensors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import throughtime
from throughtime import (
    LSTM,
    DetachSchedule,
    RelevancyAttention,
    RelevancyCache,
    RelLSTM,
    RelState,
    _ext,
)

T, B, E = 9, 2, 4
X = torch.randn(T, B, E, generator=torch.Generator().manual_seed(0))


class Step(nn.Module):
    """A layer that goes on from a state, which it takes and returns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        if isinstance(self.layer, RelevancyAttention):
            return self.layer(x, cache=state), state
        output, state = self.layer(x, state)
        return output, state


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "LSTM": lambda **options: LSTM(E, E, 2, detach_prob=0.5, **options),
    "RelLSTM": lambda **options: RelLSTM(E, E, 2, window_size=3, top_k=2, **options),
    "RelevancyAttention": lambda **options: RelevancyAttention(E, 2, 3, 2, False, False, **options),
}


def step(name: str, **options: Any) -> tuple[Step, Any]:
    """The layer, and the state that it is in after one call."""
    module = Step(LAYERS[name](**options)).eval().requires_grad_(False)
    state = RelevancyCache() if name == "RelevancyAttention" else None
    return module, module(X.to(options.get("device", "cpu")), state)[1]


def assert_same(one: Any, other: Any) -> None:
    (a, spec), (b, other_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    assert spec == other_spec
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


@pytest.mark.parametrize("name", LAYERS)
def test_copies_go_on_where_the_original_does(name: str, tmp_path: Path) -> None:
    """Also by torch.load with its default, weights_only=True."""
    module, state = step(name)
    torch.save((module.layer, state), tmp_path / "saved.pt")
    with torch.serialization.safe_globals([nn.Linear]):  # torch's own are the user's to list
        loaded = torch.load(tmp_path / "saved.pt", weights_only=True)
    for layer, kept in (
        loaded,
        copy.deepcopy((module.layer, state)),
        pickle.loads(pickle.dumps((module.layer, state))),
    ):
        assert type(layer) is type(module.layer) and type(kept) is type(state)
        assert repr(layer) == repr(module.layer) and not layer.training
        assert_same(Step(layer)(X, kept), module(X, copy.deepcopy(state)))


def test_every_public_class_can_be_loaded() -> None:
    public = [getattr(throughtime, name) for name in throughtime.__all__]
    of_a_process = {throughtime.backend, throughtime.Acceleration, throughtime.GradientFlow}
    classes = {c for c in public if isinstance(c, type)} - of_a_process
    assert {LSTM, RelLSTM, RelevancyAttention, RelState, RelevancyCache, DetachSchedule} <= classes
    assert classes <= set(torch.serialization.get_safe_globals())


@pytest.mark.parametrize("name", ["RelLSTM", "RelevancyAttention"])
def test_states_are_pytrees(name: str) -> None:
    _, state = step(name)
    leaves, spec = pytree.tree_flatten(state)
    assert_same(pytree.tree_unflatten(leaves, spec), state)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    doubled = pytree.tree_map_only(Tensor, lambda x: x * 2, state)
    assert type(doubled) is type(state) and torch.equal(doubled.position, state.position * 2)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(state)[0]]
    assert {".position", ".retained"} <= set(paths)


# The loop of the reference is unrolled: its exported program is for one length.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # by torch 2.10, of its own
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "auto") for name in LAYERS), ("LSTM", "reference")]
)
def test_states_in_and_out_of_an_exported_program(name: str, backend: str, strict: bool) -> None:
    module, state = step(name, backend=backend)
    dynamic = backend != "reference" and _ext.extension is not None
    slots = (None, None) if name == "LSTM" else [None] * len(pytree.tree_leaves(state))
    program = torch.export.export(
        module,
        (X, copy.deepcopy(state)),
        strict=strict,
        dynamic_shapes=({0: torch.export.Dim("T", min=4, max=99)}, slots) if dynamic else None,
    )
    nodes = [n for part in program.graph_module.modules() for n in part.graph.nodes]
    ours = [n for n in nodes if str(n.target).startswith("throughtime.")]
    assert len(ours) == ({"RelevancyAttention": 1}.get(name, 2) if dynamic else 0)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x = X.repeat(2, 1, 1) if dynamic else X
    assert_same(loaded(x, copy.deepcopy(state)), module(x, copy.deepcopy(state)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_meta_tensors_have_the_shapes_of_real_ones(name: str, dtype: torch.dtype) -> None:
    results = []
    for device in ("cpu", "meta"):
        module = Step(LAYERS[name](device=device, dtype=dtype))
        x = X.detach().clone().to(device, dtype).requires_grad_()
        state = RelevancyCache() if name == "RelevancyAttention" else None
        for _ in range(2):
            output, state = module(x, state)
        output.sum().backward()
        results.append(pytree.tree_leaves((output, state, [p.grad for p in module.parameters()])))
    for real, meta in zip(*results, strict=True):
        if isinstance(real, Tensor):
            assert meta.is_meta and (meta.shape, meta.dtype) == (real.shape, real.dtype)
        else:
            assert meta == real


@pytest.mark.parametrize("name", LAYERS)
def test_from_meta_to_a_device(name: str) -> None:
    with torch.device("meta"):
        layer = LAYERS[name]()
        assert layer(torch.zeros(T, B, E))[0].is_meta
    torch.manual_seed(0)
    made = LAYERS[name]()
    layer.to_empty(device="cpu").load_state_dict(made.state_dict())
    assert_same(list(layer.state_dict().values()), list(made.state_dict().values()))
    with torch.device("meta"):
        layer = LAYERS[name]()
    layer.load_state_dict(made.state_dict(), assign=True)
    torch.manual_seed(1)
    result = layer(X)
    torch.manual_seed(1)
    assert_same(result, made(X))
