"""``nn.LSTM`` on our kernels: the numbers, types and random numbers of torch's own operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import test_parity_nn_lstm as parity
from cases import random
from closeness import assert_all_close, assert_rule
from throughtime import LSTM, accelerate
from throughtime.acceleration.call import SPEEDS, why_slow

KERNELS = {"cpu kernels"}


def layer(dtype: torch.dtype = torch.float64, **options: Any) -> nn.LSTM:
    torch.manual_seed(1)
    return nn.LSTM(parity.INPUT_SIZE, parity.H, dtype=dtype, **options)


@pytest.mark.parametrize("kind", parity.INPUTS)
@pytest.mark.parametrize("options", parity.OPTIONS, ids=parity.name_of)
def test_results_and_gradients(options: dict[str, Any], kind: str) -> None:
    lstm = layer(**options)
    for with_states in (False, True):
        expected = parity.run(lstm, kind, with_states)
        with accelerate() as handle:
            found = parity.run(lstm, kind, with_states)
        assert set(handle.calls) == KERNELS
        assert_all_close(found, expected)
        for name in parity.RESULTS:
            assert found[name].stride() == expected[name].stride()


@pytest.mark.parametrize("kind", parity.INPUTS)
def test_dropout_draws_the_same_random_numbers(kind: str) -> None:
    lstm, found = layer(num_layers=3, dropout=0.5, bidirectional=True), []
    for on in (False, True):
        torch.manual_seed(5)
        if on:
            with accelerate() as handle:
                found.append(parity.run(lstm, kind, True))
        else:
            found.append(parity.run(lstm, kind, True))
        found[-1]["drawn next"] = torch.rand(1).double()
    assert set(handle.calls) == KERNELS
    assert_all_close(found[1], found[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    lstm, x = layer(), random(4, 3, 2, seed=1)
    with mode():
        expected = lstm(x)[0]
        with accelerate() as handle:
            found = lstm(x)[0]
            again = lstm(found[..., :2])[0]  # of a tensor that the mode made
    assert handle.calls == {"cpu kernels": 2}
    assert_all_close({"output": found}, {"output": expected})
    assert found.is_inference() == again.is_inference() == (mode is torch.inference_mode)


@pytest.mark.parametrize("packed", [False, True])
def test_one_step_without_gradients_is_the_originals(packed: bool) -> None:
    lstm, x = nn.LSTM(2, 3), torch.zeros(1, 1, 2)
    given = pack_sequence([x[0]]) if packed else x
    with accelerate() as handle:
        lstm(given)
        with torch.no_grad():
            lstm(given)
        with torch.inference_mode():
            lstm(given)
    reason = "original: one step without gradients, which torch's does faster"
    assert handle.calls == {"cpu kernels": 1, reason: 2}


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("low", "autocast"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_sixteen_bits(low: torch.dtype, autocast: bool, packed: bool, projected: bool) -> None:
    """The original's dtypes, and at most twice its error."""
    dtype = torch.float32 if autocast else low
    exact = nn.LSTM(8, 16, proj_size=4 if projected else 0).to(dtype).double()
    lstm = nn.LSTM(8, 16, proj_size=4 if projected else 0, dtype=dtype)
    lstm.load_state_dict(exact.state_dict())
    rows = [random(length, 8, seed=length).to(dtype) for length in (9, 9 - 4 * packed)]

    def run(lstm: nn.LSTM) -> dict[str, Tensor]:
        given = [x.to(lstm.weight_ih_l0.dtype) for x in rows]
        output, (h_n, c_n) = lstm(pack_sequence(given) if packed else torch.stack(given, 1))
        output = output.data if packed else output
        loss = output.double().square().sum() + c_n.double().sum()
        names, weights = zip(*lstm.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, weights)
        results = {"output": output, "h_n": h_n, "c_n": c_n} | dict(zip(names, grads, strict=True))
        return {name: x.detach() for name, x in results.items()}

    with torch.autocast("cpu", low, enabled=autocast):
        plain = run(lstm)
        with accelerate() as handle:
            found = run(lstm)
    reason = why_slow("cpu", low)
    assert set(handle.calls) == (KERNELS if reason is None else {f"original: {reason}"})
    assert_rule(found, plain, run(exact))


