"""``gradient_flow`` of a RelevancyAttention: against autograd over a loop by hand, in float64."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import throughtime
from by_hand import ByHand, additive
from cases import random
from closeness import assert_close
from throughtime import LSTM, RelevancyAttention, RelevancyCache
from throughtime.diagnostics import GradientFlow, recording

T, B, E, HEADS = 9, 3, 6, 2
D = E // HEADS
X = random(B, T, E, seed=1)
LENGTHS = torch.tensor([5, 9, 1])
W = random(B, T, E, seed=2)


def layer_of(backend: Any, **options: Any) -> RelevancyAttention:
    torch.manual_seed(1)
    sizes = {"num_heads": HEADS, "window_size": 2, "top_k": 2} | options
    return RelevancyAttention(E, **sizes, backend=backend).double()


def recorded(layer: RelevancyAttention, stride: int = 1, **given: Any) -> GradientFlow:
    with throughtime.gradient_flow(layer, stride=stride) as flow:
        (layer(X, **given) * W).sum().backward()
    return flow


@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_every_query_key_and_value(backend: str, score: Any, lengths: Tensor | None) -> None:
    layer = layer_of(backend, score=score)
    found = recorded(layer, lengths=lengths).keys()
    projected = torch.nn.functional.linear(X, layer.in_proj_weight, layer.in_proj_bias)
    rows = projected.view(B, T, 3, HEADS, D).permute(2, 0, 3, 1, 4)
    q, k, v = (x.detach().requires_grad_() for x in rows.unbind(0))
    output = torch.zeros(B, HEADS, T, D, dtype=torch.float64)
    by_distance, queries = torch.zeros(T, dtype=torch.float64), 0
    for b in range(B):
        length = T if lengths is None else int(lengths[b])
        for n in range(HEADS):
            weight = layer.score_weight
            by = (
                (lambda query, key: query @ key / math.sqrt(D))
                if weight is None
                else additive(weight[n])
            )
            hand, last, outputs = ByHand(2, 2, "relevant"), {}, []
            for t in range(length):
                attended = [*hand.retained, *range(max(0, t - 1), t + 1)]
                alpha = torch.stack([by(q[b, n, t], k[b, n, j]) for j in attended]).softmax(0)
                last |= dict.fromkeys(attended, t)
                assert found.kappa[b, n, t] == len(attended)
                entropy = -(alpha * alpha.log()).sum()
                assert_close(found.effective[b, n, t], entropy.exp().detach())
                by_distance[[t - j for j in attended]] += alpha.detach()
                outputs.append(hand.attend(q[b, n, t], k[b, n, : t + 1], v[b, n], by))
            queries += length
            assert found.last[b, n].tolist() == [last.get(j, -1) for j in range(T)]
            assert found.effective[b, n, length:].isnan().all()
            assert not found.kappa[b, n, length:].any()
            output[b, n, :length] = torch.stack(outputs)
    assert_close(found.by_distance, by_distance / queries)
    assert_close(found.by_distance.sum(), torch.tensor(1.0, dtype=torch.float64))
    result = torch.nn.functional.linear(
        output.transpose(1, 2).flatten(2), layer.out_proj.weight, layer.out_proj.bias
    )
    wanted = torch.autograd.grad((result * W).sum(), (q, k, v))
    for name, x in zip(("query", "key", "value"), wanted, strict=True):
        assert_close(getattr(found, name), x, name)


def test_a_later_call_of_a_cache_is_a_call_of_its_own(backend: str) -> None:
    layer, cache = layer_of(backend), RelevancyCache()
    with throughtime.gradient_flow(layer) as flow:
        first, second = (layer(x, cache=cache) for x in (X[:, :5], X[:, 5:]))
        ((first * W[:, :5]).sum() + (second * W[:, 5:]).sum()).backward()
    whole = recorded(layer).keys()
    one, two = (flow.keys(call=k) for k in (0, 1))
    for name in ("query", "kappa", "effective"):
        both = torch.cat([getattr(one, name), getattr(two, name)], 2)
        assert_close(both.double(), getattr(whole, name).double(), name)
    assert_close(two.key, whole.key[:, :, 5:], "no later call attends them")
    assert (one.key - whole.key[:, :, :5]).abs().max() > 1e-3
    assert torch.equal(two.last + 5, whole.last[:, :, 5:])
    assert 0.1 < two.by_distance.sum() < 1


@pytest.mark.parametrize("stride", [1, 4, sys.maxsize])
def test_the_table(backend: str, stride: int, tmp_path: Path) -> None:
    layer = layer_of(backend)
    flow, whole = recorded(layer, stride, lengths=LENGTHS), recorded(layer, lengths=LENGTHS).keys()
    assert flow.layers == ["attention"] and flow.updates == 1
    rows = flow.table()
    assert [row["step"] for row in rows] == list(range(T))[(T - 1) % stride :: stride]
    inside = torch.arange(T) < LENGTHS.unsqueeze(1)
    for row in rows:
        t = int(row["step"])
        samples = inside[:, t]
        for name in ("query", "key", "value"):
            norms = getattr(whole, name)[samples][:, :, t].flatten(1).norm(dim=1)
            assert row[name] == pytest.approx(norms.quantile(0.5).item(), rel=1e-12)
            assert row[f"{name}_90"] == pytest.approx(norms.quantile(0.9).item(), rel=1e-12)
        for name in ("kappa", "effective"):
            means = getattr(whole, name)[samples][:, :, t].double().mean(1)
            assert row[name] == pytest.approx(means.quantile(0.5).item(), rel=1e-12)
    flow.to_csv(tmp_path / "flow.csv")
    assert (tmp_path / "flow.csv").read_text().startswith("layer,call,direction,step,query,")
    pytest.importorskip("matplotlib")
    flow.plot(tmp_path / "flow.svg", others={"again": flow})
    text = (tmp_path / "flow.svg").read_text()
    assert "step that attends" in text and text.count('<g id="axes_') == 3


def test_beside_an_lstm(backend: str) -> None:
    lstm = LSTM(E, E, batch_first=True, backend=backend).double()
    net = torch.nn.ModuleList([lstm, layer_of(backend)])
    with throughtime.gradient_flow(net) as flow:
        for _ in range(2):
            net[1](net[0](X)[0]).sum().backward()
    assert flow.layers == ["0.l0", "1"] and flow.updates == 2
    assert [row["layer"] for row in flow.horizon()] == ["0.l0"]
    assert [row["layer"] for row in flow.parameters()] == ["0.l0"]
    assert str(flow).startswith("0.l0, direction 0: the h path")
    assert {row["layer"] for row in flow.table()} == {"0.l0", "1"}
    with pytest.raises(ValueError, match=r"keys: call 0 of layer '0.l0', .* is not one of a Relev"):
        flow.keys()
    with pytest.raises(
        ValueError, match=r"attention: call 0 of layer '1', .* is not one of a RelL"
    ):
        flow.attention(1)


def test_what_takes_a_recurrence_names_the_way_out(backend: str) -> None:
    flow = recorded(layer_of(backend))
    words = r": call 0 of layer 'attention', .* has no recurrence in time; take flow.keys\(\) or"
    asks = {
        "horizon": flow.horizon, "parameters": flow.parameters, "gradients": flow.gradients,
        "hops": lambda: flow.hops(2),
    }  # fmt: skip
    for name, ask in asks.items():
        with pytest.raises(ValueError, match=name + words):
            ask()
    assert str(flow).startswith("a query attends 3.") and "one hop to each" in str(flow)


def test_gradients_keep_their_bits_and_a_second_backward_is_refused(backend: str) -> None:
    layer = layer_of(backend)
    (layer(X) * W).sum().backward()
    plain = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with throughtime.gradient_flow(layer) as flow:
        loss = (layer(X) * W).sum()
        loss.backward(retain_graph=True)
        first = flow.keys()
        with pytest.raises(RuntimeError, match="second backward pass through call 0 of layer 'att"):
            loss.backward()
    assert torch.equal(flow.keys().key, first.key)
    layer.zero_grad()
    with throughtime.gradient_flow(layer):
        (layer(X) * W).sum().backward()
    assert all(torch.equal(p.grad, x) for p, x in zip(layer.parameters(), plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_and_autocast(backend: str, dtype: torch.dtype) -> None:
    layer, flows = layer_of(backend, top_k=40).float(), []
    for kind in ("exact", "autocast", "narrow"):
        x = X.float()
        if kind == "narrow":
            layer, x = layer.to(dtype), x.to(dtype)
        with (
            throughtime.gradient_flow(layer) as flow,
            torch.autocast("cpu", dtype, enabled=kind == "autocast"),
        ):
            layer(x).float().square().sum().backward()
        flows.append(flow.keys())
    for found in flows[1:]:
        for x, y in zip(found[:3], flows[0][:3], strict=True):
            assert x.dtype == torch.float32
            assert (x - y).norm() <= 0.05 * y.norm()


def test_gradients_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(recording, "_free_memory", lambda: 1000)
    for of_keys, numbers in ((2, "3,888"), (1, "2,592")):
        layer = layer_of(backend, num_key_value_heads=of_keys)
        words = (
            f"'attention' takes {numbers} bytes for 9 steps of 3 samples, and 1,000 are free; keep"
        )
        with throughtime.gradient_flow(layer), pytest.raises(RuntimeError, match=words):
            layer(X)


@pytest.mark.parametrize(("heads", "of_keys"), [(2, 1), (6, 2)])
def test_heads_of_queries_that_share_keys(backend: str, heads: int, of_keys: int) -> None:
    """The same as heads of their own with equal keys, whose gradients add up."""
    sizes, group = {"num_heads": heads, "window_size": T}, heads // of_keys
    shared = layer_of(backend, num_key_value_heads=of_keys, **sizes)
    apart = layer_of(backend, **sizes)
    with torch.no_grad():
        size = E // heads
        query, *others = shared.in_proj_weight.split([E, of_keys * size, of_keys * size])
        others = [x.unflatten(0, (of_keys, size)).repeat_interleave(group, 0) for x in others]
        apart.in_proj_weight.copy_(torch.cat([query, *(x.flatten(0, 1) for x in others)]))
        apart.out_proj.weight.copy_(shared.out_proj.weight)
    one, all_ = recorded(shared), recorded(apart)
    found, wanted = one.keys(), all_.keys()
    for name in ("query", "effective", "by_distance"):
        assert_close(getattr(found, name), getattr(wanted, name), name)
    for name in ("key", "value"):
        each = getattr(wanted, name).unflatten(1, (of_keys, group))
        assert_close(getattr(found, name), each.sum(2), name)
    assert torch.equal(found.kappa, wanted.kappa)
    assert torch.equal(found.last, wanted.last[:, ::group])
    assert [row["query"] for row in one.table()] == pytest.approx(
        [row["query"] for row in all_.table()]
    )


def test_shared_keys_are_screened_for_all_their_queries(backend: str) -> None:
    layer = layer_of(backend, num_key_value_heads=1)
    found = recorded(layer).keys()
    assert found.last.shape == (B, 1, T) and found.kappa.shape == (B, HEADS, T)
    held = torch.arange(T).unsqueeze(1) >= torch.arange(T)  # query, key
    held = held & (found.last.unsqueeze(2) >= torch.arange(T).unsqueeze(1))
    assert torch.equal(found.kappa, held.sum(3).expand(B, HEADS, T))
    assert found.last[..., 0].max() > 1  # something was retained


def test_a_call_without_steps_is_none(backend: str) -> None:
    layer = layer_of(backend)
    with throughtime.gradient_flow(layer) as flow:
        layer(X[:, :0]).sum().backward()
        assert flow.updates == 0
        with pytest.raises(RuntimeError, match="no backward pass reached a recorded layer"):
            flow.table()
        layer(X).sum().backward()
    assert len(flow.table()) == T
