"""Plain torch beside ``accelerate`` and ``replace``: the rows of python/docs/compatibility.rst.

Every test runs what a user runs, with ``nn.LSTM`` as it is, accelerated, or replaced.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.ao.quantization import quantize_dynamic
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune

from closeness import assert_close
from throughtime import LSTM, accelerate, replace, restore

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own


class Model(nn.Module):
    """An LSTM, and a head on its outputs."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn = nn.LSTM(3, 4, **options)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.rnn(x)[0])
        return output


X = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
OURS = "cpu kernels"


def kinds(calls: Counter[str]) -> set[str]:
    """Ours or the original, whatever the reason."""
    return {key.partition(":")[0] for key in calls}


def nodes(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.fixture
def model() -> Model:
    return Model()


def test_the_page_has_a_row_per_test(pytestconfig: pytest.Config) -> None:
    page = (pytestconfig.rootpath / "python" / "docs" / "torch.csv").read_text(encoding="utf-8")
    named = {row["test"] for row in csv.DictReader(io.StringIO(page))}
    here = Path(__file__)
    tests = here.read_text() + here.with_name("test_distributed.py").read_text()
    names = {*re.findall(r"^def (test_\w+)", tests, re.MULTILINE)}
    assert names == named | {"test_the_page_has_a_row_per_test"}


def test_compile_breaks_at_the_layer_and_ours_runs(model: Model) -> None:
    def frames() -> int:
        """What Dynamo has looked at since the last call."""
        count = torch._dynamo.utils.counters["frames"]["total"]
        torch._dynamo.utils.counters.clear()
        torch._dynamo.reset()
        return count

    frames()
    expected = torch.autograd.grad(
        torch.compile(model, backend="aot_eager")(X).sum(), model.rnn.weight_hh_l0
    )[0]
    plain = frames()
    with accelerate() as handle:
        compiled = torch.compile(model, backend="aot_eager")
        found = torch.autograd.grad(compiled(X).sum(), model.rnn.weight_hh_l0)[0]
        assert kinds(handle.calls) == {OURS}
        assert frames() == plain
    assert_close(found, expected)
    replace(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(torch.autograd.grad(compiled(X).sum(), model.rnn.weight_hh_l0)[0], expected)


def test_a_compiled_graph_that_holds_the_layer_is_the_originals(model: Model) -> None:
    """With ``allow_rnn`` on and off give one graph, so that torch's caches may mix them."""
    expected, graphs = model(X), []

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph: Any, inputs: Any) -> Any:
            graphs.append(nodes(graph))
            return graph

        return aot_autograd(fw_compiler=keep, inference_compiler=keep)(graph, inputs)

    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        plain = torch.compile(model, backend=backend, fullgraph=True)(X)
        torch._dynamo.reset()
        with accelerate() as handle:
            found = torch.compile(model, backend=backend, fullgraph=True)(X)
    assert kinds(handle.calls) <= {"original"}
    assert len(graphs) == 2 and graphs[0] == graphs[1]
    assert torch.equal(found, plain)
    assert_close(plain, expected)


def test_compiled_autograd(model: Model) -> None:
    def gradient() -> Tensor:
        with compiled_autograd._enable(torch.compile(backend="aot_eager")):
            return torch.autograd.grad(model(X).square().sum(), model.rnn.weight_hh_l0)[0]

    expected = gradient()
    with accelerate() as handle:
        assert_close(gradient(), expected)
    assert kinds(handle.calls) == {OURS}
    replace(model)
    assert_close(gradient(), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_has_the_originals_node_and_runs_on_ours(model: Model, strict: bool) -> None:
    plain = torch.export.export(model, (X,), strict=strict)
    with accelerate() as handle:
        program = torch.export.export(model, (X,), strict=strict)
        assert kinds(handle.calls) == {"original"}
        found = program.module()(X)
        assert OURS in handle.calls
    assert nodes(program) == nodes(plain) and "aten.lstm.input" in nodes(program)
    assert_close(found, model(X))
    with accelerate():
        assert nodes(program.run_decompositions()) == nodes(plain.run_decompositions())
    replace(model)
    program = torch.export.export(model, (X,), strict=strict)
    assert nodes(program).count("throughtime.lstm_forward.default") == 1
    assert_close(program.module()(X), found)


def test_jit_trace_records_the_operator(model: Model) -> None:
    with accelerate() as handle:
        traced = torch.jit.trace(model, (X,))
        before = handle.calls[OURS]
        found = traced(torch.cat([X, X]))  # of another length
        assert handle.calls[OURS] == before + 1 and kinds(handle.calls) == {OURS}
    assert "aten::lstm" in str(traced.inlined_graph)
    assert_close(found, model(torch.cat([X, X])))
    replace(model.eval())
    assert_close(torch.jit.trace(model, (X,))(torch.cat([X, X])), found)


def test_jit_script_calls_the_operator(model: Model) -> None:
    scripted = torch.jit.script(model)
    with accelerate() as handle:
        found = scripted(X)
        assert kinds(handle.calls) == {OURS}
        saved = io.BytesIO()
        torch.jit.save(torch.jit.freeze(torch.jit.script(model.eval())), saved)
        saved.seek(0)
        again = torch.jit.load(saved)(X)
    assert_close(found, model(X))
    assert_close(again, model(X))
    replace(model)
    with pytest.raises(ValueError, match="Unknown type annotation"):
        torch.jit.script(model)


def test_fx_keeps_the_layer_as_a_leaf(model: Model) -> None:
    traced = torch.fx.symbolic_trace(model)
    assert "call_module" in {node.op for node in traced.graph.nodes}
    with accelerate() as handle:
        assert_close(traced(X), model(X))
        assert kinds(handle.calls) == {OURS}
        assert nodes(make_fx(model)(X)) and "original" in kinds(handle.calls)
    replace(model)
    with pytest.raises(TypeError, match="got Proxy"):
        torch.fx.symbolic_trace(model)
    assert "throughtime.lstm_forward.default" in nodes(make_fx(model)(X))


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(model: Model, dynamo: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with accelerate():
        torch.onnx.export(model.eval(), (X,), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    assert_close(torch.from_numpy(found), model(X), "ONNX")
    replace(model)
    with pytest.raises((RuntimeError, torch.onnx.errors.OnnxExporterError)):
        torch.onnx.export(model, (X,), tmp_path / "ours.onnx", dynamo=dynamo, verbose=False)
    restore(model)
    torch.onnx.export(model, (X,), tmp_path / "again.onnx", dynamo=dynamo, verbose=False)


@pytest.mark.parametrize("on", [False, True])
def test_quantize_dynamic(model: Model, on: bool) -> None:
    expected = quantize_dynamic(model, {nn.LSTM, nn.Linear})(X)
    if on:
        with accelerate() as handle:
            quantized = quantize_dynamic(model, {nn.LSTM, nn.Linear})
            assert "quantized" in type(quantized.rnn).__module__
            assert torch.equal(quantized(X), expected)
        assert not handle.calls  # it is another operator
    else:
        replace(model)
        assert type(quantize_dynamic(model, {nn.LSTM, nn.Linear}).rnn) is LSTM  # still in float
        restore(model)
        assert torch.equal(quantize_dynamic(model, {nn.LSTM, nn.Linear})(X), expected)


def test_func_transforms_go_to_the_original(model: Model) -> None:
    weights = {name: x.detach() for name, x in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, weights, (x,)).square().sum()

    samples = torch.stack([X, X + 1])
    results = {
        "grad": lambda: grad(loss)(weights, X),
        "vmap of grad": lambda: vmap(grad(loss), (None, 0))(weights, samples),
        "functional_call": lambda: {"loss": loss(weights, X)},
    }
    for name, run in results.items():
        expected = run()
        with accelerate() as handle:
            found = run()
        assert kinds(handle.calls) == {OURS if name == "functional_call" else "original"}
        for key, x in found.items():
            assert_close(x, expected[key])
        replace(model)
        for key, x in run().items():
            assert_close(x, expected[key])
        restore(model)


def test_forward_mode_goes_to_the_original() -> None:
    lstm = nn.LSTM(3, 4, dtype=torch.float64)  # in float32 oneDNN's has no forward mode
    run = lambda: jvp(lambda x: lstm(x)[0], (X.double(),), (X.double(),))[1]  # noqa: E731
    expected = run()
    with accelerate() as handle:
        found = run()
    assert kinds(handle.calls) == {"original"} and torch.equal(found, expected)
    replace(lstm)
    assert_close(run(), expected)


def test_a_dual_level_goes_to_the_original() -> None:
    lstm = nn.LSTM(3, 4, dtype=torch.float64)

    def run() -> Tensor:
        with forward_ad.dual_level():
            output, _ = lstm(forward_ad.make_dual(X.double(), torch.ones_like(X).double()))
            return forward_ad.unpack_dual(output).tangent

    expected = run()
    with accelerate() as handle:
        found = run()
    assert handle.calls == {"original: forward-mode differentiation": 1}
    assert torch.equal(found, expected)


def test_dispatch_modes_and_subclasses_go_to_the_original(model: Model) -> None:
    from torch._subclasses import FakeTensorMode
    from torch.testing._internal.two_tensor import TwoTensor
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as plain:
        nn.LSTM(3, 4, dtype=torch.float64)(X.double())
    with accelerate() as handle:
        with FlopCounterMode(display=False) as counter:
            nn.LSTM(3, 4, dtype=torch.float64)(X.double())
        assert counter.get_total_flops() == plain.get_total_flops() > 0
        assert list(handle.calls) == [
            "original: torch traces or transforms it (Python, PythonTLSSnapshot)"
        ]
        with FakeTensorMode():
            assert nn.LSTM(3, 4)(torch.empty(5, 2, 3))[0].shape == (5, 2, 4)
        model(TwoTensor(X, X))
        assert handle.calls.total() == 3 and kinds(handle.calls) == {"original"}
        with torch.device("meta"):
            assert nn.LSTM(3, 4)(torch.empty(5, 2, 3))[0].shape == (5, 2, 4)
    expected = model(X)
    replace(model)
    assert_close(model(TwoTensor(X, X)).a, expected)
    with FakeTensorMode():
        assert LSTM(3, 4)(torch.empty(5, 2, 3))[0].shape == (5, 2, 4)
    with FlopCounterMode(display=False) as counter:
        model.rnn(X)
    assert counter.get_total_flops() == 0


class Tagged(Tensor):
    """A subclass with nothing but ``__torch_function__``, as fastai's."""


def test_subclasses_that_only_add_methods_run_on_ours(model: Model) -> None:
    with accelerate() as handle:
        found = model.rnn(X.as_subclass(Tagged))[0]
    assert kinds(handle.calls) == {OURS} and type(found) is Tagged
    assert_close(found.as_subclass(Tensor), model.rnn(X)[0])
    replace(model)
    assert_close(model.rnn(X.as_subclass(Tagged))[0].as_subclass(Tensor), model.rnn(X)[0])


def test_function_modes_do_not_see_inside(model: Model) -> None:
    seen: list[list[Any]] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen[-1].append(func)
            return func(*args, **kwargs or {})

    scripted = torch.jit.script(model)  # which calls the operator while the mode is on
    for on in (False, True):
        seen.append([])
        with accelerate() if on else nullcontext(), Watch():
            scripted(X)
    assert seen == [[], []]
    expected = model(X)
    replace(model)
    with Watch():
        assert_close(model(X), expected)
    assert torch.ops.throughtime.lstm_forward.default in seen[-1]


REWRITES: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": lambda rnn: nn.utils.weight_norm(rnn, "weight_hh_l0"),
    "spectral_norm": lambda rnn: nn.utils.spectral_norm(rnn, "weight_hh_l0"),
    "pruning": lambda rnn: prune.l1_unstructured(rnn, "weight_hh_l0", 0.5),
    "parametrizations": lambda rnn: nn.utils.parametrizations.weight_norm(rnn, "weight_hh_l0"),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", REWRITES)
def test_what_computes_a_weight_anew(name: str, first: bool) -> None:
    """Two steps of training, and the layer is replaced before or after it is rewritten."""

    def trained(prepare: Callable[[nn.Module], object]) -> list[Tensor]:
        model = Model()
        for step in (prepare, REWRITES[name]) if first else (REWRITES[name], prepare):
            torch.manual_seed(2)
            step(model.rnn)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(2):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
        return [model(X), *model.parameters()]

    expected = trained(lambda rnn: None)
    with accelerate() as handle:
        accelerated = trained(lambda rnn: None)
    assert handle.calls == {OURS: 3}
    reports = []
    replaced = trained(lambda rnn: reports.append(replace(rnn)))
    assert len(reports[0].skipped) == (name == "parametrizations" and not first)
    for found in (accelerated, replaced):
        for x, due in zip(found, expected, strict=True):
            assert_close(x, due)


def test_checkpoint_and_hooks(model: Model) -> None:
    from torch.utils.checkpoint import checkpoint

    expected = torch.autograd.grad(model(X).sum(), model.rnn.weight_hh_l0)[0]
    with accelerate(), torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(), torch.tensor):
        loss = model(X).sum()
    assert_close(torch.autograd.grad(loss, model.rnn.weight_hh_l0)[0], expected)
    with accelerate(detach_prob=0.5):
        torch.manual_seed(4)
        plain = torch.autograd.grad(model(X).sum(), model.rnn.weight_hh_l0)[0]
        torch.manual_seed(4)
        again = checkpoint(model, X, use_reentrant=False).sum()
        assert torch.equal(torch.autograd.grad(again, model.rnn.weight_hh_l0)[0], plain)
    replace(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(), torch.tensor):
        loss = checkpoint(model, X, use_reentrant=False).sum()
    assert_close(torch.autograd.grad(loss, model.rnn.weight_hh_l0)[0], expected)
