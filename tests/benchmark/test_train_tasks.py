"""The data of the training tasks: digits, copying, denoise."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bench.__main__ import main
from bench.train import digits, recall
from bench.train.config import Config
from bench.train.task import Sequences, Task

# Copying and denoise


def recall_task(task: str = "copying", **options: Any) -> Task:
    config = Config(task, T=2, train_size=9, updates_per_epoch=5)
    return recall.make(replace(config, **options))


@pytest.mark.parametrize("delay", [1, 2, 100])
def test_copying_layout(delay: int) -> None:
    task = recall_task(T=delay)
    x, y = task.train.batch(torch.tensor([6, 0]))
    assert x.shape == (delay + 20, 2, 1) and x.dtype == torch.float32
    assert not x[10 : 10 + delay - 1].any() and not x[10 + delay :].any()
    assert (x[10 + delay - 1] == 9).all()
    assert y.shape == (delay + 20, 2) and y.dtype == torch.int64
    assert not y[: delay + 10].any() and torch.equal(y[-10:].float(), x[:10, :, 0])
    assert (task.scored_steps, task.target_steps, task.classes) == (10, delay + 20, 9)


@pytest.mark.parametrize("delay", [1, 7, 60])
def test_denoise_layout(delay: int) -> None:
    task = recall_task("denoise", T=delay, train_size=20, one_hot=True)
    x, y = task.train.batch(torch.arange(20))
    assert x.shape == (delay + 20, 20, 11) and (x.sum(2) == 1).all()
    symbols = x.argmax(2)
    assert (symbols[delay + 9] == 10).all() and not symbols[delay + 10 :].any()
    for k in range(20):
        shown = symbols[: delay + 9, k]
        shown = shown[shown > 0]
        assert len(shown) == 10 and (shown <= 8).all() and torch.equal(shown, y[-10:, k])
    assert not y[:-10].any()
    assert task.classes == 10 and task.target_steps == delay + 20


def test_the_first_steps_of_denoise_hold_few_symbols() -> None:
    """A policy that keeps the first 15 states must fail: they show 15 of 209 steps."""
    x, _ = recall_task("denoise", T=200, train_size=200).train.batch(torch.arange(200))
    assert 0.3 < (x[:15] > 0).float().sum(0).mean() < 1.2


def test_symbols_are_uniform_from_1_to_8() -> None:
    x, _ = recall_task(train_size=4000).train.batch(torch.arange(4000))
    counts = torch.bincount(x[:10].flatten().long(), minlength=10)
    assert counts[0] == counts[9] == 0
    assert (counts[1:9] / 40000 - 1 / 8).abs().max() < 0.01


def test_one_hot_shows_the_same_symbols() -> None:
    plain, hot = (recall_task(one_hot=one_hot) for one_hot in (False, True))
    (x, y), (z, w) = (task.train.batch(torch.arange(6)) for task in (plain, hot))
    assert torch.equal(x[..., 0].long(), z.argmax(2)) and torch.equal(y, w)
    assert hot.features == z.shape[2] == 10


def test_recall_comes_from_its_seed() -> None:
    def batch(seed: int) -> torch.Tensor:
        task = recall_task(seed=seed)
        return torch.cat([s.batch(torch.arange(9))[0] for s in (task.train, task.test)], dim=1)

    assert torch.equal(batch(1), batch(1)) and not torch.equal(batch(1), batch(2))
    assert not torch.equal(batch(1)[:, :9], batch(1)[:, 9:])


def test_recall_draws_with_replacement() -> None:
    order = recall_task(train_size=3).order(8, torch.Generator().manual_seed(0))
    assert [len(indices) for indices in order] == [8] * 5
    assert {int(i) for indices in order for i in indices} == {0, 1, 2}


@pytest.mark.parametrize("task", ["copying", "denoise"])
def test_a_stream_never_repeats_and_depends_on_its_indices_alone(task: str) -> None:
    one, other = (recall_task(task, train_size=0, seed=seed).train for seed in (0, 1))
    assert isinstance(one, recall.Stream)
    index = torch.tensor([7, 1])
    assert torch.equal(one.batch(index)[0], one.batch(index)[0])
    assert not torch.equal(one.batch(index)[1], other.batch(index)[1])
    for step in (1, 2**16, 2**32):
        assert not torch.equal(one.batch(index)[0], one.batch(index + step)[0])
    # Neighbouring indices give unrelated symbols: 1 of 8 agrees by chance.
    batches = [one.batch(torch.tensor([k] * 50))[1][-10:] for k in range(40)]
    agree = [(a == b).float().mean().item() for a, b in itertools.pairwise(batches)]
    assert abs(sum(agree) / len(agree) - 1 / 8) < 0.01


# Digits


def test_digits_are_1797_images_in_three_disjoint_sets() -> None:
    task = digits.make(Config("digits"))
    sets = [task.train, task.validation, task.test]
    batches = [s.batch(torch.arange(len(s))) for s in sets]
    rows = [tuple(row.tolist()) for x, _ in batches for row in x[..., 0].T]
    assert len(rows) == 1797
    assert len(set(rows)) == len(set(rows[:1438])) + len(set(rows[1438:]))
    x, y = task.train.batch(torch.arange(5))
    assert x.shape == (64, 5, 1) and y.shape == (1, 5)
    assert batches[0][0].min() == 0 and batches[0][0].max() == 1
    order = task.order(100, torch.Generator().manual_seed(0))
    assert sorted(int(i) for part in order for i in part) == list(range(len(task.train)))


def test_a_split_has_the_same_share_of_every_class() -> None:
    labels = torch.arange(10).repeat_interleave(torch.arange(20, 30))
    everything = Sequences(torch.arange(len(labels)), labels.unsqueeze(1))
    first, second = digits.split(everything, 0.25)
    assert sorted([*first.inputs, *second.inputs]) == list(range(len(labels)))
    shares = torch.bincount(second.targets.flatten()) / torch.bincount(labels)
    assert (shares - 0.25).abs().max() <= 0.5 / 20


def test_permutation_is_fixed_and_the_same_for_all_sets() -> None:
    plain = digits.make(Config("digits"))
    one, again, other = (
        digits.make(Config("digits", permute=True, permute_seed=seed)) for seed in (5, 5, 6)
    )
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    for name in ("train", "validation", "test"):
        x, y = getattr(plain, name).batch(torch.arange(20))
        for task, same in ((one, True), (again, True), (other, False)):
            x_permuted, y_permuted = getattr(task, name).batch(torch.arange(20))
            assert torch.equal(x_permuted, x[order]) == same and torch.equal(y_permuted, y)


# MNIST


def test_mnist_is_what_scikit_learn_keeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data, labels = np.arange(60 * 784).reshape(60, 784) % 256, np.arange(60) % 10

    def fetch(name: str, **options: Any) -> SimpleNamespace:
        assert (name, options["data_home"]) == ("mnist_784", str(tmp_path))
        return SimpleNamespace(data=data, target=labels.astype(str))

    monkeypatch.setattr(digits, "fetch_openml", fetch)
    monkeypatch.setattr(digits, "MNIST_TEST", 10)
    task = digits.make(Config("digits", mnist=str(tmp_path)))
    assert (len(task.train), len(task.validation), len(task.test)) == (40, 10, 10)
    x, y = task.test.batch(torch.arange(10))
    assert x.shape == (784, 10, 1) and torch.equal(y[0], torch.arange(10))
    assert torch.equal(x[..., 0].T, torch.tensor(data[50:] / 255, dtype=torch.float32))


@pytest.mark.parametrize("error", [OSError("no network\nat all"), ValueError("a broken file")])
def test_no_mnist_is_a_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(name: str, **options: Any) -> None:
        raise error

    monkeypatch.setattr(digits, "fetch_openml", fetch)
    assert main(["train", "digits", "--mnist", "here", "--out", "run"]) == 2
    reason = str(error).split("\n")[0]
    wanted = f"error: --mnist: wanted MNIST in here, or from openml.org, got: {reason}; name a "
    assert capsys.readouterr().err.startswith(wanted) and not Path("run").exists()
