"""What is measured: arithmetic by hand, shapes, peers that compute the same or say why not."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from bench.__main__ import make_parser
from bench.measure.command import choose_cases
from bench.measure.verify import Verifier
from bench.operations import OPERATIONS, lstm_peers
from bench.operations.authors_rel_lstm import AuthorsRelLSTM
from bench.operations.operation import OURS, REFERENCE, Contestant, Work
from torch import Tensor

import throughtime
from closeness import assert_close

LSTM, REL_LSTM, RELEVANCY = OPERATIONS.values()
TINY = LSTM.case(T=6, B=3, I=2, H=5, p=0.0)
SMALL: Any = {"window_size": 2, "top_k": 1}


def test_work_of_lstm_by_hand() -> None:
    case = LSTM.case(T=3, B=5, I=2, H=7)
    product = 2e-9 * 5 * 28  # of one step and one input column
    forward = product * (3 * 2 + 2 * 7)  # step 0 has no state to multiply
    assert LSTM.gflop(OURS, replace(case, mode="inference")) == pytest.approx(forward)
    both = LSTM.gflop(OURS, case)
    assert both == pytest.approx(2 * forward + product * 2 * 7)
    assert LSTM.gflop(OURS, replace(case, p=1.0)) == pytest.approx(2 * forward)
    with_input = LSTM.gflop(OURS, replace(case, input_grad=True))
    assert with_input == pytest.approx(both + product * 3 * 2)
    x, weights, output = 3 * 5 * 2, 28 * (2 + 7 + 2), 3 * 5 * 7
    moved = x + weights + output
    assert LSTM.gbyte(OURS, replace(case, mode="forward")) == pytest.approx(4e-9 * moved)
    moved += x + weights + 2 * output + weights
    assert LSTM.gbyte(OURS, replace(case, dtype="bfloat16")) == pytest.approx(2e-9 * moved)
    assert LSTM.gbyte(OURS, replace(case, input_grad=True)) == pytest.approx(4e-9 * (moved + x))


def test_work_of_relevancy_by_hand() -> None:
    # Window 2, one retained key: queries attend 1, 2, 3, 3 keys; all of them without screening.
    case = RELEVANCY.case(T=4, B=3, heads=2, D=5, mode="forward", dtype="bfloat16", **SMALL)
    assert RELEVANCY.gflop(OURS, case) == pytest.approx(1e-9 * 6 * 9 * 4 * 5)
    assert RELEVANCY.gflop("sdpa", case) == pytest.approx(1e-9 * 6 * 10 * 4 * 5)
    assert RELEVANCY.gbyte(OURS, case) == pytest.approx(2e-9 * 4 * 6 * 4 * 5)
    training = replace(case, mode="forward+backward")
    assert RELEVANCY.gflop(OURS, training) == pytest.approx(3 * RELEVANCY.gflop(OURS, case))
    assert RELEVANCY.gbyte(OURS, training) == pytest.approx(2e-9 * 11 * 6 * 4 * 5)


def test_work_of_rel_lstm_by_hand() -> None:
    # Steps 1 to 3 attend 1, 2 and 3 earlier states.
    case = REL_LSTM.case(T=4, B=3, I=2, H=5, mode="forward", **SMALL)
    attention = 1e-9 * 3 * (2 * 2 * 25 * 3 + 6 * 4 * 5)
    assert REL_LSTM.gflop(OURS, case) == pytest.approx(LSTM.gflop(OURS, case) + attention)
    assert REL_LSTM.gflop("torch", case) == pytest.approx(LSTM.gflop(OURS, case))
    more = REL_LSTM.gbyte(OURS, case) - REL_LSTM.gbyte("torch", case)
    assert more == pytest.approx(4e-9 * (2 * 25 + 5))


@pytest.mark.parametrize(
    ("words", "cases"),
    [
        ("lstm --quick", "120, 100, 1, 128 | 50, 64, 256, 256 | 300, 1, 128, 128"),
        ("lstm --T 5 --H 8 9", "5, 64, 8, 8 | 5, 64, 9, 9"),
        ("lstm --T 5 --I 3", "5, 64, 3, 256"),
        ("rel-lstm --T 30 40 --B 3 --top-k 0", "30, 3, 10, 128, 10, 0 | 40, 3, 10, 128, 10, 0"),
        ("relevancy --T 9 --D 8 16", "9, 2, 4, 8, 64, 64, 1 | 9, 2, 4, 16, 64, 64, 1"),
        ("relevancy --T 9 --score additive", "9, 2, 4, 64, 64, 64, 1, additive"),
    ],
)
def test_shapes_that_options_ask_for(words: str, cases: str) -> None:
    args = make_parser(words.split()).parse_args(words.split())
    operation = OPERATIONS[words.split()[0]]
    assert " | ".join(map(str, choose_cases(operation, args))) == cases


def test_contestants_that_would_take_too_long_have_a_reason() -> None:
    large = replace(RELEVANCY.default[0], T=131072)
    for contestant in (Contestant("sdpa"), Contestant("full"), REFERENCE):
        assert str(RELEVANCY.why_not(contestant, large)).startswith("not measured: ")
    assert RELEVANCY.why_not(Contestant(OURS, "cpu"), large) is None
    assert RELEVANCY.why_not(Contestant("sdpa"), RELEVANCY.default[-1]) is None
    slow = REL_LSTM.why_not(Contestant("loop"), REL_LSTM.default[-1])
    assert slow is not None and "a Python loop" in slow
    additive = replace(RELEVANCY.default[0], score="additive")
    no_score = "cannot run: full attention has no additive score"
    assert RELEVANCY.why_not(Contestant("sdpa"), additive) == no_score


# Peers


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",  # torch's own, in torch.compile
    "ignore:flex_attention called without torch.compile",  # in float64
)
def test_peers_of_relevancy_attend_what_they_say() -> None:
    case = RELEVANCY.case(T=40, B=2, heads=3, D=8, window_size=5, top_k=0, mode="inference")
    found = {}
    for impl in ("banded", "flex", "full", "sdpa"):
        if RELEVANCY.why_not(Contestant(impl), case) is None:
            found[impl] = RELEVANCY.work(Contestant(impl), case).iterate("inference")["output"]
    ours = RELEVANCY.work(Contestant(OURS, "cpu"), case).iterate("inference")
    assert_close(found["banded"], ours["output"])
    assert_close(found["full"], found["sdpa"])
    assert not torch.allclose(found["full"], found["banded"], atol=1e-2)
    if "flex" in found:  # needs a compiler
        assert_close(found["flex"], ours["output"])
        errors = Verifier(RELEVANCY).check(Contestant("flex"), case)
        assert errors.passed and list(errors.relative) == ["inference"]


def test_peers_that_cannot_run_say_why() -> None:
    trains = replace(RELEVANCY.typical, T=64)
    why = RELEVANCY.why_not(Contestant("flex"), trains)
    assert why is not None and "no backward pass on CPUs" in why
    missing = importlib.util.find_spec("kvpress") is None
    why = RELEVANCY.why_not(Contestant("h2o"), trains)
    assert why == ("cannot run: kvpress is not installed: pip install kvpress" if missing else None)


def test_h2o_asks_for_a_score_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The press is kvpress's; here a stand-in sees what it is given."""
    seen: dict[str, Tensor] = {}

    class ObservedAttentionPress:
        def score(
            self, _: None, __: None, keys: Tensor, values: Tensor, attentions: Tensor, ___: Any
        ) -> Tensor:
            seen.update(keys=keys, values=values, attentions=attentions)
            return attentions.sum(2)

    module = types.ModuleType("kvpress")
    module.ObservedAttentionPress = ObservedAttentionPress  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvpress", module)
    case = RELEVANCY.case(T=12, B=2, heads=3, D=4, **SMALL)
    h2o, full = (RELEVANCY.work(Contestant(impl), case).call() for impl in ("h2o", "full"))
    assert_close(h2o["output"], full["output"])
    assert_close(seen["attentions"].sum(3), torch.ones(2, 3, 12))
    assert not seen["attentions"].triu(1).any() and seen["keys"].shape == (2, 3, 12, 4)


