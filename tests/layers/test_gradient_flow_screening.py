"""``gradient_flow`` of a RelLSTM: every number against autograd over a loop by hand, in float64."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import throughtime
from by_hand import ByHand, additive
from cases import random, random_mask
from closeness import assert_close
from recorded import loss_of, row_of_weights
from throughtime import RelLSTM

T, B, I, H = 9, 3, 2, 4  # noqa: E741
LENGTHS = torch.tensor([5, 9, 1])
ROLES = ("direct", "recurrent", "value", "key")
At = dict[tuple[int, int], Tensor]


class Hand:
    """One layer by hand, one sample at a time: states by step and sample, each role of h apart."""

    def __init__(
        self, layer: RelLSTM, k: int, x: Tensor, mask: Tensor | None = None,
        reset: Tensor | None = None, lengths: Tensor | None = None, alone: bool = False,
    ) -> None:  # fmt: skip
        """``alone``: nothing passes through h but to the output."""
        self.w = {
            name.removesuffix(f"_l{k}"): p
            for name, p in layer.named_parameters()
            if name.endswith(f"_l{k}")
        }
        self.layer, self.x, self.mask, self.reset, self.alone = layer, x, mask, reset, alone
        self.h: At = {}
        self.c: At = {}
        self.roles: dict[str, At] = {role: {} for role in ROLES}
        self.attended: dict[tuple[int, int], dict[int, float]] = {}
        self.lengths = torch.full((x.size(1),), len(x)) if lengths is None else lengths
        ends = [self.sample(b) for b in range(x.size(1))]
        self.h_n, self.c_n, self.context_n = (torch.stack(x) for x in zip(*ends, strict=True))
        self.output = torch.stack([
            torch.stack([
                self.roles["direct"].get((t, b), x.new_zeros(H)) for b in range(x.size(1))
            ]) for t in range(len(x))
        ])  # fmt: skip

    def detached(self, t: int, b: int) -> bool:
        return self.mask is not None and bool(self.mask[(t, b)[: self.mask.dim()]])

    def sample(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        w, zero = self.w, self.x.new_zeros(H)
        h, c, context = zero, zero, zero
        hand, begin = self.hand(), 0
        for t in range(int(self.lengths[b])):
            if self.reset is not None and self.reset[t, b]:
                h, c, context, hand, begin = zero, zero, zero, self.hand(), t
            s = 0.5 * ((h.detach() if self.detached(t, b) else h) + context)
            gates = w["weight_ih"] @ self.x[t, b] + w["weight_hh"] @ s
            gates = gates + w["bias_ih"] + w["bias_hh"]
            if self.layer.cell == "tanh":
                state = torch.tanh(gates)
            else:
                i, f, g, o = gates.chunk(4)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                state = torch.sigmoid(o) * torch.tanh(c)
            self.h[t, b], self.c[t, b] = state, c
            for role in ROLES:
                mine = state.detach() if self.alone and role != "direct" else state.clone()
                self.roles[role][t, b] = mine
            h = self.roles["recurrent"][t, b]
            of = range(begin, t + 1)
            keys = [w["weight_key"] @ self.roles["key"][j, b] for j in of]
            window = [j for j in range(len(keys)) if j > len(keys) - 1 - hand.window_size]
            attended, score = [*hand.retained, *window], additive(w["weight_score"])
            query = w["weight_query"] @ s
            alpha = torch.stack([score(query, keys[j]) for j in attended]).softmax(0)
            self.attended[t, b] = {
                j + begin: a.item() for j, a in zip(attended, alpha, strict=True)
            }
            context = hand.attend(query, keys, [self.roles["value"][j, b] for j in of], score)
        return self.roles["direct"][t, b], c, context

    def hand(self) -> ByHand:
        return ByHand(self.layer.window_size, self.layer.top_k, self.layer.retain)

    def gradients(self, loss: Tensor, steps: At) -> Tensor:
        """Of the loss by what is at each step and sample, ``[T, B, H]``."""
        found = torch.zeros(len(self.x), self.x.size(1), H, dtype=torch.float64)
        states = [x for x in steps.values() if x.requires_grad]
        places = [at for at, x in steps.items() if x.requires_grad]
        if not states:
            return found
        grads = torch.autograd.grad(
            loss, states, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        for at, grad in zip(places, grads, strict=True):
            found[at] = grad
        return found


def assert_equal(found: Tensor, wanted: Tensor, name: str) -> None:
    """Relative to the largest entry, however small that is."""
    scale = wanted.abs().max().clamp(min=1e-300)
    assert_close(found / scale, wanted / scale, name)


def layer_of(backend: Any, **options: Any) -> RelLSTM:
    torch.manual_seed(1)
    made = RelLSTM(I, H, **{"window_size": 2, "top_k": 2} | options, backend=backend).double()
    for name, weight in made.named_parameters():
        if name.startswith("bias"):
            torch.nn.init.normal_(weight)
    return made


class Form(NamedTuple):
    """What differs: of the layer, and of its call."""

    layer: dict[str, Any]
    call: dict[str, Any]
    lengths: Tensor | None = None


FORMS = {
    "plain": Form({}, {}),
    "mask-T": Form({}, {"detach_mask": random_mask(T, p=0.5, seed=1)}),
    "mask-TB": Form({}, {"detach_mask": random_mask(T, B, p=0.5, seed=2)}),
    "reset": Form({}, {"reset": random_mask(T, B, p=0.3, seed=3)}),
    "lengths": Form({}, {}, LENGTHS),
    "first": Form({"retain": "first"}, {}),
    "every": Form({"top_k": None}, {}),
    "window": Form({"top_k": 0, "window_size": 3}, {}),
    "wide": Form({"window_size": 20, "attention_size": 7}, {}),
    "tanh": Form({"cell": "tanh"}, {}),
    "all": Form(
        {"retain": "first", "top_k": 1},
        {
            "detach_mask": random_mask(T, B, p=0.4, seed=4),
            "reset": random_mask(T, B, p=0.2, seed=5),
        },
        LENGTHS,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_step_and_every_part(backend: str, form: str) -> None:
    options, given, lengths = FORMS[form]
    if options.get("cell") == "tanh" and backend != "reference":
        pytest.skip("a plain cell runs on the reference only")
    layer, x = layer_of(backend, num_layers=2, **options), random(T, B, I, seed=9)
    packed = x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)
    with throughtime.gradient_flow(layer) as flow:
        output, state = layer(packed, **given)
        output = output if lengths is None else torch.nn.utils.rnn.pad_packed_sequence(output)[0]
        loss_of(output, state.h, state.c, state.context).backward()

    mask, reset = given.get("detach_mask"), given.get("reset")
    first = Hand(layer, 0, x, mask, reset, lengths)
    second = Hand(layer, 1, first.output, mask, reset, lengths)
    ends = [torch.stack([getattr(k, n) for k in (first, second)]) for n in ("h_n", "c_n")]
    contexts = torch.stack([first.context_n, second.context_n])
    loss = loss_of(second.output, *ends, contexts)
    # A packed batch is sorted: so are the rows of what is recorded.
    order = torch.arange(B) if lengths is None else torch.argsort(lengths, descending=True)
    assert flow.layers == ["l0", "l1"]
    for k, hand in enumerate((first, second)):
        found, attention = flow.gradients(k), flow.attention(k)
        parts = {role: hand.gradients(loss, hand.roles[role]) for role in ROLES}
        dh, dc = hand.gradients(loss, hand.h), hand.gradients(loss, hand.c)
        dc = dc * (layer.cell == "lstm")
        assert_equal(found.dh, dh[:, order], f"dh {k}")
        if layer.cell == "lstm":
            assert_equal(found.dc, dc[:, order], f"dc {k}")
        mine = {"direct": found.direct, **attention._asdict()}
        for role, wanted in parts.items():
            assert_equal(mine[role], wanted[:, order], f"{role} {k}")
        whole = sum(mine[role] for role in ROLES)
        assert (found.dh - whole).abs().max() <= 1e-14 * found.dh.abs().max()
        norms = {role: wanted[:, order].norm(dim=2) for role, wanted in parts.items()}
        share = (parts["value"] + parts["key"])[:, order].norm(dim=2) / sum(norms.values())
        assert_equal(attention.share.nan_to_num(2), share.nan_to_num(2), f"share {k}")
        alone = Hand(
            layer, k, (x if k == 0 else first.output).detach(), None, reset, lengths, alone=True
        )
        own = (alone.output * parts["direct"]).sum() + (
            alone.c_n * random(2, B, H, seed=2)[k]
        ).sum()
        cell = alone.gradients(own, alone.c) * (layer.cell == "lstm")
        assert_equal(found.dc_cell, cell[:, order], f"cell {k}")
        assert_ways(attention, hand, order, reset)


def assert_ways(attention: Any, hand: Hand, order: Tensor, reset: Tensor | None) -> None:
    """What attention attends, from the sets that were attended by hand."""
    for row, b in enumerate(order.tolist()):
        length = int(hand.lengths[b])
        ends = {length - 1}
        if reset is not None:
            ends |= {t - 1 for t in range(1, length) if reset[t, b]}
        depth, best = dict.fromkeys(ends, 0), dict.fromkeys(ends, 1.0)
        for t in reversed(range(length)):
            alpha = hand.attended[t, b]
            assert attention.kappa[t, row] == len(alpha)
            entropy = -sum(a * math.log(a) for a in alpha.values())
            assert attention.effective[t, row].item() == pytest.approx(math.exp(entropy), rel=1e-10)
            holds = [k for k in range(t, length) if t in hand.attended.get((k, b), {})]
            assert attention.last[t, row] == holds[-1]
            if t not in ends:
                ways = [k for k in holds if k not in ends]
                depth[t] = 1 + min(depth[k + 1] for k in ways)
                best[t] = max(hand.attended[k, b][t] * best[k + 1] / 2 for k in ways)
            assert attention.depth[t, row] == depth[t]
            assert attention.best_path[t, row].item() == pytest.approx(
                math.log10(best[t]), abs=1e-9
            )
        outside = slice(length, None)
        assert (attention.kappa[outside, row] == 0).all()
        for x in (attention.depth, attention.last):
            assert (x[outside, row] == -1).all()
        for x in (attention.effective, attention.best_path):
            assert x[outside, row].isnan().all()


@pytest.mark.parametrize("form", ["plain", "mask-TB", "reset", "every"])
def test_calls_that_go_on_are_kept_apart(backend: str, form: str) -> None:
    """What an earlier call's keys get from a later one comes through the state: it is direct."""
    layer, x = layer_of(backend, **FORMS[form].layer), random(T, B, I, seed=1)
    chunks, given = (slice(None, 5), slice(5, None)), FORMS[form].call
    with throughtime.gradient_flow(layer) as flow:
        output, state = x, None
        for chunk in chunks:
            output, state = layer(x[chunk], state, **{n: m[chunk] for n, m in given.items()})
        (output * random(4, B, H, seed=2)).sum().backward()
    with throughtime.gradient_flow(layer) as whole:
        output, _ = layer(x, **given)
        (output[5:] * random(4, B, H, seed=2)).sum().backward()
    parts = [flow.gradients(call=k) for k in (0, 1)]
    assert_equal(torch.cat([part.dh for part in parts]), whole.gradients().dh, "dh")
    assert_equal(parts[1].dc, whole.gradients().dc[5:], "dc")  # c_n brings the other's last
    later, wanted = flow.attention(call=1), whole.attention()
    for name in ("recurrent", "value", "key", "share", "kappa", "effective", "depth", "best_path"):
        both = (getattr(each, name).double() for each in (later, wanted))
        found, own = (each.nan_to_num(2) for each in both)
        assert_equal(found, own[5:], name)
    assert torch.equal(later.last + 5, wanted.last[5:])
    assert {row["call"] for row in flow.table()} == {0, 1}


