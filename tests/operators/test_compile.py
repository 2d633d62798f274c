"""torch.compile without graph breaks or recompilation, and torch.export, for every layer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounter

import throughtime
from cases import Shape, call, options_for, random, results, runnable, tensors
from closeness import assert_all_close, assert_close
from throughtime import LSTM, RelevancyAttention, RelevancyCache, RelLSTM, _ext, functional
from throughtime.backends import Request, choose, requirements

# Torch warns of its own compiler, which makes an instance of an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TINY = Shape(3, 3, 2, 4)

# Its loop is unrolled while tracing, so the reference is compiled once per number of steps.
compiled_only = pytest.mark.parametrize(
    "backend", [name for name in runnable() if name != "reference"]
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_same_values_and_gradients_in_one_graph(backend: str) -> None:
    named, options = tensors(TINY), options_for(TINY)["all-reverse"]
    compiled = torch.compile(functional.lstm, fullgraph=True, backend="aot_eager")
    found = results(compiled, named, backend=backend, **options)
    assert_all_close(found, results(functional.lstm, named, backend=backend, **options))


@pytest.mark.parametrize("argument", ["auto", "cuda", "triton"])
def test_the_choice_of_a_gpu_backend_is_traced(
    argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo cannot look into a function in C, as those of the extensions are."""
    opaque = time.sleep  # sleeps for 0 seconds, and returns None
    monkeypatch.setattr(_ext, "_missing_cuda", None)
    monkeypatch.setattr(_ext, "cuda_extension", SimpleNamespace(why_not=opaque))
    monkeypatch.setattr(requirements, "_HAS_TRITON", True)
    gpus = {"is_available": lambda: True, "get_device_capability": lambda index: (9, 0)}
    monkeypatch.setattr(requirements, "torch", SimpleNamespace(cuda=SimpleNamespace(**gpus)))
    request = Request("lstm", 8, 0, torch.device("cuda", 0), torch.float32)

    def named(x: Tensor) -> tuple[Tensor, str]:
        return x + 1, choose(argument, request)

    requirements._found_of_gpu.cache_clear()
    compiled = torch.compile(named, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1))[1] == ("cuda" if argument == "auto" else argument)
    requirements._found_of_gpu.cache_clear()


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "LSTM": lambda **options: LSTM(4, 5, bidirectional=True, **options),
    "RelLSTM": lambda **options: RelLSTM(4, 5, num_layers=2, window_size=2, top_k=2, **options),
    "RelevancyAttention": lambda **options: RelevancyAttention(
        4, 2, 3, 2, batch_first=False, **options
    ),
}


@compiled_only
@pytest.mark.parametrize(
    ("name", "compiler"), [*((name, "aot_eager") for name in LAYERS), ("LSTM", "inductor")]
)
def test_compiles_once_for_many_lengths(name: str, compiler: str, backend: str) -> None:
    layer = LAYERS[name](backend=backend)
    twin = layer
    if name == "LSTM":
        layer.detach_prob = 1.0
        twin = LAYERS[name](backend="reference")
        twin.load_state_dict(layer.state_dict())
    dynamic = True if compiler == "inductor" else None  # inductor is slow: one graph, not two
    compiled = torch.compile(layer, fullgraph=True, backend=compiler, dynamic=dynamic)

    def check(length: int) -> None:
        x = random(length, 3, 4, seed=length, dtype=torch.float32)
        mask = {"detach_mask": torch.ones(length, dtype=torch.bool)} if name == "LSTM" else {}
        found, expected = compiled(x), twin(x, **mask)
        if name != "RelevancyAttention":
            (found, state), (expected, end) = found, expected
            if name == "RelLSTM":
                assert torch.equal(state.position, end.position)
        assert_close(found, expected)
        gradients = torch.autograd.grad(found.square().sum(), list(layer.parameters()))
        wanted = torch.autograd.grad(expected.square().sum(), list(twin.parameters()))
        for gradient, other in zip(gradients, wanted, strict=True):
            assert_close(gradient, other)

    check(8)
    check(11)  # from here on the length is symbolic
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (4, 9, 30, 150 if name == "LSTM" else 17):
            check(length)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
@compiled_only
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_autograd(name: str, backend: str) -> None:
    layer = LAYERS[name](backend=backend)
    x = random(6, 3, 4, seed=1, dtype=torch.float32)

    def gradients() -> tuple[Tensor, ...]:
        output = layer(x)
        output = output if isinstance(output, Tensor) else output[0]
        return torch.autograd.grad(output.square().sum(), list(layer.parameters()))

    expected = gradients()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        found = gradients()
    for gradient, other in zip(found, expected, strict=True):
        assert_close(gradient, other)