@pytest.mark.parametrize("shape", [(4, 2, 3), (2, 2, 4, 3)], ids=["T-B-H", "B-heads-T-D"])
def test_only_the_last_step_has_a_loss(shape: tuple[int, ...]) -> None:
    x, seen = torch.ones(shape, requires_grad=True), []
    x.register_hook(seen.append)
    work = Work(lambda: {"output": x * 1}, {"x": x}, torch.ones(shape))
    work.iterate("last-step")
    time = 0 if len(shape) == 3 else 2
    assert [step.any().item() for step in seen[0].unbind(time)] == [False, False, False, True]


@pytest.mark.parametrize("input_grad", [False, True])
@pytest.mark.parametrize("impl", [OURS, "torch", "loop"])
def test_gradients_reach_the_same_tensors(impl: str, input_grad: bool) -> None:
    work = LSTM.work(Contestant(impl), replace(TINY, p=0.5, input_grad=input_grad))
    assert ("input" in work.leaves) == input_grad
    grads: Any = work.iterate("forward+backward")
    assert len(grads) == len(work.leaves) == 4 + input_grad
    for before, after in zip(grads, work.iterate("forward+backward"), strict=True):  # type: ignore[call-overload]
        assert before.abs().max() > 0
        assert torch.equal(before, after)  # not the sum of two iterations
    kept: Any = work.iterate("forward")
    inferred: Any = work.iterate("inference")
    assert kept["output"].requires_grad and not inferred["output"].requires_grad


