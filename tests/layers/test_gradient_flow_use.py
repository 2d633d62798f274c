"""``gradient_flow`` in use: whose calls it records, pictures, verdicts, and bad input."""

from __future__ import annotations

import contextlib
import gc
import re
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import throughtime
from cases import random
from programs import printed
from throughtime import LSTM, RelevancyAttention, RelLSTM, _ext
from throughtime.acceleration import call as calls
from throughtime.diagnostics import recording, verdict
from throughtime.ops import watching

T, B = 6, 3
X = random(T, B, 4, seed=1, dtype=torch.float32)


class Last(nn.Module):
    """A head on the last output."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.rnn(x)[0][-1])
        return found


def model(kind: Any = LSTM, num_layers: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    return Last(kind(4, 5, num_layers, **options))


def weights(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def test_gradients_keep_their_bits_and_nothing_is_watched_afterwards(backend: str) -> None:
    net = model(backend=backend)
    net(X).sum().backward()
    plain = weights(net)
    net.zero_grad()
    with throughtime.gradient_flow(net) as flow:
        net(X).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(weights(net), plain, strict=True))
    assert watching.watcher() is None and not net.rnn._forward_hooks
    before = flow.gradients().dc.clone()
    net(2 * X).sum().backward()
    assert flow.updates == 1 and torch.equal(flow.gradients().dc, before)
    net = model(backend=backend)
    with throughtime.gradient_flow(net) as flow:
        loss = net(X).sum()
    loss.backward()  # the call was made inside
    assert torch.equal(flow.gradients().dc, before)


def test_what_the_model_calls_beside_its_layers_is_not_recorded() -> None:
    net, other = model(), LSTM(4, 5)
    with throughtime.gradient_flow(net) as flow:
        (net(X).sum() + other(X)[0].sum()).backward()
        net.eval()
        with torch.no_grad():
            net(X)
    assert flow.layers == ["rnn.l0"] and len(flow.table()) == T


@pytest.mark.parametrize("accelerated", [False, True])
def test_an_nn_lstm_runs_on_ours(accelerated: bool) -> None:
    net, ours = model(nn.LSTM, 2), model(LSTM, 2)
    ours.load_state_dict(net.state_dict())
    outer = throughtime.accelerate() if accelerated else contextlib.nullcontext()
    with outer as handle:
        with throughtime.gradient_flow(net) as flow:
            net(X).sum().backward()
        assert handle is None or (handle.in_force and handle.calls == {"cpu kernels": 1})
    with throughtime.gradient_flow(ours) as wanted:
        ours(X).sum().backward()
    assert flow.layers == ["rnn.l0", "rnn.l1"]
    assert torch.equal(flow.gradients(1).dc, wanted.gradients(1).dc)


def test_h_detach_of_a_handle_stays_in_force() -> None:
    net = model(nn.LSTM)
    with throughtime.accelerate(detach_prob=1.0), throughtime.gradient_flow(net) as flow:
        net(X).sum().backward()
    found = flow.gradients()
    assert torch.equal(found.dh, found.direct)


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_without_a_gradient_keep_the_names_of_the_others(backend: str, frozen: bool) -> None:
    net = model(LSTM, 2, backend=backend)
    for name, weight in net.rnn.named_parameters():
        weight.requires_grad_(not (frozen and name.endswith("l0")))
    with throughtime.gradient_flow(net) as flow:
        net(X).sum().backward()
    assert flow.layers == (["rnn.l1"] if frozen else ["rnn.l0", "rnn.l1"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_and_autocast(backend: str, dtype: torch.dtype) -> None:
    net = model(backend=backend)
    with throughtime.gradient_flow(net) as exact:
        net(X).sum().backward()
    wanted = exact.gradients()
    with throughtime.gradient_flow(net) as flow, torch.autocast("cpu", dtype):
        net(X).float().sum().backward()
    found = flow.gradients()
    net.to(dtype)
    with throughtime.gradient_flow(net) as narrow:
        net(X.to(dtype)).float().sum().backward()
    for each in (found, narrow.gradients()):
        for x, y in zip(each, wanted, strict=True):
            assert x.dtype == torch.float32
            assert (x - y).norm() <= 0.03 * y.norm()


@pytest.mark.parametrize("kind", [LSTM, RelLSTM])
def test_the_scale_of_a_scaler_is_divided_out(backend: str, kind: Any) -> None:
    net = model(kind, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with throughtime.gradient_flow(net) as plain:
        net(X).sum().backward()
    with throughtime.gradient_flow(net, scaler=scaler) as flow:
        scaler.scale(net(X).sum()).backward()
        scaler.update(1.0)  # the scale of that backward pass counts
    for found, wanted in zip(flow.gradients(), plain.gradients(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert flow.table()[2]["dh"] == pytest.approx(plain.table()[2]["dh"], rel=1e-6)


def test_an_optimizer_may_step_before_the_questions(backend: str) -> None:
    tables = []
    for steps in (False, True):
        net = model(backend=backend)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        with throughtime.gradient_flow(net) as flow:
            net(X).sum().backward()
            if steps:
                optimizer.step()
        tables.append((flow.table(), flow.parameters()))
    assert tables[0] == tables[1]


def test_a_checkpoint_runs_the_layer_again_and_is_recorded_once(backend: str) -> None:
    net = model(backend=backend)
    with throughtime.gradient_flow(net) as plain:
        net(X).sum().backward()
    with throughtime.gradient_flow(net) as flow:
        checkpoint(net, X, use_reentrant=False).sum().backward()
    assert flow.updates == 1 and {row["call"] for row in flow.table()} == {0}
    assert torch.equal(flow.gradients().dc, plain.gradients().dc)


def test_a_checkpoint_below_a_layer_that_was_reached_begins_no_update(backend: str) -> None:
    first, second = (LSTM(4, 4, backend=backend) for _ in range(2))
    with throughtime.gradient_flow(nn.ModuleList([first, second])) as flow:
        hidden = checkpoint(lambda x: first(x)[0], X, use_reentrant=False)
        second(hidden)[0].sum().backward()
    assert flow.updates == 1 and flow.layers == ["0.l0", "1.l0"]


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_and_return_cells(backend: str, recompute: bool) -> None:
    """A loss on c_t counts among what the cells get themselves."""
    lstm = LSTM(4, 5, backend=backend, recompute=recompute).double()
    with throughtime.gradient_flow(lstm) as flow:
        cells = lstm(X.double(), return_cells=True)[2]
        cells.sum().backward()
    found = flow.gradients()
    assert not found.direct.any() and torch.equal(found.dc[-1], torch.ones(B, 5).double())
    assert torch.equal(found.dc_cell[-1], found.dc[-1]) and (found.dc[0] != 1).all()


def trained(scale: float, forget: float) -> LSTM:
    torch.manual_seed(3)
    lstm = LSTM(4, 64)
    lstm.weight_hh_l0.data *= scale
    lstm.bias_ih_l0.data[64:128] += forget
    return lstm


@pytest.mark.parametrize(
    ("scale", "forget", "said"),
    [
        (
            4,
            3,
            r"the h path grows 10\^\d.*, the cell path falls to 10\^-\d.*: try detach_prob 0.25",
        ),
        (
            8,
            0,
            r"the h path grows.*h-detach would leave nothing, as the forget gates keep 0.[4-6]\d",
        ),
        (
            1,
            0,
            r"the h path falls.*as the forget gates keep 0.[4-6]\d .*chrono_\(model, T_max=100\)$",
        ),
        (
            0.1,
            9,
            r"the cell path falls to 10\^-0.*: the gradient arrives, and h-detach",
        ),
    ],
)
def test_the_verdict(scale: float, forget: float, said: str) -> None:
    lstm = trained(scale, forget)
    with throughtime.gradient_flow(lstm) as flow:
        lstm(torch.randn(100, 8, 4))[0][-1].sum().backward()
    assert re.search(said, str(flow)), str(flow)
    assert "over 99 steps" in str(flow) and "short everywhere" not in str(flow)


def test_the_verdict_names_the_layer_and_a_loss_on_every_step() -> None:
    net = nn.ModuleList([trained(4, 3), trained(1, 0)])
    with throughtime.gradient_flow(net) as flow:
        sum(lstm(torch.randn(100, 8, 4))[0].sum() for lstm in net).backward()
    assert flow.verdict().startswith("0.l0, direction 0: the h path grows")
    words = "(the loss, or a layer above, asks of most steps: paths are short everywhere)"
    assert words in flow.verdict()
    with throughtime.gradient_flow(net[0]) as flow:
        net[0](X)[0][0].sum().backward()
    assert flow.verdict().startswith("the loss asks for nothing")


@pytest.mark.parametrize(
    ("wrapped", "name"),
    [
        (lambda rnn: nn.ModuleDict({"rnn": rnn}), "model.rnn"),
        (lambda rnn: nn.Sequential(nn.ModuleDict({"l0": rnn})), "model[0].l0"),
    ],
)
@pytest.mark.parametrize("kind", [LSTM, partial(RelLSTM, window_size=2, top_k=0)])
def test_the_advice_of_the_verdict_runs(kind: Any, wrapped: Any, name: str) -> None:
    torch.manual_seed(0)
    rnn = kind(4, 16)
    net: Any = wrapped(rnn)
    with throughtime.gradient_flow(net) as flow:
        rnn(torch.randn(60, 2, 4))[0][-1].sum().backward()
    (call,) = re.findall(r"throughtime\.init\.chrono_\(.*\)", str(flow))
    assert f"({name}, T_max=60)" in call
    before = rnn.bias_ih_l0.clone()
    eval(call, {"throughtime": throughtime, "model": net})
    assert not torch.equal(rnn.bias_ih_l0, before)


def test_a_cell_path_that_a_reset_cuts() -> None:
    lstm, reset = trained(1, 0), (torch.arange(100) == 50).unsqueeze(1).expand(100, 8)
    with throughtime.gradient_flow(lstm) as flow:
        lstm(torch.randn(100, 8, 4), reset=reset)[0][-1].sum().backward()
    assert "the cell path falls to 0: both vanish, as no way through the cell is left" in str(flow)


def test_a_layer_below_another_is_asked_at_every_step() -> None:
    lstm = LSTM(4, 16, num_layers=2)
    with throughtime.gradient_flow(lstm) as flow:
        lstm(torch.randn(40, 4, 4))[0][-1].sum().backward()
    below, above = (
        verdict.sentence([(call, flow._updates.parts(call))]) for call in flow._updates.calls()
    )
    assert "(the loss, or a layer above, asks" in below and "everywhere" not in above


def test_a_flow_shows_itself() -> None:
    net = model()
    with throughtime.gradient_flow(net) as flow:
        assert repr(flow) == str(flow)
        assert str(flow).startswith("gradient_flow: no backward pass reached a recorded layer")
        net(X).sum().backward()
    assert repr(flow) == str(flow) == flow.verdict()


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net, other = model(), model()
    with throughtime.gradient_flow(net) as flow:
        for _ in range(3):
            net(X).sum().backward()
    with throughtime.gradient_flow(other) as second:
        other(X).sum().backward()
    sizes = []
    for name, flows in {"one": None, "two": {"other": second}}.items():
        path = tmp_path / f"{name}.svg"
        flow.plot(path, others=flows)
        text = path.read_text()
        assert "update" in text and ("other" in text) == (flows is not None)
        assert "<!-- direct -->" in text and "<!-- cell -->" in text  # names of columns
        sizes.append(text.count('<g id="axes_'))
    assert sizes == [3, 4]  # with the bar of colours
    second.plot(tmp_path / "single.png", "rnn.l0")
    attention = RelevancyAttention(4, 2, 2, 2)
    with throughtime.gradient_flow(attention) as third:
        attention(X).sum().backward()
    with pytest.raises(
        ValueError, match=r"others\['it'\] has a layer of another kind there, call 0"
    ):
        flow.plot(tmp_path / "x.svg", others={"it": third})
    with pytest.raises(TypeError, match=r"others\['it'\] should be a GradientFlow, got int"):
        flow.plot(tmp_path / "x.svg", others={"it": 3})  # type: ignore[dict-item]
    assert (tmp_path / "single.png").stat().st_size > 1000


def test_libraries_come_only_where_they_are_used() -> None:
    code = """
