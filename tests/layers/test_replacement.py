"""``throughtime.replace``."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn

from cases import random
from closeness import assert_close
from throughtime import LSTM, replace


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


def test_the_report_reads_well() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(2, 3), "b": LSTM(2, 3)})
    assert str(replace(model)) == (
        "replaced 1, skipped 1\n  replaced a\n  skipped b: it is a throughtime.LSTM already"
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


def test_skips_what_may_compute_something_else() -> None:
    class Own(nn.LSTM):
        pass

    model = nn.ModuleDict({"own": Own(2, 3), "norm": nn.LSTM(2, 3), "patched": nn.LSTM(2, 3)})
    nn.utils.parametrizations.weight_norm(model["norm"], "weight_hh_l0")
    model["patched"].forward = types.MethodType(nn.LSTM.forward, model["patched"])
    classes = {name: type(layer) for name, layer in model.items()}
    report = replace(model)
    assert report.replaced == ()
    assert "its class Own may have a forward of its own" in report.skipped["own"]
    assert "it has parametrizations; replace first" in report.skipped["norm"]
    assert "its forward was replaced on the object" in report.skipped["patched"]
    assert {name: type(layer) for name, layer in model.items()} == classes


def test_nothing_changes_if_the_backend_cannot_run_one_of_them() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(2, 3), "b": nn.LSTM(2, 3, proj_size=1)})
    with pytest.raises(
        RuntimeError, match=r"replace: backend='cuda' cannot run [ab]: .*no layer was"
    ):
        replace(model, backend="cuda")
    assert type(model["a"]) is type(model["b"]) is nn.LSTM
    replace(model, backend="reference")
    assert model["b"].backend == "reference"