@pytest.mark.parametrize(("window_size", "top_k"), [(2, 2), (3, 0), (30, 2), (1, 1)])
def test_the_authors_loop_computes_and_detaches_the_same(window_size: int, top_k: int) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"window_size": window_size, "top_k": top_k, "dtype": torch.float64}
    loop, ours = AuthorsRelLSTM(3, 5, **sizes), throughtime.RelLSTM(3, 5, **sizes)
    ours.load_state_dict(loop.state_dict())
    x, mask = torch.randn(14, 3, 3, dtype=torch.float64), torch.rand(14) < 0.5
    gradients = []
    for layer, detach_mask in ((loop, mask), (ours, mask), (ours, None)):
        output = layer(x, detach_mask=detach_mask)[0]
        gradients.append(
            [output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))]
        )
    for found, expected, whole in zip(*gradients, strict=True):
        assert_close(found, expected)
        assert found.shape[0] == 14 or not torch.allclose(found, whole)


def test_among_equals_the_loop_drops_the_newest() -> None:
    layer = AuthorsRelLSTM(1, 1, window_size=1, top_k=2)
    kept: list[list[Tensor]] = [[]]
    relevances: list[list[float]] = [[]]
    for step, relevance in enumerate([1.0, 1.0, 1.0, 2.0]):
        state = torch.full((1, 1), float(step))
        layer._retain(state, torch.tensor([relevance]), kept, relevances)
    assert [int(state) for state in kept[0]] == [0, 3] and relevances == [[1.0, 2.0]]


def test_verification_is_long_enough_that_keys_are_replaced() -> None:
    """The first keys have an advantage: the softmax of their queries has few terms."""
    case = RELEVANCY.case(T=4096, B=1, heads=2, D=64, window_size=16, top_k=16)
    case = RELEVANCY.shortened(case)
    found = RELEVANCY.work(REFERENCE, case, exact=True).call()["last"]
    old = torch.arange(case.T) <= case.T - 1 - 16
    kept = old & (found[0] == case.T - 1)
    assert (kept.sum(1) == 16).all() and kept[:, 16:].any(1).all()


def test_the_compiled_loop_compiles_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda step, **options: compiled.append(step) or step)
    monkeypatch.setattr(lstm_peers, "_compiled_step", lstm_peers._compiled_step.__wrapped__)
    assert Verifier(LSTM).check(Contestant("compiled-loop"), replace(TINY, p=0.5)).passed
    assert set(compiled) == {lstm_peers.lstm_step}
    monkeypatch.setattr(lstm_peers.shutil, "which", lambda name: None)
    reason = LSTM.why_not(Contestant("compiled-loop"), TINY)
    assert reason == "torch.compile needs a C++ compiler, and there is no c++ here"
    assert LSTM.why_not(Contestant("loop"), TINY) is None
