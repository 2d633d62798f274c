"""The trainer: what it learns, in which order, and that a loaded state continues to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from bench.train.attention import Transformer
from bench.train.config import Config
from bench.train.model import LAYERS
from bench.train.trainer import Epoch, Trainer, TrainingError, best

import throughtime

TINY = Config(
    "copying",
    T=3,
    hidden=8,
    batch=4,
    p=0.5,
    anneal=1,
    epochs=4,
    updates_per_epoch=3,
    train_size=20,
    threads=1,
)
SCREENING: dict[str, Any] = {
    "layer": "rel-lstm",
    "p": 0.0,
    "anneal": 0,
    "train_size": 0,
    "one_hot": True,
    "window_size": 2,
    "top_k": 3,
}
TIMES = ("seconds", "cpu_seconds", "sequences_per_s")


def trained(**changes: Any) -> Trainer:
    trainer = Trainer(dataclasses.replace(TINY, **changes))
    trainer.run(lambda epoch: None)
    return trainer


def without_times(history: Iterable[Epoch]) -> list[dict[str, Any]]:
    rows = [dataclasses.asdict(epoch) for epoch in history]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def test_three_layers_learn_the_same_from_the_same_seed() -> None:
    ours, theirs, loop = (
        torch.tensor([e.loss for e in trained(layer=layer, p=0.0, anneal=0).history])
        for layer in ("throughtime", "torch", "loop")
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)
    torch.testing.assert_close(theirs, loop, rtol=1e-5, atol=0)


def test_loop_and_throughtime_draw_the_same_masks() -> None:
    ours, loop, undetached = (
        trained(layer=layer, p=p, anneal=0).model.state_dict()["layer.weight_hh_l0"]
        for layer, p in (("throughtime", 0.5), ("loop", 0.5), ("throughtime", 0.0))
    )
    torch.testing.assert_close(ours, loop, rtol=0, atol=1e-5)
    assert (ours - undetached).abs().max() > 1e-4


SCREENS = [name for name, layer in LAYERS.items() if layer.screens]


@pytest.mark.parametrize("layer", [name for name in SCREENS if "attention" not in name])
def test_every_screening_layer_trains(layer: str) -> None:
    trainer = trained(**SCREENING | {"layer": layer, "epochs": 3, "updates_per_epoch": 20})
    assert trainer.history[-1].loss < trainer.history[0].loss
    built = trainer.model.layer
    assert isinstance(built, throughtime.RelLSTM) and built.window_size == 2
    assert built.top_k == (None if layer.startswith("mem") else 3)
    assert (built.retain == "first") == (layer == "rel-first")
    assert (built.cell == "tanh") == layer.endswith("rnn")


def test_the_transformer_attends_as_its_options_say() -> None:
    given = {"layer": "rel-attention", "screen_every": 7, "normalize": True}
    trainers = [trained(**SCREENING | options) for options in (given, {"layer": "attention"})]
    for trainer in trainers:
        assert trainer.history[-1].loss < trainer.history[0].loss
    built, full = (trainer.model.layer for trainer in trainers)
    for block in built.blocks:
        attention = block.attention
        assert isinstance(attention, throughtime.RelevancyAttention)
        assert (attention.window_size, attention.top_k) == (2, 3)
        assert (attention.screen_every, attention.normalize) == (7, True)
    x = torch.randn(12, 2, built.embedding.in_features)
    # Full attention: the first step reaches the last; with a window of 2 and nothing retained
    # that takes a block per step.
    for layer, reaches in (
        (full, True),
        (Transformer(x.size(2), 8, window_size=2, top_k=0), False),
    ):
        leaf = x.clone().requires_grad_()
        layer(leaf)[0][-1].sum().backward()
        assert bool(leaf.grad[0].any()) == reaches


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer": "loop"},
        {"layer": "torch", "p": 0.0, "anneal": 0},
        SCREENING,
        SCREENING | {"layer": "rel-attention"},
    ],
    ids=lambda options: options.get("layer", "throughtime"),
)
def test_a_loaded_state_continues_to_the_bit(options: dict[str, Any]) -> None:
    whole = trained(**options)
    config = dataclasses.replace(TINY, **options)
    first = Trainer(config)
    first.run(lambda epoch: None, until=2)
    state = first.state_dict()
    torch.manual_seed(99)
    rest = Trainer(config)
    rest.load_state_dict(state)
    rest.run(lambda epoch: None)
    assert without_times(rest.history) == without_times(whole.history)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(rest.model.state_dict()[name], value), name


def test_p_is_annealed_and_reaches_the_layer() -> None:
    trainer = Trainer(TINY)
    seen: list[Any] = []
    trainer.model.layer.register_forward_hook(
        lambda layer, *rest: seen.append(layer.detach_prob) if layer.training else None
    )
    trainer.run(lambda epoch: None)
    assert [epoch.p for epoch in trainer.history] == [0.5, 0.5, 0.5, 0.0]
    assert seen == [0.5] * 9 + [0.0] * 3


def test_gradient_norm_is_taken_before_clipping() -> None:
    free, clipped = (trained(clip=clip, epochs=1) for clip in (1e6, 1e-3))
    assert min(trainer.history[0].grad_norm_max for trainer in (free, clipped)) > 0.1
    assert not torch.equal(free.model.head.weight, clipped.model.head.weight)


def test_nothing_is_learned_from_validation_and_test() -> None:
    trainer = Trainer(TINY)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    assert 0 <= trainer.evaluate(trainer.task.test).accuracy <= 1
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], v) for n, v in trainer.model.state_dict().items())


@pytest.mark.parametrize("answer", [0, 4])
def test_accuracy_counts_the_last_ten_steps(answer: int) -> None:
    trainer = Trainer(TINY)
    with torch.no_grad():
        trainer.model.head.weight.zero_()
        trainer.model.head.bias.copy_(torch.arange(9) == answer)  # whatever the input
    sequences = trainer.task.test
    _, y = sequences.batch(torch.arange(len(sequences)))
    expected = float((y[-10:] == answer).float().mean())
    assert (expected == 0) == (answer == 0)  # 0 is right everywhere but in the last ten steps
    assert trainer.evaluate(sequences).accuracy == pytest.approx(expected)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_weights_change(where: str) -> None:
    trainer = Trainer(TINY)
    if where == "loss":
        with torch.no_grad():
            trainer.model.head.bias.fill_(float("nan"))
    else:
        trainer.model.layer.weight_hh_l0.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[operator,union-attr]
    before = [value.clone() for value in trainer.model.parameters()]
    with pytest.raises(TrainingError, match=r"at update 1 \(epoch 1\); try a smaller --lr"):
        trainer.run(lambda epoch: None)
    for value, old in zip(trainer.model.parameters(), before, strict=True):
        torch.testing.assert_close(value, old, rtol=0, atol=0, equal_nan=True)


def test_memory_that_runs_out_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(TINY)

    def fail(*inputs: object) -> None:
        torch.empty(2**55)  # more than any machine has

    trainer.model.layer.register_forward_hook(fail)
    with pytest.raises(TrainingError, match=r"out of memory in epoch 1: make --hidden, --batch"):
        trainer.run(lambda epoch: None)


def test_best_epoch_is_chosen_by_validation_alone() -> None:
    rows = [(1, 0.5, 0.9), (2, 0.7, 0.1), (3, 0.7, 0.8)]
    history = [
        Epoch(n, n, 1.0, 1.0, 1.0, 1.0, v, t, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0) for n, v, t in rows
    ]
    assert best(history).epoch == 2