import sys, torch, throughtime
lstm = throughtime.LSTM(2, 3)
with throughtime.gradient_flow(lstm) as flow:
    lstm(torch.randn(4, 2, 2))[0].sum().backward()
flow.table(), flow.verdict(), flow.to_csv("/dev/null")
assert not {"matplotlib", "pandas"} & set(sys.modules)
sys.modules["matplotlib"] = None
try:
    flow.plot("picture.png")
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install" in printed(code)


def no_backward(net: nn.Module) -> None:
    net(X)


def loss_elsewhere(net: Any) -> None:
    net(X)
    net.head.weight.sum().backward()


def create_graph(net: nn.Module) -> None:
    torch.autograd.grad(net(X).sum(), list(net.parameters()), create_graph=True)


@pytest.mark.parametrize("run", [no_backward, loss_elsewhere, create_graph])
@pytest.mark.parametrize("kind", [LSTM, nn.LSTM])
def test_a_loss_that_does_not_reach_the_layer(kind: Any, run: Any) -> None:
    net = model(kind)
    with throughtime.gradient_flow(net) as flow:
        run(net)
    asks = (flow.table, flow.gradients, flow.horizon, flow.parameters, flow.verdict)
    for ask in asks:
        with pytest.raises(RuntimeError, match="no backward pass reached a recorded layer"):
            ask()
    if kind is nn.LSTM:
        with pytest.raises(RuntimeError, match=r"nn.LSTM ran so:\naccelerate: .*\n  1 calls, cpu"):
            flow.table()


