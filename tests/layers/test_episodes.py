"""``reset`` and ``reset_hx``: one call does what a call per episode does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cases import random, random_mask
from closeness import assert_close
from throughtime import LSTM, RelLSTM, functional

T, B, START = 6, 3, 4
States = tuple[Tensor, Tensor]


def make(**options: object) -> LSTM:
    torch.manual_seed(1)
    return LSTM(4, 5, dtype=torch.float64, **options)


def new_states(lstm: LSTM, *sizes: int) -> States:
    features = (lstm.proj_size or lstm.hidden_size, lstm.hidden_size)
    h, c = (random(*sizes, n, seed=n, dtype=lstm.weight_hh_l0.dtype) for n in features)
    return h.requires_grad_(), c.requires_grad_()


def by_episode(lstm: LSTM, x: Tensor, states: States) -> tuple[Tensor, States]:
    """Steps before START and from it on in a call of their own.

    The forward directions of the second call and the reverse ones of the first begin from
    ``states`` at START.
    """
    two = lstm.bidirectional

    def begin(first: int) -> States:
        h, c = (s[:, START].clone() for s in states)
        for state in (h, c):
            state[first :: 1 + two] = 0.0
        return h, c

    one, end = lstm(x[:START], begin(0))
    other, last = lstm(x[START:], begin(1) if two else (states[0][:, START], states[1][:, START]))
    if two:
        last = tuple(
            torch.stack([a[0::2], b[1::2]], 1).flatten(0, 1) for a, b in zip(last, end, strict=True)
        )
    return torch.cat([one, other]), last


def with_gradients(result: tuple[Tensor, States], lstm: LSTM, states: States) -> list[Tensor]:
    output, (h_n, c_n) = result
    loss = (output * random(*output.shape, seed=9)).sum() + h_n.square().sum() + c_n.sum()
    return [output, h_n, c_n, *torch.autograd.grad(loss, [*states, *lstm.parameters()])]


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}], ids=str
)
@pytest.mark.parametrize("recompute", [False, True])
def test_reset_hx_equals_a_call_per_episode(
    backend: str, options: dict[str, int], recompute: bool
) -> None:
    lstm, x = make(backend=backend, recompute=recompute, **options), random(T, B, 4, seed=1)
    states = new_states(lstm, lstm.num_layers * (1 + lstm.bidirectional), T, B)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[START] = True
    expected = with_gradients(by_episode(lstm, x, states), lstm, states)
    found = with_gradients(lstm(x, reset=reset, reset_hx=states), lstm, states)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    assert found[3].abs().sum() > 0.1


def test_reset_hx_of_every_form_means_the_same() -> None:
    lstm, x = make(num_layers=2), random(T, B, 4, seed=1)
    reset = random_mask(T, B, p=0.4, seed=2)
    learned = new_states(lstm)
    expected = lstm(x, reset=reset, reset_hx=tuple(s.expand(2, T, B, 5) for s in learned))[0]
    assert not torch.allclose(expected, lstm(x, reset=reset)[0])
    for sizes in ((), (1, 1), (2, 1, 1), (T, B), (1, T, 1)):
        given = tuple(s.expand(*sizes, 5) for s in learned)
        assert torch.equal(lstm(x, reset=reset, reset_hx=given)[0], expected)
    alone = lstm(x[:, 0], reset=reset[:, 0], reset_hx=tuple(s.expand(T, 5) for s in learned))[0]
    assert_close(alone, expected[:, 0])
    own = new_states(lstm, 2, T, B)
    expected = lstm(x, reset=reset, reset_hx=own)[0]
    lstm.batch_first = True
    given = tuple(s.transpose(1, 2) for s in own)
    found = lstm(x.transpose(0, 1), reset=reset.t(), reset_hx=given)[0]
    assert torch.equal(found.transpose(0, 1), expected)


def test_reset_hx_of_a_packed_input_follows_its_batch() -> None:
    lstm, x = make(bidirectional=True), random(T, B, 4, seed=1)
    lengths, reset = [3, 6, 4], random_mask(T, B, p=0.5, seed=2)
    states = new_states(lstm, 2, T, B)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    output, found = lstm(packed, reset=reset, reset_hx=states)
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(output)
    for b, length in enumerate(lengths):
        given = tuple(s[:, :length, b : b + 1] for s in states)
        cut = reset[:length, b : b + 1]
        alone, expected = lstm(x[:length, b : b + 1], reset=cut, reset_hx=given)
        assert_close(padded[:length, b : b + 1], alone)
        for one, other in zip(found, expected, strict=True):
            assert_close(one[:, b : b + 1], other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_reset_hx_in_16_bits_has_the_bits_of_a_call_per_episode(dtype: torch.dtype) -> None:
    lstm, x = make(backend="cpu").to(dtype), random(T, B, 4, seed=1, dtype=dtype)
    states = new_states(lstm, 1, T, B)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[START] = True
    expected, _ = by_episode(lstm, x, states)
    found, _ = lstm(x, reset=reset, reset_hx=states)
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(y.square().sum(), states) for y in (expected, found)]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_an_unread_entry_may_hold_anything(backend: str) -> None:
    """Infinities and NaN at steps that do not reset reach nothing."""
    weights = [w.detach() for w in make()._weights(0, 0)[:4] if w is not None]
    reset = random_mask(T, B, p=0.4, seed=2)
    clean = new_states(make(), T, B)
    dirty = [
        torch.where(reset.unsqueeze(2), s, float("nan")).detach().requires_grad_() for s in clean
    ]
    x = random(T, B, 4, seed=1)
    found = []
    for states in (clean, dirty):
        output, _ = functional.lstm(
            x, None, *weights, reset=reset, reset_hx=tuple(states), backend=backend
        )
        found.append([output, *torch.autograd.grad(output.square().sum(), states)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def by_steps(layer: RelLSTM, x: Tensor, reset: Tensor, state: Any) -> tuple[Tensor, Any]:
    """One sample, in a call for each of its episodes."""
    outputs = []
    starts = [0, *[t for t in range(1, len(x)) if reset[t]], len(x)]
    for begin, end in itertools.pairwise(starts):
        output, state = layer(x[begin:end], None if reset[begin] else state)
        outputs.append(output)
    return torch.cat(outputs), state


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["padded", "batch first", "packed"])
def test_rel_lstm_starts_anew_with_an_empty_memory(backend: str, p: float, kind: str) -> None:
    """Values, state and gradients, from the state of an earlier call."""
    steps, first = 12, kind == "batch first"
    layer = RelLSTM(
        4, 5, 2, batch_first=first, window_size=2, top_k=2, dtype=torch.float64, backend=backend
    )
    x = random(steps, B, 4, seed=1).requires_grad_()
    reset = random_mask(steps, B, p=p, seed=2)
    lengths = [12, 5, 9] if kind == "packed" else [steps] * B
    earlier = random(7, B, 4, seed=3)
    _, state = layer(earlier.transpose(0, 1) if first else earlier)
    given: Any = x.transpose(0, 1) if first else x
    if kind == "packed":
        given = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    output, after = layer(given, state, reset=reset.t().int() if first else reset)
    if kind == "packed":
        output, _ = pad_packed_sequence(output)
    output = output.transpose(0, 1) if first else output
    layer.batch_first = False
    expected, states = [], []
    for b, length in enumerate(lengths):
        own = state.index_select(torch.tensor([b]))
        one, last = by_steps(layer, x[:length, b : b + 1], reset[:length, b], own)
        expected.append(torch.nn.functional.pad(one, (0, 0, 0, 0, 0, steps - length)))
        states.append(last)
    assert_close(output, torch.cat(expected, 1))
    for name in ("h", "c", "context"):
        assert_close(getattr(after, name), torch.cat([getattr(s, name) for s in states], 1))
    assert after.length.tolist() == [int(s.length) for s in states]
    grads = [
        torch.autograd.grad(
            y.square().sum(), [x, *layer.parameters()], retain_graph=True, materialize_grads=True
        )
        for y in (output, torch.cat(expected, 1))
    ]
    for one, other in zip(*grads, strict=True):
        assert_close(one, other)
    more = random(5, B, 4, seed=4)  # the memory that is left is each episode's own
    going_on = [layer(more[:, b : b + 1], s)[0] for b, s in enumerate(states)]
    assert_close(layer(more, after)[0], torch.cat(going_on, 1))