@compiled_only
def test_a_changing_detach_prob_does_not_recompile(backend: str) -> None:
    lstm = LSTM(4, 5, detach_prob=0.5, backend=backend)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    x, h_0 = torch.randn(6, 3, 4), torch.randn(1, 3, 5, requires_grad=True)

    def gradient() -> Tensor:
        output, _ = compiled(x, (h_0, torch.zeros(1, 3, 5)))
        return torch.autograd.grad(output.sum(), h_0)[0]

    gradient()
    lstm.detach_prob = 0.4
    gradient()
    with torch._dynamo.config.patch(error_on_recompile=True):
        lstm.detach_prob = 1.0
        assert not gradient().any()
        lstm.detach_prob = 1e-9
        assert gradient().any()


def test_draws_the_mask_inside_the_graph_afresh_each_time(backend: str) -> None:
    lstm = LSTM(4, 5, detach_prob=0.5, backend=backend)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    x = torch.randn(12, 3, 4)
    grads = [
        torch.autograd.grad(compiled(x)[0].square().sum(), lstm.weight_hh_l0)[0] for _ in range(3)
    ]
    assert not torch.equal(grads[0], grads[1]) and not torch.equal(grads[1], grads[2])


class Recorder(CompileCounter):
    """Counts graphs and keeps the names of the operators in the last one."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        self.targets = [str(node.target) for node in graph.graph.nodes]
        return super().__call__(graph, inputs)


def test_a_context_has_its_own_graph_in_its_own_thread() -> None:
    recorder = Recorder()
    compiled = torch.compile(LSTM(4, 5), fullgraph=True, backend=recorder)
    x = torch.randn(3, 2, 4)
    compiled(x)
    with throughtime.backend("reference"):
        compiled(x)
        assert recorder.frame_count == 2
        assert not any("throughtime" in target for target in recorder.targets)
        thread = threading.Thread(target=compiled, args=(x,))  # served by the first graph
        thread.start()
        thread.join()
    compiled(x)
    assert recorder.frame_count == 2
    with pytest.raises(RuntimeError), throughtime.backend("cuda"):
        compiled(x)


def test_the_context_works_inside_compiled_code() -> None:
    lstm = LSTM(4, 5)

    def function(x: Tensor) -> Tensor:
        with throughtime.backend("reference"):
            return lstm(x)[0]

    x = torch.randn(3, 2, 4)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert_close(compiled(x), lstm(x)[0])


def test_autocast_and_no_grad_in_one_graph(backend: str) -> None:
    lstm = LSTM(4, 5, detach_prob=0.5, backend=backend)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output, (h_n, c_n) = compiled(x)
        assert output.dtype == h_n.dtype == c_n.dtype == torch.bfloat16
        assert torch.equal(output, lstm(x)[0])
    with torch.no_grad():
        state = torch.get_rng_state()
        assert torch.equal(compiled(x)[0], lstm(x)[0])
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif("cpu" not in runnable(), reason="the compiled kernels are not here")
@pytest.mark.parametrize("name", ["RelLSTM", "RelevancyAttention"])
def test_a_stream_compiles_no_longer_once_its_memory_is_full(name: str) -> None:
    layer = LAYERS[name](backend="cpu").requires_grad_(False)

    def step(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if name == "RelLSTM":
            output, state = layer(x, state)
            return output, state
        return layer(x, cache=state), state

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    states = [RelevancyCache() if name == "RelevancyAttention" else None for _ in range(2)]

    def check(length: int) -> None:
        x = random(length, 2, 4, seed=length, dtype=torch.float32)
        found, states[0] = compiled(x, states[0])
        wanted, states[1] = step(x, states[1])
        assert_close(found, wanted)
        assert torch.equal(states[0].position, states[1].position)
        assert states[0].retained == states[1].retained

    for length in (8, 11, 9, 7):
        check(length)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (30, 5, 17):
            check(length)


def test_arguments_are_checked_while_tracing(backend: str) -> None:
    compiled = torch.compile(LSTM(4, 5, backend=backend), fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError):
        compiled(torch.randn(3, 2, 7))


def test_lengths_are_no_constants_of_the_graph(backend: str) -> None:
    named = tensors(TINY)
    compiled = torch.compile(functional.lstm, fullgraph=True, backend="eager")
    for lengths in ([3, 1, 2], [2, 3, 0]):
        given = torch.tensor(lengths)
        found, _ = call(compiled, named, lengths=given, backend=backend)
        expected, _ = call(functional.lstm, named, lengths=given, backend=backend)
        assert_close(found, expected)
