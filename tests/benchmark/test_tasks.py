"""Data, trainer and record of the training tasks."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench import train
from bench.errors import UsageError
from bench.tasks import copying, digits, idx, record
from bench.tasks.config import Config
from bench.tasks.record import Epoch, RunFolder
from bench.tasks.trainer import NonFiniteLossError, Trainer

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
TIMES = {"seconds", "sequences_per_s"}


@pytest.fixture(autouse=True)
def _small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "VALIDATION_SIZE", 30)
    monkeypatch.setattr(copying, "TEST_SIZE", 40)


def trained(config: Config) -> Trainer:
    trainer = train.make_trainer(config)
    trainer.run(on_epoch=lambda epoch: None)
    return trainer


def without_times(history: list[Epoch]) -> list[dict[str, float]]:
    return [
        {k: v for k, v in dataclasses.asdict(epoch).items() if k not in TIMES} for epoch in history
    ]


# Copying


@pytest.mark.parametrize("delay", [1, 2, 100])
def test_copying_layout(delay: int) -> None:
    task = copying.make(delay, train_size=7, updates_per_epoch=2, seed=3)
    x, y = task.train.batch(torch.tensor([6, 0]))
    symbols = x[:10, :, 0]
    assert x.shape == (delay + 20, 2, 1)
    assert x.dtype == torch.float32
    assert torch.equal(x[10 : 10 + delay - 1], torch.zeros(delay - 1, 2, 1))
    assert torch.equal(x[10 + delay - 1], torch.full((2, 1), 9.0))
    assert torch.equal(x[10 + delay :], torch.zeros(10, 2, 1))
    assert y.shape == (delay + 20, 2)
    assert torch.equal(y[: delay + 10], torch.zeros(delay + 10, 2, dtype=torch.int64))
    assert torch.equal(y[-10:].float(), symbols)
    assert (task.scored_steps, task.target_steps, task.classes) == (10, delay + 20, 9)


def test_copying_symbols_are_uniform_from_1_to_8() -> None:
    task = copying.make(1, train_size=4000, updates_per_epoch=1, seed=0)
    x, _ = task.train.batch(torch.arange(4000))
    counts = torch.bincount(x[:10].flatten().long(), minlength=10)
    assert counts[0] == counts[9] == 0
    assert (counts[1:9] / 40000 - 1 / 8).abs().max() < 0.01


def test_copying_comes_from_its_seed() -> None:
    def batch(seed: int) -> torch.Tensor:
        task = copying.make(2, train_size=9, updates_per_epoch=1, seed=seed)
        return torch.cat([s.batch(torch.arange(9))[0] for s in (task.train, task.test)], dim=1)

    assert torch.equal(batch(1), batch(1))
    assert not torch.equal(batch(1), batch(2))
    assert not torch.equal(batch(1)[:, :9], batch(1)[:, 9:])


def test_copying_order_draws_with_replacement() -> None:
    task = copying.make(2, train_size=3, updates_per_epoch=5, seed=0)
    order = task.order(8, torch.Generator().manual_seed(0))
    assert [len(indices) for indices in order] == [8] * 5
    assert {int(i) for indices in order for i in indices} == {0, 1, 2}


# Digits


def test_digits_split_is_disjoint_and_stratified() -> None:
    labels = torch.arange(10).repeat_interleave(torch.arange(20, 30))
    first, second = digits.stratified_split(labels, 0.25, seed=0)
    assert sorted(first.tolist() + second.tolist()) == list(range(len(labels)))
    shares = torch.bincount(labels[second]) / torch.bincount(labels)
    assert (shares - 0.25).abs().max() <= 0.5 / 20


def test_digits_are_1797_images_of_64_steps() -> None:
    task = digits.make()
    sets = (task.train, task.validation, task.test)
    rows = [tuple(row.tolist()) for s in sets for row in s.batch(torch.arange(len(s)))[0][..., 0].T]
    assert sum(len(s) for s in sets) == len(rows) == 1797
    assert len(set(rows)) == len(set(rows[:1438])) + len(set(rows[1438:]))
    x, y = task.train.batch(torch.arange(5))
    assert x.shape == (64, 5, 1)
    assert y.shape == (1, 5)
    pixels = task.train.batch(torch.arange(len(task.train)))[0]
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_digits_order_takes_each_sequence_once() -> None:
    task = digits.make()
    order = task.order(100, torch.Generator().manual_seed(0))
    assert sorted(int(i) for indices in order for i in indices) == list(range(len(task.train)))


def test_permutation_is_fixed_and_the_same_for_all_sets() -> None:
    plain, permuted, again = (digits.make(permute_seed=seed) for seed in (None, 5, 5))
    order = digits.permutation(64, 5)
    assert sorted(order.tolist()) == list(range(64))
    assert order.tolist() != list(range(64))
    assert order.tolist() != digits.permutation(64, 6).tolist()
    for name in ("train", "validation", "test"):
        x, y = getattr(plain, name).batch(torch.arange(20))
        for task in (permuted, again):
            x_permuted, y_permuted = getattr(task, name).batch(torch.arange(20))
            assert torch.equal(x_permuted, x[order])
            assert torch.equal(y_permuted, y)


# IDX files


def idx_bytes(values: torch.Tensor) -> bytes:
    header = bytes((0, 0, 8, values.dim())) + struct.pack(f">{values.dim()}I", *values.shape)
    return header + bytes(values.flatten().tolist())


def write_mnist(folder: Path, separator: str = "-", *, zipped: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        for name, values in (("images", images), ("labels", labels)):
            path = folder / f"{part}-{name}{separator}idx{values.dim()}-ubyte"
            content = idx_bytes(values)
            if zipped:
                path, content = path.with_name(path.name + ".gz"), gzip.compress(content)
            path.write_bytes(content)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("separator", ["-", "."])
def test_mnist_in_every_spelling(tmp_path: Path, separator: str, zipped: bool) -> None:
    write_mnist(tmp_path, separator, zipped=zipped)
    images, labels = idx.read_pair(tmp_path, "train")
    expected = torch.randint(
        256, (60, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    assert torch.equal(images, expected)
    assert labels.tolist() == [k % 10 for k in range(60)]
    task = digits.make(mnist=tmp_path)
    assert (len(task.train), len(task.validation), len(task.test)) == (50, 10, 20)
    x, _ = task.train.batch(torch.arange(3))
    assert x.shape == (784, 3, 1)
    assert 0 <= x.min() <= x.max() <= 1


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
BREAKAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (
        lambda d: (d / LABELS).unlink(),
        (LABELS, LABELS + ".gz", "train-labels.idx1-ubyte", "download the missing file"),
    ),
    "empty": (lambda d: (d / IMAGES).write_bytes(b""), (IMAGES, "00 00 08 03", "empty file")),
    "web page": (
        lambda d: (d / IMAGES).write_bytes(b"<html>"),
        (IMAGES, "00 00 08 03", "3c 68 74 6d"),
    ),
    "labels for images": (
        lambda d: (d / IMAGES).write_bytes((d / LABELS).read_bytes()),
        (IMAGES, "00 00 08 03", "00 00 08 01"),
    ),
    "short header": (
        lambda d: (d / IMAGES).write_bytes(bytes((0, 0, 8, 3, 0, 0))),
        (IMAGES, "a header of 16 bytes", "found 6 bytes"),
    ),
    "truncated": (
        lambda d: (d / IMAGES).write_bytes((d / IMAGES).read_bytes()[:-5]),
        (IMAGES, "47040 bytes after the header (60 x 28 x 28)", "47035: it is truncated"),
    ),
    "too long": (
        lambda d: (d / LABELS).write_bytes((d / LABELS).read_bytes() + b"x"),
        (LABELS, "60 bytes", "61: it is too long"),
    ),
    "other size": (
        lambda d: (d / IMAGES).write_bytes(idx_bytes(torch.zeros(60, 32, 32, dtype=torch.uint8))),
        (IMAGES, "28 x 28", "32 x 32"),
    ),
    "fewer labels": (
        lambda d: (d / LABELS).write_bytes(idx_bytes(torch.zeros(59, dtype=torch.uint8))),
        (LABELS, "60 labels, one for each image", "59 labels"),
    ),
    "label 10": (
        lambda d: (d / LABELS).write_bytes(idx_bytes(torch.full((60,), 10, dtype=torch.uint8))),
        (LABELS, "labels from 0 to 9", "a label 10"),
    ),
    "no image": (
        lambda d: [
            (d / IMAGES).write_bytes(idx_bytes(torch.zeros(0, 28, 28, dtype=torch.uint8))),
            (d / LABELS).write_bytes(idx_bytes(torch.zeros(0, dtype=torch.uint8))),
        ],
        (IMAGES, "one image or more", "found none"),
    ),
    "broken gzip": (
        lambda d: (d / IMAGES).write_bytes(gzip.compress((d / IMAGES).read_bytes())[:-9]),
        (IMAGES, "a complete gzip file", "download the file again"),
    ),
    "gzip checksum": (
        lambda d: (d / IMAGES).write_bytes(
            gzip.compress((d / IMAGES).read_bytes())[:-8] + bytes(8)
        ),
        (IMAGES, "a complete gzip file", "CRC"),
    ),
    "not gzip": (
        lambda d: (d / IMAGES).rename(d / (IMAGES + ".gz")),
        (IMAGES + ".gz", "a complete gzip file", "Not a gzipped file"),
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_mnist_errors_name_file_wanted_found_and_way_out(tmp_path: Path, name: str) -> None:
    write_mnist(tmp_path)
    breakage, words = BREAKAGES[name]
    breakage(tmp_path)
    with pytest.raises(UsageError) as caught:
        digits.make(mnist=tmp_path)
    for word in (*words, str(tmp_path), "download the"):
        assert word in str(caught.value)


def test_mnist_without_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no folder .*nowhere; wanted one with the four files"):
        digits.make(mnist=tmp_path / "nowhere")


# Trainer


def test_three_layers_learn_the_same_from_the_same_seed() -> None:
    config = dataclasses.replace(TINY, p=0.0, anneal=0)
    losses = {
        layer: torch.tensor(
            [e.loss for e in trained(dataclasses.replace(config, layer=layer)).history]
        )
        for layer in ("throughtime", "torch", "loop")
    }
    torch.testing.assert_close(losses["torch"], losses["throughtime"], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["torch"], losses["loop"], rtol=1e-5, atol=0)


def test_loop_and_throughtime_draw_the_same_masks() -> None:
    ours, loop, undetached = (
        trained(dataclasses.replace(TINY, layer=layer, p=p, anneal=0)).model.state_dict()
        for layer, p in (("throughtime", 0.5), ("loop", 0.5), ("throughtime", 0.0))
    )
    name = "layer.weight_hh_l0"
    torch.testing.assert_close(ours[name], loop[name], rtol=0, atol=1e-5)
    assert (ours[name] - undetached[name]).abs().max() > 1e-4


def test_equal_configurations_give_equal_bits() -> None:
    first, second, other = (trained(dataclasses.replace(TINY, seed=seed)) for seed in (0, 0, 1))
    assert without_times(first.history) == without_times(second.history)
    assert without_times(first.history) != without_times(other.history)


def test_p_is_annealed_and_reaches_the_layer() -> None:
    trainer = train.make_trainer(TINY)
    seen = []
    trainer.run(
        on_epoch=lambda epoch: None,
        progress=lambda *numbers: seen.append(trainer.model.layer.detach_prob),
    )
    assert [epoch.p for epoch in trainer.history] == [0.5, 0.5, 0.5, 0.0]
    assert seen == [0.5] * 9 + [0.0] * 3


def test_until_stops_early_and_goes_on() -> None:
    trainer = train.make_trainer(TINY)
    for until in (1, 3, 4):
        trainer.run(on_epoch=lambda epoch: None, until=until)
        assert len(trainer.history) == until
    assert without_times(trainer.history) == without_times(trained(TINY).history)


def test_gradient_norm_is_taken_before_clipping() -> None:
    free, clipped = (trained(dataclasses.replace(TINY, clip=c, epochs=1)) for c in (1e6, 1e-3))
    first = [trainer.history[0].grad_norm_max for trainer in (free, clipped)]
    assert min(first) > 0.1
    assert not torch.equal(free.model.head.weight, clipped.model.head.weight)


def test_nothing_is_learned_from_validation_and_test() -> None:
    trainer = train.make_trainer(TINY)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    assert 0 <= trainer.accuracy(trainer.task.test) <= 1
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], v) for n, v in trainer.model.state_dict().items())


@pytest.mark.parametrize("answer", [0, 4])
def test_accuracy_counts_the_last_ten_steps(answer: int) -> None:
    trainer = train.make_trainer(TINY)
    with torch.no_grad():
        trainer.model.head.weight.zero_()
        trainer.model.head.bias.copy_(torch.arange(9) == answer)  # whatever the input
    sequences = trainer.task.test
    _, y = sequences.batch(torch.arange(len(sequences)))
    expected = float((y[-10:] == answer).float().mean())
    assert (expected == 0) == (answer == 0)  # 0 is right everywhere but in the last ten steps
    assert trainer.accuracy(sequences) == pytest.approx(expected)


def test_non_finite_loss_names_update_and_way_out() -> None:
    trainer = train.make_trainer(TINY)
    with torch.no_grad():
        trainer.model.head.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"nan at update 1 \(epoch 1\).*smaller --lr"):
        trainer.run(on_epoch=lambda epoch: None)


# Record and resume


@pytest.mark.parametrize("layer", ["throughtime", "loop", "torch"])
def test_resume_is_bit_identical(tmp_path: Path, layer: str) -> None:
    config = dataclasses.replace(TINY, layer=layer)
    if layer == "torch":
        config = dataclasses.replace(config, p=0.0, anneal=0)
    whole = trained(config)

    folder = RunFolder(tmp_path)
    folder.start(config, {})
    broken_off = train.make_trainer(config)

    def save_and_stop_after_two(epoch: Epoch) -> None:
        folder.save(broken_off.state_dict(), broken_off.history)
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off.run(save_and_stop_after_two)
    torch.manual_seed(99)
    resumed = train.make_trainer(config)
    state = folder.resume(config, {})
    assert state is not None
    resumed.load_state_dict(state)
    resumed.run(on_epoch=lambda epoch: None)

    assert without_times(resumed.history) == without_times(whole.history)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_resume_with_other_options_names_them(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(TINY, {})
    trainer = trained(TINY)
    folder.save(trainer.state_dict(), trainer.history)
    other = dataclasses.replace(TINY, lr=0.5, train_size=21, epochs=9)
    with pytest.raises(UsageError) as caught:
        folder.resume(other, {})
    for words in ("--lr is 0.5, was 0.002", "--train-size is 21, was 20", "--epochs is 9, was 4"):
        assert words in str(caught.value)
    assert "--seed" not in str(caught.value)


def test_resume_may_make_an_unannealed_run_longer(tmp_path: Path) -> None:
    longer = dataclasses.replace(TINY, anneal=0)
    shorter = dataclasses.replace(longer, epochs=2)
    folder = RunFolder(tmp_path)
    folder.start(shorter, {})
    trainer = trained(shorter)
    folder.save(trainer.state_dict(), trainer.history)
    state = folder.resume(longer, {})
    assert state is not None
    resumed = train.make_trainer(longer)
    resumed.load_state_dict(state)
    resumed.run(on_epoch=lambda epoch: None)
    assert without_times(resumed.history) == without_times(trained(longer).history)
    with pytest.raises(UsageError, match="--epochs is 2, was 4"):
        folder.resume(shorter, {})


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(TINY, {})
    assert folder.resume(TINY, {}) is None
    folder.save({}, [])
    with pytest.raises(UsageError, match="already holds a run; add --resume"):
        folder.start(TINY, {})


def test_damaged_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(TINY, {})
    folder.checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(UsageError, match=r"cannot read the run in .*start anew"):
        folder.resume(TINY, {})


def test_files_are_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.start(TINY, {})
    folder.save({"epoch": 1}, [])

    def crash(*paths: object) -> None:
        raise OSError("power failure")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power failure"):
        folder.save({"epoch": 2}, [])
    assert torch.load(folder.checkpoint, weights_only=True) == {"epoch": 1}


def test_interrupt_waits_for_the_end_of_an_update_and_of_saving() -> None:
    trainer = train.make_trainer(TINY)
    finished = []

    def save(epoch: Epoch) -> None:
        signal.raise_signal(signal.SIGINT)
        finished.append(epoch.epoch)

    with pytest.raises(KeyboardInterrupt):
        trainer.run(save)
    assert finished == [1]
    assert len(trainer.history) == 1
    updates = []

    def press(*numbers: float) -> None:
        updates.append(numbers)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer.run(lambda epoch: None, press)
    assert len(updates) == 1
    assert len(trainer.history) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_log_has_one_row_per_epoch(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(TINY, {"torch": "x"})
    trainer = trained(TINY)
    folder.save(trainer.state_dict(), trainer.history)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == (
        "epoch",
        "updates",
        "seconds",
        "loss",
        "train_accuracy",
        "validation_accuracy",
        "test_accuracy",
        "grad_norm_median",
        "grad_norm_max",
        "p",
        "sequences_per_s",
    )
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["updates"] for row in rows] == ["3", "6", "9", "12"]
    assert all(float(row["sequences_per_s"]) > 0 for row in rows)


def test_best_epoch_is_chosen_by_validation_alone() -> None:
    def epoch(number: int, validation: float, test: float) -> Epoch:
        return Epoch(number, number, 1.0, 1.0, 1.0, validation, test, 1.0, 1.0, 0.0, 1.0)

    chosen = record.best([epoch(1, 0.5, 0.9), epoch(2, 0.7, 0.1), epoch(3, 0.7, 0.8)])
    assert chosen.epoch == 2