def test_an_nn_lstm_of_a_slow_dtype_names_the_reason_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = calls.SPEEDS["cpu", torch.float32]._replace(takes=lambda: False, why="of this test")
    monkeypatch.setitem(calls.SPEEDS, ("cpu", torch.float32), slow)
    net = model(nn.LSTM)
    with throughtime.gradient_flow(net) as flow:
        net(X).sum().backward()
    words = (
        r"^gradient_flow: torch ran an nn.LSTM, not ours: torch.float32 on cpu: of this test; thr"
    )
    with pytest.raises(RuntimeError, match=words):
        flow.table()
    assert "; throughtime.replace(model) makes it a throughtime.LSTM" in str(flow)
    throughtime.replace(net)
    with throughtime.gradient_flow(net) as flow:
        net(X).sum().backward()
    assert flow.layers == ["rnn.l0"]


def test_an_nn_lstm_without_compiled_kernels_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_ext, "why_missing", lambda kind="cpu": "the kernels are not installed")
    net = model(nn.LSTM)
    words = (
        "^gradient_flow: our kernels record an nn.LSTM, and accelerate: the kernels are not "
        r"installed; throughtime.replace\(model\) makes it"
    )
    with pytest.raises(RuntimeError, match=words), throughtime.gradient_flow(net):
        pass


