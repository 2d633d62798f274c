"""``throughtime.replace`` and ``restore``."""

from __future__ import annotations

import abc
import copy
import pickle
import types
from typing import Any

import pytest
import torch
from torch import nn

from cases import random
from closeness import assert_close
from throughtime import LSTM, LSTMCell, replace, restore


class Tagger(nn.Module):
    """An encoder used twice, a decoder, and layers of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(4, 5, num_layers=2, bidirectional=True, dropout=0.1)
        self.decoders = nn.ModuleList([nn.LSTM(10, 3, batch_first=True), nn.GRU(3, 2)])
        self.again = self.encoder
        self.outside = [self.encoder]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, _ = self.decoders[0](self.encoder(x)[0])
        return output


def test_replaces_every_layer_in_place_with_its_weights() -> None:
    model = Tagger().eval()
    x = random(6, 3, 4, seed=1, dtype=torch.float32)
    expected, names = model(x), list(model.state_dict())
    encoder, weights = model.encoder, [id(x) for x in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = replace(model, detach_prob=0.25, detach_shared=True)
    assert report.replaced == ("encoder", "decoders.0") and report.skipped == {}
    assert type(model.encoder) is LSTM and type(model.decoders[1]) is nn.GRU
    assert model.again is model.encoder is model.outside[0] is encoder
    assert model.encoder.detach_prob == 0.25 and model.encoder.detach_shared
    assert [id(x) for x in model.parameters()] == weights and list(model.state_dict()) == names
    assert not model.encoder.training
    assert_close(model(x), expected)
    before = model.encoder.weight_hh_l0.detach().clone()
    model(x).sum().backward()
    optimizer.step()
    assert (model.encoder.weight_hh_l0 - before).abs().max() > 1e-6


def test_a_cell_is_skipped_and_ours_takes_its_weights() -> None:
    model = nn.Sequential(nn.LSTMCell(4, 5), nn.LSTM(4, 5), LSTMCell(4, 5))
    way_out = "put a throughtime.LSTMCell there, which takes its state_dict"
    with pytest.warns(
        RuntimeWarning, match=f"replace: skipped '0': it is an nn.LSTMCell; {way_out}"
    ):
        report = replace(model)
    assert report.replaced == ("1",) and list(report.skipped) == ["0"]
    assert restore(model).skipped == {}
    x = random(3, 4, seed=1, dtype=torch.float32)
    model[2].load_state_dict(model[0].state_dict())
    assert_close(model[2](x)[0], model[0](x)[0])


def test_the_report_reads_well() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(2, 3), "b": LSTM(2, 3)})
    assert str(replace(model)) == (
        "replaced 1, skipped 1\n  replaced 'a'\n  skipped 'b': it is a throughtime.LSTM already"
    )
    assert str(replace(nn.Linear(2, 3))) == "replaced 0, skipped 0"


def test_a_model_that_is_an_lstm_itself() -> None:
    model = nn.LSTM(2, 3)
    report = replace(model, detach_prob=0.5)
    assert type(model) is LSTM and model.detach_prob == 0.5 and report.replaced == ("",)
    assert "replaced (the model itself)" in str(report)


def test_a_replaced_layer_is_a_full_one() -> None:
    model = nn.Sequential(nn.LSTM(2, 3))
    replace(model, detach_prob=0.5)
    copied = copy.deepcopy(model)[0]
    assert type(copied) is LSTM and copied.detach_prob == 0.5
    assert repr(copied) == "LSTM(2, 3, detach_prob=0.5)"
    assert copied.double().weight_hh_l0.dtype == torch.float64


def test_hooks_stay_and_can_be_removed() -> None:
    model = nn.LSTM(2, 3)
    calls = []
    handle = model.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    replace(model)
    model(torch.zeros(1, 1, 2))
    assert calls == [LSTM]
    handle.remove()
    model(torch.zeros(1, 1, 2))
    assert calls == [LSTM]


class Own(nn.LSTM):
    """A subclass whose forward is nn.LSTM's, with a method and an initialisation of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = 2.0

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        output, _ = self(x)
        return output * self.scale


class OwnForward(nn.LSTM):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        output, _ = super().forward(x)
        return output


class OwnCheck(nn.LSTM):
    def check_input(self, *args: object) -> None:
        pass


class Abstract(abc.ABC, nn.RNNBase):
    @abc.abstractmethod
    def named(self) -> str: ...


class Concrete(Abstract, nn.LSTM):
    def named(self) -> str:
        return "concrete"


