"""torch.compile without graph breaks or recompilation, and torch.export."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import throughtime
from cases import Shape, call, options_for, random, results, runnable, tensors
from closeness import assert_all_close, assert_close
from throughtime import LSTM, functional

# torch warns of what its own compiler does: it makes an instance of an autograd.Function, and uses
# torch.jit.
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


@pytest.mark.parametrize("name", ["plain", "mask-T", "all", "all-reverse"])
def test_same_values_and_gradients_in_one_graph(backend: str, name: str) -> None:
    named, options = tensors(TINY), options_for(TINY)[name]
    compiled = torch.compile(functional.lstm, fullgraph=True, backend="aot_eager")
    found = results(compiled, named, backend=backend, **options)
    assert_all_close(found, results(functional.lstm, named, backend=backend, **options))


@compiled_only
def test_inductor_compiles_once_for_many_lengths(backend: str) -> None:
    lstm = LSTM(4, 5, num_layers=2, bidirectional=True, detach_prob=1.0, backend=backend)
    twin = LSTM(4, 5, num_layers=2, bidirectional=True, backend="reference")
    twin.load_state_dict(lstm.state_dict())
    compiled = torch.compile(lstm, fullgraph=True)

    def check(length: int) -> None:
        x = random(length, 3, 4, seed=length, dtype=torch.float32)
        found, _ = compiled(x)
        expected, _ = twin(x, detach_mask=torch.ones(length, dtype=torch.bool))
        assert_close(found, expected)
        gradients = torch.autograd.grad(found.square().sum(), list(lstm.parameters()))
        wanted = torch.autograd.grad(expected.square().sum(), list(twin.parameters()))
        for gradient, other in zip(gradients, wanted, strict=True):
            assert_close(gradient, other)

    check(5)
    check(7)  # from here on the length is symbolic
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (4, 9, 20, 150):
            check(length)


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


def test_a_changed_backend_context_is_not_served_by_the_old_graph() -> None:
    recorder = Recorder()
    lstm = LSTM(4, 5)
    compiled = torch.compile(lstm, fullgraph=True, backend=recorder)
    x = torch.randn(3, 2, 4)
    compiled(x)
    with throughtime.backend("reference"):
        compiled(x)
        assert recorder.frame_count == 2
        assert not any("throughtime" in target for target in recorder.targets)
    compiled(x)
    assert recorder.frame_count == 2
    with pytest.raises(RuntimeError), throughtime.backend("cuda"):
        compiled(x)


def test_another_thread_has_its_own_context_in_compiled_code() -> None:
    recorder = Recorder()
    compiled = torch.compile(LSTM(4, 5), fullgraph=True, backend=recorder)
    x = torch.randn(3, 2, 4)
    counts = []

    def other() -> None:
        compiled(x)
        counts.append(recorder.frame_count)

    compiled(x)
    with throughtime.backend("reference"):
        compiled(x)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    # Served by the first graph: the second one is for threads inside the context.
    assert counts == [2] and recorder.frame_count == 2


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


@pytest.mark.parametrize("strict", [True, False])
def test_export(backend: str, strict: bool) -> None:
    lstm = LSTM(4, 5, num_layers=2, backend=backend).eval()
    x = torch.randn(6, 3, 4)
    dynamic = (
        None if backend == "reference" else {0: torch.export.Dim("T", min=2), 1: None, 2: None}
    )
    program = torch.export.export(lstm, (x,), dynamic_shapes=(dynamic,), strict=strict)
    assert_close(program.module()(x)[0], lstm(x)[0])
    if dynamic is not None:
        longer = torch.randn(11, 3, 4)
        assert_close(program.module()(longer)[0], lstm(longer)[0])
        graphs = [part.graph for part in program.graph_module.modules()]
        nodes = [node.target for graph in graphs for node in graph.nodes]
        assert nodes.count(torch.ops.throughtime.lstm_forward.default) == 2


def test_a_model_around_it_compiles(backend: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = LSTM(4, 5, batch_first=True, detach_prob=0.5, backend=backend)
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    model = Model()
    x = torch.randn(3, 6, 4)
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


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