def test_an_nn_lstm_that_ours_does_not_run_says_why() -> None:
    net = model(nn.LSTM)
    with throughtime.gradient_flow(net) as flow:
        torch.func.grad(lambda x: net(x).sum())(X)
    with pytest.raises(RuntimeError, match="1 calls, original: torch traces or transforms it"):
        flow.table()


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_a_second_backward_pass_is_refused_and_the_first_is_kept(backend_name: Any) -> None:
    net = model(backend=backend_name)
    with throughtime.gradient_flow(net) as flow:
        loss = net(X).sum()
        loss.backward(retain_graph=True)
        first = flow.gradients()
        with pytest.raises(
            RuntimeError, match=r"second backward pass through call 0 of layer 'rnn"
        ):
            loss.backward()
    assert torch.equal(flow.gradients().dc, first.dc)
    assert torch.equal(flow.gradients().direct, first.direct)


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_a_trace_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, backend_name: Any) -> None:
    net = model(backend=backend_name)
    monkeypatch.setattr(recording, "_free_memory", lambda: 719)
    with (
        throughtime.gradient_flow(net),
        pytest.raises(
            RuntimeError,
            match=r"layer 'rnn.l0' takes 720 bytes for 6 steps of 3 samples, and 719 are",
        ),
    ):
        net(X)
    monkeypatch.setattr(recording, "_free_memory", lambda: 720)
    with throughtime.gradient_flow(net):
        net(X)