def test_skips_what_may_compute_something_else_and_warns() -> None:
    model = nn.ModuleDict(
        {"own": OwnForward(2, 3), "check": OwnCheck(2, 3), "norm": nn.LSTM(2, 3),
         "patched": nn.LSTM(2, 3), "ours": LSTM(2, 3)}
    )  # fmt: skip
    nn.utils.parametrizations.weight_norm(model["norm"], "weight_hh_l0")
    model["patched"].forward = types.MethodType(nn.LSTM.forward, model["patched"])
    classes = {name: type(layer) for name, layer in model.items()}
    with pytest.warns(RuntimeWarning, match="replace: skipped") as told:
        report = replace(model)
    assert report.replaced == ()
    assert "its class OwnForward has forward of its own" in report.skipped["own"]
    assert "its class OwnCheck has check_input of its own" in report.skipped["check"]
    assert "it has parametrizations; replace first" in report.skipped["norm"]
    assert "its forward was replaced on the object" in report.skipped["patched"]
    assert len(told) == 4 and all(warning.filename == __file__ for warning in told)
    assert {name: type(layer) for name, layer in model.items()} == classes


@pytest.mark.parametrize("kind", [Own, Concrete])
def test_a_subclass_with_nn_lstms_forward_keeps_its_methods(kind: Any) -> None:
    model = nn.ModuleDict({"rnn": kind(2, 3)})
    x, layer = random(4, 2, 2, seed=1, dtype=torch.float32), model["rnn"]
    expected = layer(x)[0]
    report = replace(model, detach_prob=0.5)
    assert model["rnn"] is layer and isinstance(layer, LSTM) and isinstance(layer, kind)
    name = kind.__name__
    assert str(report) == (
        "replaced 1, skipped 0\n"
        f"  replaced 'rnn': its class has both, {name} and throughtime.LSTM, as bases"
    )
    assert repr(layer) == f"{name}(2, 3, detach_prob=0.5)"
    assert layer.scaled(x).shape == (4, 2, 3) if kind is Own else layer.named() == "concrete"
    assert_close(layer.eval()(x)[0], expected)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied["rnn"]) is type(layer) and copied["rnn"].detach_prob == 0.5
        assert torch.equal(copied["rnn"].eval()(x)[0], layer(x)[0])
    assert str(restore(model)) == (
        f"restored 1, skipped 0\n  restored 'rnn': its class is {name} again"
    )
    assert type(layer) is kind
    assert torch.equal(layer(x)[0], expected)


def test_restore_is_the_inverse() -> None:
    model = Tagger().eval()
    x = random(6, 3, 4, seed=1, dtype=torch.float32)
    expected, weights = model(x), [id(x) for x in model.parameters()]
    before = {name: dict(vars(layer)) for name, layer in model.named_modules()}
    replace(model, detach_prob=0.25, backend="reference")
    model.encoder.recompute = True
    report = restore(model)
    assert report.replaced == ("encoder", "decoders.0") and not report.skipped
    assert str(report).splitlines()[0] == "restored 2, skipped 0"
    assert type(model.encoder) is nn.LSTM and model.again is model.encoder
    assert torch.equal(model(x), expected) and [id(x) for x in model.parameters()] == weights
    for name, layer in model.named_modules():
        assert vars(layer).keys() == before[name].keys()
    assert restore(model).replaced == ()
    replace(model)
    assert_close(model(x), expected)


def test_restore_converts_what_was_made_as_ours_and_skips_its_subclasses() -> None:
    class Mine(LSTM):
        pass

    model = nn.ModuleDict({"ours": LSTM(2, 3, detach_prob=0.5), "mine": Mine(2, 3)})
    x = random(4, 2, 2, seed=1, dtype=torch.float32)
    expected = model["ours"].eval()(x)[0]
    with pytest.warns(
        RuntimeWarning, match="restore: skipped 'mine': its class Mine is a subclass"
    ):
        report = restore(model)
    assert report.replaced == ("ours",) and type(model["mine"]) is Mine
    assert type(model["ours"]) is nn.LSTM
    assert_close(model["ours"](x)[0], expected)
    moved = model["ours"].double()
    assert moved(x.double())[0].dtype == torch.float64  # the list that nn.LSTM reads follows


def test_a_program_that_replaces_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    torchs = nn.LSTM
    plain = nn.Sequential(nn.LSTM(3, 4))
    monkeypatch.setattr(torch.nn, "LSTM", LSTM)
    assert type(LSTM(3, 4).to_torch()) is torchs
    assert type(LSTM.from_torch(plain[0])) is LSTM
    assert replace(plain).replaced == ("0",) and restore(plain).replaced == ("0",)
    assert type(plain[0]) is torchs


def test_nothing_changes_if_the_backend_cannot_run_one_of_them() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(2, 3), "b": nn.LSTM(2, 3, proj_size=1)})
    with pytest.raises(
        RuntimeError, match=r"replace: backend='cuda' cannot run '[ab]': .*no layer was"
    ):
        replace(model, backend="cuda")
    assert type(model["a"]) is type(model["b"]) is nn.LSTM
    replace(model, backend="reference")
    assert model["b"].backend == "reference"