def test_every_dtype_that_is_not_taken_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for (device, dtype), speed in SPEEDS.items():
        reason = why_slow(device, dtype)
        assert reason is None if speed.takes() else reason and speed.why in reason
    assert why_slow("mps", torch.float32) == "there is no kernel for torch.float32 on mps"
    monkeypatch.delitem(SPEEDS, ("cpu", torch.float32))
    with accelerate() as handle:
        nn.LSTM(2, 3)(torch.zeros(1, 1, 2))
    assert handle.calls == {"original: there is no kernel for torch.float32 on cpu": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hx": [torch.zeros(1, 2, 4)] * 3}, "3 states"),
        ({"hx": [torch.zeros(1, 2, 4), torch.zeros(1, 2, 4).double()]}, "several dtypes"),
        ({"hx": [torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)]}, "sizes that do not belong"),
        ({"hx": [torch.zeros(2, 4)] * 2}, "sizes that do not belong"),
        ({"input": torch.zeros(0, 2, 3)}, "sizes that do not belong"),
        ({"input": torch.zeros(5, 2, 3).to_mkldnn()}, "not plain"),
        ({"input": torch.zeros(5, 2, 4)}, "sizes that do not belong"),
        ({"has_biases": False}, "sizes that do not belong"),
        ({"num_layers": 2}, "sizes that do not belong"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_gets_the_originals_answer(change: dict[str, Any], reason: str) -> None:
    given = {
        "input": torch.zeros(5, 2, 3), "hx": [torch.zeros(1, 2, 4)] * 2,
        "params": list(nn.LSTM(3, 4).parameters()), "has_biases": True, "num_layers": 1,
        "dropout": 0.0, "train": False, "bidirectional": False, "batch_first": False,
    } | change  # fmt: skip

    def answer() -> object:
        try:
            return [x.shape for x in torch.ops.aten.lstm.input(**given)]
        except (RuntimeError, IndexError) as error:
            return str(error)

    expected = answer()
    with accelerate() as handle:
        assert answer() == expected
    (counted,) = handle.calls
    assert counted.startswith("original: ") and reason in counted


def test_masks_are_those_of_our_layer() -> None:
    lstm, x = layer(num_layers=2), random(40, 3, 2, seed=1)
    ours = LSTM.from_torch(lstm, detach_prob=0.5)
    wanted = torch.autograd.grad(
        ours(x, generator=torch.Generator().manual_seed(3))[0].sum(), list(ours.parameters())
    )
    with accelerate(detach_prob=0.5, generator=torch.Generator().manual_seed(3)):
        found = torch.autograd.grad(lstm(x)[0].sum(), list(lstm.parameters()))
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)


def test_masks_are_drawn_in_training_with_gradients_alone() -> None:
    lstm, x = layer(), random(40, 3, 2, seed=1)

    def draws() -> bool:
        before = torch.get_rng_state()
        lstm(x)
        return not torch.equal(torch.get_rng_state(), before)

    assert not draws()
    with accelerate(detach_prob=0.5) as handle:
        assert draws()
        with torch.no_grad():
            assert not draws()
        lstm.eval()
        assert not draws()
        lstm.train()
        handle.detach_prob = 0.0
        assert not draws()


def test_shared_masks() -> None:
    lstm, x = layer(num_layers=2), random(40, 3, 2, seed=1)
    ours = LSTM.from_torch(lstm, detach_prob=0.5, detach_shared=True)
    torch.manual_seed(3)
    wanted = torch.autograd.grad(ours(x)[0].sum(), ours.weight_hh_l0)[0]
    torch.manual_seed(3)
    with accelerate(detach_prob=0.5, detach_shared=True):
        assert torch.equal(torch.autograd.grad(lstm(x)[0].sum(), lstm.weight_hh_l0)[0], wanted)