def test_free_memory_is_known_here() -> None:
    found = recording._free_memory()
    assert found is not None and 2**20 < found < 2**50


def test_an_input_that_was_changed() -> None:
    net, x = model(), X.clone()
    with throughtime.gradient_flow(net) as flow:
        net(x).sum().backward()
    x.zero_()
    assert flow.horizon()[0]["dc"] > 0  # needs no input
    with pytest.raises(RuntimeError, match=r"the input of call 0 .* was changed in place"):
        flow.table()


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (nn.Linear(2, 3), ValueError, "Linear has no throughtime.LSTM, throughtime.LSTMCell, thr"),
        (nn.LSTMCell(2, 3), ValueError, "take throughtime.LSTMCell for an nn.LSTMCell, whose st"),
        (nn.GRU(2, 3), ValueError, "GRU has no throughtime.LSTM"),
        (3, TypeError, "model should be a Module, got int"),
    ],
)
def test_models_without_a_layer(given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        throughtime.gradient_flow(given)


def test_numbers_out_of_range() -> None:
    net = model()
    with throughtime.gradient_flow(net) as flow:
        net(X).sum().backward()
    with pytest.raises(TypeError, match="scaler should be a GradScaler or None, got float"):
        throughtime.gradient_flow(net, scaler=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fraction should be greater than 0, got 0"):
        flow.horizon(0)
    with pytest.raises(ValueError, match="hops: count should be 0 or more, got -1"):
        flow.hops(-1)
    with pytest.raises(ValueError, match="layer 3, direction 0, call 0; recorded are call 0 of"):
        flow.gradients(3)


def test_a_gpu_backend_names_the_way_out() -> None:
    recorder = recording.Recorder({}, None, 1, lambda x: None)
    call = recording._LayerCall(recorder, "rnn", LSTM(4, 5), None)
    with pytest.raises(RuntimeError, match=r"layer 'rnn' runs on a GPU backend.*move the model"):
        call.kernels(object(), (), ())


@pytest.mark.parametrize("kind", [LSTM, RelLSTM])
def test_an_update_takes_the_memory_of_the_one_before(kind: Any) -> None:
    """It is freed before the kernels of the next forward pass ask for theirs."""
    kernels = _ext.extension
    if kernels is None:
        pytest.skip("the compiled kernels are not in this installation")
    layer, peaks = kind(4, 64), []
    throughtime.empty_cache()
    with throughtime.gradient_flow(layer) as flow:
        for _ in range(3):
            layer(torch.randn(50, 64, 4))[0].sum().backward()
            peaks.append(kernels.cache_statistics()["peak_used_bytes"])
    assert flow.updates == 3 and peaks == peaks[:1] * 3


def test_a_forward_pass_without_a_gradient_keeps_the_update_before(backend: str) -> None:
    net = model(backend=backend)
    with throughtime.gradient_flow(net) as flow:
        net(X).sum().backward()
        with torch.no_grad():
            net(X)
        assert flow.updates == 1 and flow.gradients().dc.any()
        net(X)
    assert flow.updates == 1
    with pytest.raises(RuntimeError, match="no backward pass"):
        flow.gradients()


LAYERS = {
    "LSTM": lambda backend: LSTM(4, 5, backend=backend),
    "RelLSTM": lambda backend: RelLSTM(4, 5, backend=backend),
    "RelevancyAttention": lambda backend: RelevancyAttention(4, 2, 2, 2, backend=backend),
}


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_recording_ends_with_its_flow(backend: str, kind: str, backward: bool) -> None:
    """Hooks hold no graph that holds them."""
    layer, hidden = LAYERS[kind](backend), X * torch.ones(4, requires_grad=True)
    with throughtime.gradient_flow(layer):
        output = layer(hidden)
        output = output if isinstance(output, Tensor) else output[0]
        if backward:
            output.sum().backward()
    gone = weakref.ref(output), weakref.ref(hidden)
    del output, hidden
    gc.collect()
    assert [x() for x in gone] == [None, None]