def test_the_mean_over_all_masks_follows_from_the_hops(backend: str) -> None:
    """E dc = sum of (1 - p)^k dc^(k): attention to a state is no passage."""
    steps, p = 6, 0.3
    layer, x = layer_of(backend), random(steps, 2, I, seed=1)
    with torch.no_grad():
        layer.weight_hh_l0 *= 2
    mean = torch.zeros(steps, 2, H, dtype=torch.float64)
    for detached in itertools.product([False, True], repeat=steps):
        with throughtime.gradient_flow(layer) as flow:
            output, state = layer(x, detach_mask=torch.tensor(detached))
            loss_of(output, state.c, state.context).backward()
        share = p ** sum(detached) * (1 - p) ** (steps - sum(detached))
        mean += share * flow.gradients().dc
    hops = flow.hops(steps - 1)
    assert_equal(hops.expected(p), mean, "mean")
    assert_equal(hops.expected(1), flow.gradients().dc, "every step is detached in the last call")
    assert (hops.expected(p) - hops.expected(0)).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["plain", "mask-TB", "reset", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_weights_gradient_with_every_step_detached(backend: str, form: str, bias: bool) -> None:
    options, given, _ = FORMS[form]
    if options.get("cell") == "tanh" and backend != "reference":
        pytest.skip("a plain cell runs on the reference only")
    layer, x = layer_of(backend, bias=bias, **options), random(T, B, I, seed=9)

    def run(**options: Any) -> tuple[Tensor, ...]:
        output, state = layer(x, **options)
        return output, state.h, state.c, state.context

    row_of_weights(layer, run, given, T)


def test_the_table_has_the_parts(backend: str, tmp_path: Any) -> None:
    mask = torch.tensor([False, True, False, True, True, False, False, True, False])
    layer = layer_of(backend)
    net = torch.nn.ModuleList([layer, throughtime.LSTM(I, H, backend=backend).double()])
    x = random(T, B, I, seed=1)
    with throughtime.gradient_flow(net) as flow:
        (net[1](x)[0] * layer(x, detach_mask=mask)[0])[-1].sum().backward()
    assert flow.layers == ["0.l0", "1.l0"] or flow.layers == ["1.l0", "0.l0"]
    rows = [row for row in flow.table() if row["layer"] == "0.l0"]
    found, attention = flow.gradients("0.l0"), flow.attention("0.l0")
    assert [row["step"] for row in rows] == list(range(T))
    norms = {
        **found._asdict(), "cell": found.dc_cell, "rest": found.dc - found.dc_cell,
        **{role: getattr(attention, role) for role in ROLES[1:]},
    }  # fmt: skip
    del norms["dc_cell"]
    for t, row in enumerate(rows):
        for name, x in norms.items():
            of_batch = x[t].norm(dim=1)
            for suffix, q in (("", 0.5), ("_10", 0.1), ("_90", 0.9)):
                wanted = of_batch.quantile(q).item()
                assert row[name + suffix] == pytest.approx(wanted, rel=1e-12, abs=0), name
        if t + 1 < T:
            assert row["attention"] == pytest.approx(attention.share[t].quantile(0.5).item())
            # Only the last step has a loss: without the mask half of ds would come through h.
            assert (0 < row["cut"] < 1) == bool(mask[t + 1])
        else:
            assert row["attention"] == row["cut"] == 0
    path = tmp_path / "flow.csv"
    flow.to_csv(path)
    lines = path.read_text().splitlines()
    assert len(lines) == 2 * T + 1 and set(lines[0].split(",")) == set(rows[0])
    with pytest.raises(
        ValueError, match=r"layer '1\.l0', direction 0 is not one of a RelLSTM; take"
    ):
        flow.attention("1.l0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_and_autocast(backend: str, dtype: torch.dtype) -> None:
    layer = layer_of(backend).float()
    x = random(T, B, I, seed=1, dtype=torch.float32)
    flows = []
    for kind in ("exact", "autocast", "narrow"):
        if kind == "narrow":
            layer.to(dtype)
        with (
            throughtime.gradient_flow(layer) as flow,
            torch.autocast("cpu", dtype, enabled=kind == "autocast"),
        ):
            layer(x.to(dtype) if kind == "narrow" else x)[0].float().sum().backward()
        flows.append((*flow.gradients(), *flow.attention()[:3]))
    for found in flows[1:]:
        for x, y in zip(found, flows[0], strict=True):
            assert x.dtype == torch.float32
            assert (x - y).norm() <= 0.05 * y.norm()


def test_an_output_that_was_changed(backend: str) -> None:
    layer = layer_of(backend)
    with throughtime.gradient_flow(layer) as flow:
        output, _ = layer(random(T, B, I, seed=1))
        output.sum().backward()
    with torch.no_grad():
        output.zero_()
    assert flow.horizon()[0]["dh"] > 0  # needs no output
    with pytest.raises(RuntimeError, match=r"the output of call 0 .* was changed in place"):
        flow.attention()


def test_gradients_keep_their_bits(backend: str) -> None:
    layer, x = layer_of(backend, num_layers=2), random(T, B, I, seed=1)
    grads = []
    for watched in (False, True):
        layer.zero_grad()
        output = layer(x, reset=random_mask(T, B, p=0.3, seed=3))[0]
        if watched:
            with throughtime.gradient_flow(layer):
                output = layer(x, reset=random_mask(T, B, p=0.3, seed=3))[0]
        output.sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def said_of(forget: float, scale: float, top_k: int = 0) -> str:
    torch.manual_seed(3)
    layer = RelLSTM(4, 32, window_size=1, top_k=top_k)
    with torch.no_grad():
        layer.weight_hh_l0 *= scale
        layer.bias_ih_l0[32:64] = forget
    with throughtime.gradient_flow(layer) as flow:
        layer(torch.randn(60, 8, 4))[0][-1].sum().backward()
    return str(flow)


def test_the_verdict() -> None:
    way, told = "the gradient by h ", r" over 59 steps, and attention brings \d\d % of it there: "
    arrives = way + r"grows 10\^\d.*" + told + "the gradient arrives$"
    vanishes = way + r"falls to 10\^-\d.*" + told + "little arrives; try "
    assert re.match(arrives, said_of(2, 2, top_k=100))
    assert re.match(way + r"grows 10\^\d.*" + told + "clip the gradient, or try", said_of(3, 8))
    assert re.match(vanishes + "a larger top_k, or throughtime.init.chrono_", said_of(0, 1))
    assert re.match(vanishes + r"throughtime\.init\.chrono_", said_of(0, 1, top_k=100))
    nothing = "falls to 0 over 59 steps: nothing travels so far; try a larger top_k"
    assert said_of(-9, 0).startswith(way + nothing)


def test_a_picture(backend: str, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    layer = layer_of(backend)
    with throughtime.gradient_flow(layer) as flow:
        for _ in range(2):
            layer(random(T, B, I, seed=1))[0].sum().backward()
    path = tmp_path / "flow.svg"
    flow.plot(path)
    text = path.read_text()
    assert "recurrent" in text and "step that attends" in text
    assert text.count('<g id="axes_') == 4  # parts, updates with a bar of colours, attended


def test_a_plain_cell_has_no_hops() -> None:
    layer = layer_of("reference", cell="tanh")
    with throughtime.gradient_flow(layer) as flow:
        layer(random(T, B, I, seed=1))[0].sum().backward()
    assert not flow.gradients().dc.any() and flow.gradients().dh.any()
    with pytest.raises(
        ValueError, match=r"hops: call 0 of layer 'l0', direction 0 has cell='tanh'"
    ):
        flow.hops(2)


def test_questions_leave_the_number_of_threads_as_it_is() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        layer = layer_of("reference")
        with throughtime.gradient_flow(layer) as flow:
            layer(random(T, B, I, seed=1))[0].sum().backward()
        flow.attention()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
