"""``gradient_flow``: every number against autograd over an unrolled loop, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import throughtime
from cases import plain_lstm, random, random_mask
from closeness import assert_close
from recorded import loss_of, row_of_weights
from throughtime import LSTM
from throughtime.diagnostics import GradientFlow

T, B, I, H = 7, 3, 4, 5  # noqa: E741
LENGTHS = torch.tensor([4, 7, 1])


class Unrolled(NamedTuple):
    """One layer and direction of a loop: states by step and sample, and its results."""

    steps: dict[tuple[int, int], tuple[Tensor, Tensor]]
    output: Tensor
    h_n: Tensor
    c_n: Tensor


def unrolled(
    lstm: LSTM, x: Tensor, masks: Any, reset: Tensor | None, lengths: Tensor | None
) -> list[Unrolled]:
    """The layers and directions of an LSTM by hand."""
    found: list[Unrolled] = []
    directions = 1 + lstm.bidirectional
    for layer in range(lstm.num_layers):
        outputs = []
        for d in range(directions):
            starts = reset
            if reset is not None and d == 1:
                starts = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
            steps: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
            mask = None if masks is None else masks[layer * directions + d]
            output, (h_n, c_n) = plain_lstm(
                x, None, *lstm._weights(layer, d), detach_mask=mask, lengths=lengths,
                reset=starts, reverse=d == 1, steps=steps,
            )  # fmt: skip
            found.append(Unrolled(steps, output, h_n, c_n))
            outputs.append(output)
        x = torch.cat(outputs, 2)
    return found


def by_step(shape: tuple[int, ...], at: Any, values: Any) -> Tensor:
    made = torch.zeros(shape, dtype=torch.float64)
    for place, value in zip(at, values, strict=True):
        made[place] = value
    return made


def assert_equal(found: Tensor, wanted: Tensor, name: str) -> None:
    """Relative to the largest entry, however small that is."""
    scale = wanted.abs().max().clamp(min=1e-300)
    assert_close(found / scale, wanted / scale, name)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask-T": {"detach_mask": random_mask(T, p=0.5, seed=1)},
    "mask-TB": {"detach_mask": random_mask(T, B, p=0.5, seed=2)},
    "mask-each": {"detach_mask": random_mask(4, T, B, p=0.5, seed=2)},
    "reset": {"reset": random_mask(T, B, p=0.3, seed=3)},
    "lengths": {},
    "all": {
        "detach_mask": random_mask(T, B, p=0.4, seed=4),
        "reset": random_mask(T, B, p=0.2, seed=5),
    },
}


@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_every_step_of_every_layer_and_direction(backend: str, form: str, proj_size: int) -> None:
    torch.manual_seed(1)
    lstm = LSTM(I, H, 2, bidirectional=True, proj_size=proj_size, backend=backend).double()
    x, given = random(T, B, I, seed=9), FORMS[form]
    lengths = LENGTHS if form in ("lengths", "all") else None
    with throughtime.gradient_flow(lstm) as flow:
        if lengths is None:
            output, states = lstm(x, **given)
        else:
            packed, states = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False), **given)
            output, _ = pad_packed_sequence(packed)
        loss_of(output, *states).backward()

    mask = given.get("detach_mask")
    masks = None if mask is None else mask if mask.dim() == 3 else [mask] * 4
    loop = unrolled(lstm, x, masks, given.get("reset"), lengths)
    output = torch.cat([loop[2].output, loop[3].output], 2)
    h_n, c_n = (torch.stack([getattr(each, name) for each in loop]) for name in ("h_n", "c_n"))
    loss = loss_of(output, h_n, c_n)
    # A packed batch is sorted: so are the rows of what is recorded.
    order = torch.arange(B) if lengths is None else torch.argsort(lengths, descending=True)
    assert flow.layers == ["l0", "l1"]
    for k, each in enumerate(loop):
        states = list(itertools.chain(*each.steps.values()))
        grads = torch.autograd.grad(loss, states, retain_graph=True, materialize_grads=True)
        outside = torch.autograd.grad(loss, each.output, retain_graph=True)[0]
        at = list(each.steps)
        found = flow.gradients(k // 2, k % 2)
        out = proj_size or H
        dh, dc = by_step((T, B, out), at, grads[::2]), by_step((T, B, H), at, grads[1::2])
        assert_equal(found.dh, dh[:, order], f"dh {k}")
        assert_equal(found.dc, dc[:, order], f"dc {k}")
        last = [0] * B if k % 2 else inside(lengths).sum((0, 2)) - 1
        ends = [(int(t), b) for b, t in enumerate(last)]
        own = [by_step((T, B, n), ends, random(4, B, n, seed=s)[k]) for s, n in ((1, out), (2, H))]
        direct = torch.where(inside(lengths), outside, 0.0) + own[0]
        assert_equal(found.direct, direct[:, order], f"direct {k}")
        with torch.no_grad():
            below = x if k < 2 else torch.cat([loop[0].output, loop[1].output], 2)
        cell = cell_part(lstm, k, below, (direct, own[1]), given.get("reset"), lengths)
        assert_equal(found.dc_cell, cell[:, order], f"cell {k}")


def inside(lengths: Tensor | None) -> Tensor:
    ends = torch.tensor([T] * B) if lengths is None else lengths
    return (torch.arange(T).unsqueeze(1) < ends).unsqueeze(2)


def cell_part(
    lstm: LSTM, k: int, x: Tensor, direct: tuple[Tensor, Tensor], reset: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:  # fmt: skip
    """dc of one layer and direction with every step detached, for the same Y."""
    if reset is not None and k % 2:
        reset = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
    steps: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    output, _ = plain_lstm(
        x, None, *lstm._weights(k // 2, k % 2), detach_mask=torch.ones(T, dtype=torch.bool),
        lengths=lengths, reset=reset, reverse=bool(k % 2), steps=steps,
    )  # fmt: skip
    loss = (output * direct[0]).sum()
    loss = loss + sum((c * direct[1][at]).sum() for at, (_, c) in steps.items())
    return by_step((T, B, H), steps, torch.autograd.grad(loss, [c for _, c in steps.values()]))


def small(backend: str, **options: Any) -> LSTM:
    torch.manual_seed(2)
    return LSTM(2, 3, backend=backend, **options).double()


def test_the_mean_over_all_masks_follows_from_the_hops(backend: str) -> None:
    """E dc = sum of (1 - p)^k dc^(k), over all 2^8 masks of 8 steps."""
    steps, p = 8, 0.3
    lstm = small(backend)
    for weight in lstm.parameters():
        weight.data *= 2
    x, weights = random(steps, 2, 2, seed=1), random(steps, 2, 3, seed=2)
    mean = torch.zeros(steps, 2, 3, dtype=torch.float64)
    for detached in itertools.product([False, True], repeat=steps):
        with throughtime.gradient_flow(lstm) as flow:
            output, (_, c_n) = lstm(x, detach_mask=torch.tensor(detached))
            ((output * weights).sum() + c_n.sum()).backward()
        share = p ** sum(detached) * (1 - p) ** (steps - sum(detached))
        mean += share * flow.gradients().dc
    hops = flow.hops(steps - 1)
    assert hops.spectrum.shape == (steps, steps, 2, 3)
    assert_equal(hops.expected(p), mean, "mean")
    with throughtime.gradient_flow(lstm) as whole:
        output, (_, c_n) = lstm(x)
        ((output * weights).sum() + c_n.sum()).backward()
    assert_equal(hops.expected(0), whole.gradients().dc, "p = 0")
    assert torch.equal(hops.expected(1), flow.gradients().dc_cell)
    assert (hops.expected(p) - hops.expected(0)).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"p should be in range \[0, 1\], got 2"):
        hops.expected(2)


@pytest.mark.parametrize("name", ["plain", "mask-TB", "reset"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_cell_part_of_the_weights_gradient(backend: str, name: str, bias: bool) -> None:
    lstm = LSTM(I, H, bias=bias, backend=backend).double()
    x, given = random(T, B, I, seed=9), FORMS[name]

    def run(**options: Any) -> tuple[Tensor, ...]:
        output, states = lstm(x, **options)
        return output, *states

    row = row_of_weights(lstm, run, given, T)
    assert 0.1 < row["cell_share"] != 1 and row["cosine"] < 0.9999


def test_the_table(backend: str, tmp_path: Any) -> None:
    mask = torch.tensor([False, True, False, True, True, False, False])
    lstm = small(backend)
    with throughtime.gradient_flow(lstm) as flow:
        lstm(random(T, B, 2, seed=1), detach_mask=mask)[0][-1].sum().backward()
    table, found = flow.table(), flow.gradients()
    assert [row["step"] for row in table] == list(range(T))
    for row in table:
        t = row["step"]
        norms = {
            "dh": found.dh, "dc": found.dc, "direct": found.direct, "cell": found.dc_cell,
            "rest": found.dc - found.dc_cell,
        }  # fmt: skip
        for name, x in norms.items():
            of_batch = x[t].norm(dim=1)
            for suffix, q in (("", 0.5), ("_10", 0.1), ("_90", 0.9)):
                wanted = of_batch.quantile(q).item()
                assert row[name + suffix] == pytest.approx(wanted, rel=1e-12, abs=0), name
        # Only the last step has a loss: all of the others' gradient by h comes through step t + 1.
        assert row["cut"] == pytest.approx(float(t + 1 < T and mask[t + 1]), abs=1e-12)
        assert row["zeros"] == row["subnormals"] == 0
    path = tmp_path / "flow.csv"
    flow.to_csv(path)
    lines = path.read_text().splitlines()
    assert len(lines) == T + 1 and lines[0].split(",") == list(table[0])
    assert [float(x) for x in lines[3].split(",")[3:]] == list(table[2].values())[3:]


def test_zeros_are_counted(backend: str) -> None:
    lstm = small(backend)
    with throughtime.gradient_flow(lstm) as flow:
        lstm(random(T, B, 2, seed=1))[0][3].sum().backward()
    assert [row["zeros"] for row in flow.table()] == [0] * 4 + [1] * 3
    (row,) = flow.horizon()
    assert row["dc"] == math.inf and math.isnan(row["decades"])  # the last step has no gradient


def test_the_horizon(backend: str) -> None:
    lstm = small(backend)
    with throughtime.gradient_flow(lstm) as flow:
        lstm(random(40, B, 2, seed=1))[0][-1].sum().backward()
    found = flow.gradients()
    for name, x in (("dh", found.dh), ("dc", found.dc)):
        norms = x.norm(dim=2).quantile(0.5, dim=1).flip(0)
        wanted = next(t for t, norm in enumerate(norms) if norm < 0.05 * norms[0])
        (row,) = flow.horizon(0.05)
        assert row[name] == wanted
    assert row["decades"] == pytest.approx(
        100 / 39 * math.log10(norms[39].item() / norms[0].item()), rel=1e-9
    )


def test_calls_of_a_layer_are_kept_apart_and_updates_follow_each_other(backend: str) -> None:
    lstm = small(backend)
    x = random(T, B, 2, seed=1)
    with throughtime.gradient_flow(lstm) as flow:
        for _ in range(3):
            _, state = lstm(x[:4])
            second, _ = lstm(x[4:], state)
            second[-1].sum().backward()
    whole = GradientFlow(lstm)
    with whole:
        lstm(x)[0][-1].sum().backward()
    assert flow.updates == 3 and flow.layers == ["l0"]
    wanted = whole.gradients()
    assert_equal(flow.gradients(call=0).dc[:3], wanted.dc[:3], "dc")  # c_n brings the rest
    assert_equal(flow.gradients(call=1).dc, wanted.dc[4:], "dc")
    assert_equal(flow.gradients(call=0).dh, wanted.dh[:4], "dh")
    assert {row["call"] for row in flow.table()} == {0, 1}
    with pytest.raises(ValueError, match=r"layer 0, direction 0, call 2; recorded are call 0 of"):
        flow.gradients(call=2)
    with pytest.raises(ValueError, match=r"layer 'l1', direction 0"):
        flow.gradients("l1")
