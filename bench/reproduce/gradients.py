"""Claims about gradients, which need no training: seconds each, in float64.

Symbols: h_t output, c_t cell state, L the loss, p the probability of detaching a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import throughtime
from bench.operations.authors_rel_lstm import AuthorsRelLSTM
from bench.operations.lstm_peers import LoopLSTM
from bench.train import recall
from bench.train.config import Config
from throughtime import functional

DOUBLE = torch.float64
PROBABILITIES = (0.0, 0.25, 0.5, 1.0)


def hops() -> pd.DataFrame:
    """The mean gradient over all masks beside its expansion in hops, for several p.

    A hop is a passage of the gradient through W_hh. dc^(k) is the gradient of c_0 along paths with
    k hops. The mean over masks is the sum over k of (1 - p)^k dc^(k): ``error`` is the largest
    difference, divided by the largest gradient.
    """
    torch.manual_seed(0)
    steps, batch, units = 8, 2, 4
    layer = LoopLSTM(3, units, dtype=DOUBLE)
    with torch.no_grad():
        layer.weight_hh_l0 *= 4
    x, direct = torch.randn(steps, batch, 3, dtype=DOUBLE), torch.randn(steps, batch, units)
    expanded = _by_hops(layer, x, direct.to(DOUBLE))
    masks = torch.tensor(list(itertools.product([False, True], repeat=steps)))
    gradients = torch.stack([_of_c0(layer, x, direct.to(DOUBLE), mask) for mask in masks])
    rows = []
    for p in PROBABILITIES:
        detached = masks.sum(1).double()
        weights = p**detached * (1 - p) ** (steps - detached)
        mean = (weights[:, None, None] * gradients).sum(0)
        series = sum((1 - p) ** k * part for k, part in enumerate(expanded))
        error = (mean - series).abs().max() / gradients.abs().max()
        sizes = {f"hops_{k}": float(part.norm()) for k, part in enumerate(expanded[:4])}
        rows.append({"p": p, "masks": len(masks), "error": float(error), **sizes})
    return pd.DataFrame(rows)


def _of_c0(layer: nn.Module, x: Tensor, direct: Tensor, mask: Tensor) -> Tensor:
    """The gradient of c_0 through our kernels, where ``direct`` is that of the outputs."""
    c_0 = x.new_zeros(x.size(1), direct.size(2)).requires_grad_()
    weights = [weight.detach() for weight in layer.parameters()]
    output, _ = functional.lstm(x, (torch.zeros_like(c_0), c_0), *weights, detach_mask=mask)
    return torch.autograd.grad(output, c_0, direct)[0]


def _by_hops(layer: nn.Module, x: Tensor, direct: Tensor) -> list[Tensor]:
    """The gradient of c_0 along paths with 0, 1, ... hops."""
    w_ih, w_hh, b_ih, b_hh = (weight.detach() for weight in layer.parameters())
    h = c = x.new_zeros(x.size(1), direct.size(2))
    states = []
    for x_t in x:
        i, f, g, o = (F.linear(x_t, w_ih, b_ih + b_hh) + F.linear(h, w_hh)).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        before, c = c, f * c + i * g
        h = o * c.tanh()
        states.append((i, f, g, o, before, c))
    found, dh = [], list(direct)
    for _ in range(len(x) + 1):
        dc, below = torch.zeros_like(c), [torch.zeros_like(h) for _ in dh]
        for t in range(len(x) - 1, -1, -1):
            i, f, g, o, before, c = states[t]
            dc = dc + o * (1 - c.tanh() ** 2) * dh[t]
            sums = (dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g**2),
                    dh[t] * c.tanh() * o * (1 - o))  # fmt: skip
            if t > 0:
                below[t - 1] = torch.cat(sums, 1) @ w_hh
            dc = dc * f
        found.append(dc)
        dh = below
    return found


def weight_scale() -> pd.DataFrame:
    """The size of dL/dc at step 5, 95 steps before the loss, as the weights grow.

    Copying's symbols, T 100, H 128, batch 20; the loss is a random projection of the last output.
    W_hh of a new layer times ``scale``, every forget bias ``forget_bias``; the median over the
    batch and 20 masks. p = 1 is the path through the cell alone.
    """
    torch.manual_seed(0)
    steps, batch, units, early = 100, 20, 128, 5
    x = torch.rand(steps, batch, 1, dtype=DOUBLE)
    project = torch.randn(batch, units, dtype=DOUBLE)
    rows = []
    for scale, bias in ((1, 0.0), (2, 1.0), (4, 2.0), (8, 0.0), (8, 2.0)):
        layer = throughtime.LSTM(1, units, dtype=DOUBLE, forget_bias=bias)
        with torch.no_grad():
            layer.weight_hh_l0 *= scale
        weights = [weight.detach() for weight in layer.parameters()]
        zeros = x.new_zeros(batch, units)
        _, state = functional.lstm(x[:early], (zeros, zeros), *weights)
        for p in PROBABILITIES:
            c = state[1].detach().requires_grad_()
            norms = []
            for _ in range(1 if p in (0, 1) else 20):
                mask = torch.rand(steps - early) < p
                output, _ = functional.lstm(x[early:], (state[0], c), *weights, detach_mask=mask)
                norms.append(torch.autograd.grad(output[-1], c, project)[0].norm(dim=1))
            size = float(torch.stack(norms).median())
            rows.append({"scale": scale, "forget_bias": bias, "p": p, "gradient": size})
    return pd.DataFrame(rows)


def distance() -> pd.DataFrame:
    """The size of dL/dh_t over t in new layers: denoise, T 200, H 64, 4 sequences, 3 seeds.

    The loss is that of the ten answers.
    """
    rows = []
    for seed in range(3):
        config = Config("denoise", T=200, hidden=64, one_hot=True, seed=seed)
        task = recall.make(config)
        x, y = task.train.batch(torch.arange(4))
        for name, make in _UNTRAINED.items():
            torch.manual_seed(seed)
            layer = make(task.features, config.hidden).to(DOUBLE)
            head = nn.Linear(config.hidden, task.classes, dtype=DOUBLE)
            output, _ = layer(x.to(DOUBLE))
            logits = head(output[-task.scored_steps :])
            loss = F.cross_entropy(logits.flatten(0, 1), y[-task.scored_steps :].flatten())
            rows += [
                {"layer": name, "seed": seed, "step": step, "gradient": size}
                for step, size in enumerate(_of_states(output, loss))
            ]
    return pd.DataFrame(rows)


_UNTRAINED: dict[str, Callable[[int, int], nn.Module]] = {
    "LSTM": lambda i, h: LoopLSTM(i, h),
    "LSTM, chrono": lambda i, h: throughtime.init.chrono_(LoopLSTM(i, h), 220),
    "RelLSTM": lambda i, h: AuthorsRelLSTM(i, h, window_size=15, top_k=15),
    "MemLSTM": lambda i, h: AuthorsRelLSTM(i, h, window_size=15, top_k=None),
}


def _of_states(output: Tensor, loss: Tensor) -> list[float]:
    """The norm of dL/dh_t for each step, where the output is ``torch.stack`` of all h_t."""
    found: dict[int, float] = {}
    nodes = [node for node, _ in output.grad_fn.next_functions]  # type: ignore[union-attr]
    for step, node in enumerate(nodes):
        node.register_prehook(lambda grads, step=step: found.update({step: float(grads[0].norm())}))
    loss.backward()  # type: ignore[no-untyped-call]
    return [found.get(step, 0.0) for step in range(len(nodes))]


def retained() -> pd.DataFrame:
    """How often an untrained RelLSTM holds each step at the end: T 200, H 64, window 10, top_k 15.

    ``share`` counts over 3 seeds with 8 sequences of random symbols each.
    """
    steps, held = 220, []
    for seed in range(3):
        torch.manual_seed(seed)
        layer = throughtime.RelLSTM(10, 64, window_size=10, top_k=15)
        symbols = torch.randint(10, (steps, 8))
        _, state = layer(F.one_hot(symbols, 10).float())
        positions = state.position[0, : state.retained]  # [top_k, B]
        held.append((positions == torch.arange(steps)[:, None, None]).any(1))
    share = torch.cat(held, 1).double().mean(1)
    return pd.DataFrame({"step": range(steps), "share": share})
