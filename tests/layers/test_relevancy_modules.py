"""RelLSTM and RelevancyAttention as modules: conventions of torch.nn, states, errors."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import throughtime
from cases import random
from closeness import assert_close
from throughtime import DetachSchedule, RelevancyAttention, RelevancyCache, RelLSTM, RelState
from throughtime.functional import rel_lstm, relevancy_attention


def small(**options: Any) -> RelLSTM:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"window_size": 2, "top_k": 2, "dtype": torch.float64} | options
    return RelLSTM(3, 4, **sizes)


def test_parameters_have_the_documented_names_order_and_scale() -> None:
    layer = RelLSTM(3, 40, num_layers=2, attention_size=60, window_size=2, top_k=2)
    shapes = {name: tuple(x.shape) for name, x in layer.named_parameters()}
    gates, attention = ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), ("query", "key", "score")
    names = [*gates, *(f"weight_{name}" for name in attention)]
    assert list(shapes) == [f"{name}_l{k}" for k in range(2) for name in names]
    assert shapes["weight_ih_l1"] == (160, 40) and shapes["weight_key_l1"] == (60, 40)
    assert not layer.bias_ih_l0.any() and abs(layer.weight_score_l0.std() - 1) < 0.4
    assert layer.weight_query_l0.std().item() == pytest.approx(2 * (2 / 100) ** 0.5, rel=0.1)
    assert layer.weight_hh_l0.std().item() == pytest.approx((2 / 80) ** 0.5, rel=0.1)
    assert len(list(RelLSTM(3, 4, bias=False).parameters())) == 5


def weights_of(layer: RelLSTM, k: int) -> list[Tensor]:
    return [x for name, x in layer.named_parameters() if name.endswith(f"_l{k}")]


def test_layers_are_stacked(backend: str) -> None:
    layer = small(num_layers=2, backend=backend)
    x = random(9, 2, 3, seed=0)
    output, state = layer(x)
    for k in range(2):
        x, own = rel_lstm(x, None, *weights_of(layer, k), 2, 2)
        assert_close(state.h[k], own.h)
        assert torch.equal(state.position[k], own.position)
    assert_close(output, x)
    assert state.memory.shape == (2, 3, 2, 4) and state.retained == 2


def test_batch_first_and_unbatched() -> None:
    layer, x = small(), random(9, 2, 3, seed=0)
    output, _ = layer(x)
    layer.batch_first = True
    assert torch.equal(layer(x.transpose(0, 1))[0], output.transpose(0, 1))
    single, state = layer(x[:, 1])
    assert_close(single, output[:, 1])
    assert state.h.shape == (1, 1, 4)
    assert layer(x[:, 1], (state.h[:, 0], state.c[:, 0]))[0].shape == (9, 4)


def test_states_continue_and_can_be_detached() -> None:
    layer, x = small(num_layers=2), random(11, 2, 3, seed=0).requires_grad_()
    whole, _ = layer(x)
    first, state = layer(x[:5])
    assert isinstance(state, RelState) and state.length.tolist() == [5, 5]
    second, _ = layer(x[5:], state)
    assert_close(torch.cat([first, second]), whole)
    assert torch.autograd.grad(second.sum(), x)[0][:5].any()
    detached, _ = layer(x[5:], state.detach())
    assert torch.equal(detached, second)
    assert not torch.autograd.grad(detached.sum(), x)[0][:5].any()
    swapped, _ = layer(x[5:].flip(1), state.index_select(torch.tensor([1, 0])))
    assert_close(swapped, second.flip(1))


def test_a_pair_of_states_starts_afresh() -> None:
    layer, x = small(), random(5, 2, 3, seed=0)
    h, c = random(1, 2, 4, seed=1), random(1, 2, 4, seed=2)
    assert not torch.equal(layer(x, (h, c))[0], layer(x)[0])
    zeros = torch.zeros_like(h)
    assert torch.equal(layer(x, (zeros, zeros))[0], layer(x)[0])


def test_masks_are_drawn_in_training_only() -> None:
    layer, x = small(num_layers=2, detach_prob=0.5), random(20, 2, 3, seed=0)
    states = random(2, 2, 4, seed=1).requires_grad_(), random(2, 2, 4, seed=2)

    def gradient(mask: Tensor | None = None, seed: int = 3) -> Tensor:
        torch.manual_seed(seed)
        output, _ = layer(x, states, detach_mask=mask)
        return torch.autograd.grad(output.sum(), layer.weight_hh_l0)[0]

    first = gradient()
    assert torch.equal(gradient(), first) and not torch.equal(gradient(seed=4), first)
    layer.eval()
    plain = gradient()
    assert torch.equal(gradient(seed=4), plain)
    assert not torch.equal(gradient(torch.ones(2, 20, 1, dtype=torch.bool)), plain)
    schedule = DetachSchedule(layer, 4, final_steps=3)
    schedule.step()
    assert layer.detach_prob == 0


def test_dropout_between_layers_only() -> None:
    layer, x = small(num_layers=2, dropout=1.0), random(6, 2, 3, seed=0)
    output, state = layer(x)
    fed = torch.zeros(6, 2, 4, dtype=torch.float64)
    assert_close(output, rel_lstm(fed, None, *weights_of(layer, 1), 2, 2)[0])
    assert state.h[0].any()


def test_text() -> None:
    assert repr(RelLSTM(3, 4)) == "RelLSTM(3, 4, window_size=10, top_k=15)"
    layer = RelLSTM(3, 4, 2, bias=False, window_size=5, top_k=None, cell="tanh", detach_prob=0.5)
    assert repr(layer) == (
        "RelLSTM(3, 4, num_layers=2, bias=False, window_size=5, top_k=None, cell='tanh', "
        "detach_prob=0.5)"
    )
    text = repr(RelevancyAttention(8, 2, 3, 1, score="additive"))
    assert text.startswith("RelevancyAttention(\n  8, 2, 3, 1, score='additive'")
    text = repr(RelevancyAttention(8, 2, 3, 1, screen_every=4, normalize=True))
    assert text.startswith("RelevancyAttention(\n  8, 2, 3, 1, normalize=True, screen_every=4")


@pytest.mark.parametrize("screen_every", [1, 4])
def test_attention_goes_on_from_a_cache(screen_every: int, backend: str) -> None:
    screen_every = 1 if backend == "triton" else screen_every
    layer = RelevancyAttention(
        8, 2, 3, 2, screen_every=screen_every, backend=backend, dtype=torch.float64
    )
    x, cache = random(2, 23, 8, seed=0), RelevancyCache()
    parts = [layer(part, cache=cache) for part in x.split([5, 1, 10, 7], dim=1)]
    assert_close(torch.cat(parts, 1), layer(x))
    gated = layer(x, relevance=torch.zeros(2, 2, 23)) if backend != "triton" else None
    first = RelevancyAttention(
        8, 2, 3, 2, screen_every=screen_every, retain="first", backend=backend, dtype=torch.float64
    )
    first.load_state_dict(layer.state_dict())
    assert gated is None or torch.equal(gated, first(x))
    every_query = RelevancyAttention(8, 2, 3, 2, backend=backend, dtype=torch.float64)
    every_query.load_state_dict(layer.state_dict())
    assert torch.equal(every_query(x), layer(x)) == (screen_every == 1)


def test_attention_with_fewer_heads_of_keys(backend: str) -> None:
    sizes: dict[str, Any] = {"dtype": torch.float64, "backend": backend}
    torch.manual_seed(3)
    layer = RelevancyAttention(12, 6, 3, 2, num_key_value_heads=2, **sizes)
    assert layer.in_proj_weight.shape == (12 + 2 * 4, 12)
    x, cache = random(2, 15, 12, seed=0), RelevancyCache()
    projected = (x @ layer.in_proj_weight.T + layer.in_proj_bias).split((12, 4, 4), 2)
    rows = [part.unflatten(2, (-1, 2)).transpose(1, 2) for part in projected]
    attended = relevancy_attention(*rows, 3, 2)
    assert_close(layer(x), layer.out_proj(attended.transpose(1, 2).flatten(2)))
    parts = [layer(part, cache=cache) for part in x.split([4, 1, 10], dim=1)]
    assert_close(torch.cat(parts, 1), layer(x))
    assert cache.key is not None and cache.key.shape == (2, 2, 4, 2)
    assert "2, num_key_value_heads=2" in repr(layer)
    torch.manual_seed(3)
    full = RelevancyAttention(12, 6, 3, 2, num_key_value_heads=6, **sizes)
    torch.manual_seed(3)
    assert torch.equal(RelevancyAttention(12, 6, 3, 2, **sizes)(x), full(x))


def test_explain_tells_of_both_layers() -> None:
    assert throughtime.explain(RelLSTM(3, 4, cell="tanh")).chosen == "reference"
    table = throughtime.explain(RelevancyAttention(8, 2, 3, 1), backend="cpu")
    assert table.request.op == "relevancy_attention" and table.request.hidden_size == 4
    chunked = throughtime.explain(RelevancyAttention(8, 2, 3, 1, screen_every=2))
    assert chunked.request.beyond_paper == ("screen_every=2",)
    assert "screen_every=2: not supported by the Triton kernels" in str(chunked)


def test_attention_takes_the_weights_of_multihead_attention() -> None:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    dense.in_proj_bias.data.normal_()
    sparse = RelevancyAttention(8, 2, window_size=20, top_k=0, dtype=torch.float64)
    sparse.load_state_dict(dense.state_dict())
    x = random(3, 12, 8, seed=0)
    mask = torch.ones(12, 12, dtype=torch.bool).triu(1)
    assert_close(sparse(x), dense(x, x, x, attn_mask=mask, need_weights=False)[0])
    time_first = RelevancyAttention(8, 2, 20, 0, batch_first=False, dtype=torch.float64)
    time_first.load_state_dict(dense.state_dict())
    assert_close(time_first(x.transpose(0, 1)).transpose(0, 1), sparse(x))


def attention() -> RelevancyAttention:
    return RelevancyAttention(8, 2, 3, 2, dtype=torch.float64)


@pytest.mark.parametrize("copied", [False, True])
def test_one_cache_for_each_layer(copied: bool) -> None:
    layer, x, cache = attention(), random(2, 9, 8, seed=0), RelevancyCache()
    other = copy.deepcopy(layer) if copied else attention()
    layer(x, cache=cache)
    before = vars(cache).copy()
    with pytest.raises(ValueError, match=r"one cache for each layer.* copy\.copy\(cache\)"):
        other(x, cache=cache)
    assert all(value is before[name] for name, value in vars(cache).items())
    layer.float().double()(x, cache=cache)  # moved, but the same layer
    torch.func.functional_call(layer, dict(layer.named_parameters()), (x,), {"cache": cache})
    assert before["length"].tolist() == [9, 9] and cache.length.tolist() == [27, 27]


def test_a_refused_call_makes_no_cache_its_own() -> None:
    layer, x, cache = attention(), random(2, 9, 8, seed=0), RelevancyCache()
    with pytest.raises(RuntimeError, match="relevance should have shape"):
        attention()(x, cache=cache, relevance=x)
    assert torch.equal(layer(x, cache=cache), layer(x))


def test_a_copy_of_a_cache_goes_on_in_a_copy_of_its_layer() -> None:
    layer, x, cache = attention(), random(2, 9, 8, seed=0), RelevancyCache()
    with torch.no_grad():
        layer(x, cache=cache)
        copies = [copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        copies += [cache.detach(), cache.index_select(torch.arange(2))]
        wanted = layer(x, cache=copy.copy(cache))
        for kept in copies:
            assert torch.equal(copy.deepcopy(layer)(x, cache=kept), wanted)


def test_a_cache_goes_on_when_its_layer_is_gone_and_does_not_keep_it() -> None:
    layer, x, cache = attention(), random(2, 9, 8, seed=0), RelevancyCache()
    layer(x, cache=cache).sum().backward()
    saved, alive = layer.state_dict(), weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None
    again = attention()
    again.load_state_dict(saved)
    again(x, cache=cache)


def test_a_cache_of_chosen_samples() -> None:
    layer, x, cache = attention(), random(3, 12, 8, seed=0), RelevancyCache()
    order = torch.tensor([2, 0, 0, 1])
    layer(x[:, :7], lengths=torch.tensor([7, 3, 5]), cache=cache)
    chosen = cache.index_select(order)
    assert_close(layer(x[order, 7:], cache=chosen), layer(x[:, 7:], cache=cache)[order])
    assert chosen.length is not None and chosen.length.tolist() == [10, 12, 12, 8]
    assert repr(RelevancyCache().index_select(order)) == "RelevancyCache(empty)"


def test_a_state_without_options_is_taken_as_it_was_by_earlier_versions() -> None:
    layer, x = small(), random(9, 2, 3, seed=0)
    _, state = layer(x)
    assert state.options == (2, 2, "relevant")
    older = dataclasses.replace(state, options=None)
    output, state = layer(x, older)
    assert torch.equal(output, layer(x, dataclasses.replace(older, options=(2, 2, "relevant")))[0])
    assert state.options == (2, 2, "relevant")
