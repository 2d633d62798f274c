"""The data of the training tasks."""

from __future__ import annotations

import gzip
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bench.__main__ import main
from bench.train import pixels, recall, series, text
from bench.train.config import Config
from bench.train.task import Sequences, Task
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

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
    task = pixels.make(Config("pixels"))
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
    first, second = pixels.split(everything, 0.25)
    assert sorted([*first.inputs, *second.inputs]) == list(range(len(labels)))
    shares = torch.bincount(second.targets.flatten()) / torch.bincount(labels)
    assert (shares - 0.25).abs().max() <= 0.5 / 20


def test_permutation_is_fixed_and_the_same_for_all_sets() -> None:
    plain = pixels.make(Config("pixels"))
    one, again, other = (
        pixels.make(Config("pixels", permute=True, permute_seed=seed)) for seed in (5, 5, 6)
    )
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    for name in ("train", "validation", "test"):
        x, y = getattr(plain, name).batch(torch.arange(20))
        for task, same in ((one, True), (again, True), (other, False)):
            x_permuted, y_permuted = getattr(task, name).batch(torch.arange(20))
            assert torch.equal(x_permuted, x[order]) == same and torch.equal(y_permuted, y)


# IDX files


def write_idx(folder: Path, *, zipped: bool = True, **changes: bytes) -> tuple[Any, Any]:
    """Forty images of 3 x 5 pixels to learn from and ten more; what the last ten are."""
    for part, count in (("train", 40), ("t10k", 10)):
        images = np.arange(count * 15, dtype=np.uint8).reshape(count, 3, 5)
        labels = np.arange(count, dtype=np.uint8) % 4
        for kind, array in (("images", images), ("labels", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            content = changes.get(kind, head + array.tobytes())
            name = f"{part}-{kind}-idx{array.ndim}-ubyte"
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return images, labels


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(zipped: bool, tmp_path: Path) -> None:
    images, labels = write_idx(tmp_path, zipped=zipped)
    task = pixels.make(Config("pixels", images=str(tmp_path)))
    assert (len(task.train), len(task.validation), len(task.test)) == (32, 8, 10)
    assert (task.classes, task.features) == (4, 1)
    x, y = task.test.batch(torch.arange(10))
    assert isinstance(x, torch.Tensor) and x.shape == (15, 10, 1)
    assert torch.equal(x[..., 0].T, torch.tensor(images.reshape(10, 15) / np.float32(255)))
    assert torch.equal(y[0], torch.tensor(labels).long())


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"images": b""}, "a damaged or other one: its first bytes are ;"),
        ({"labels": b"\x00\x00\x08\x03" + bytes(8)}, "its first bytes are 00 00 08 03"),
        ({"images": b"\x00\x00\x08\x03\x00\x00\x00\x09" + bytes(20)}, "cannot reshape array"),
    ],
)
def test_other_idx_files_are_a_sentence(
    changes: dict[str, bytes], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_idx(Path(), **changes)
    assert main(["train", "pixels", "--images", ".", "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --images: wanted an IDX file of ") and wanted in error
    assert not Path("run").exists()


def test_no_idx_files_are_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "pixels", "--images", "here", "--out", "run"]) == 2
    wanted = "error: --images: wanted train-images-idx3-ubyte or train-images-idx3-ubyte.gz in here"
    assert capsys.readouterr().err.startswith(wanted)


# Text


def test_text_asks_for_the_next_character_everywhere() -> None:
    written = "abcd efgh\n" * 40
    Path("t.txt").write_text(written, encoding="utf-8")
    task = text.make(Config("text", T=7, file="t.txt"))
    assert (task.features, task.classes, task.target_steps, task.scored_steps) == (10, 10, 7, 7)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [51, 2, 2]
    characters = sorted(set(written))
    for data, start in ((task.train, 0), (task.validation, 360), (task.test, 380)):
        x, y = data.batch(torch.arange(len(data)))
        assert (
            isinstance(x, torch.Tensor) and x.shape == (7, len(data), 10) and (x.sum(2) == 1).all()
        )
        count = 7 * len(data)
        shown = "".join(characters[k] for k in x.argmax(2).T.flatten())
        due = "".join(characters[k] for k in y.T.flatten())
        assert shown == written[start : start + count]
        assert due == written[start + 1 : start + 1 + count]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"short", "wanted a text of at least 80 characters for --T 3, got 5 in t.txt"),
        (b"\xff\xfe" * 90, "wanted a text in UTF-8, got t.txt: "),
        ("".join(map(chr, range(200, 600))).encode(), "at most 256 different characters, got 400"),
        (None, "wanted a text in UTF-8, got t.txt: [Errno 2]"),
    ],
)
def test_other_text_is_a_sentence(
    content: bytes | None, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path("t.txt").write_bytes(content)
    assert main(["train", "text", "--file", "t.txt", "--T", "3", "--out", "run"]) == 2
    assert wanted in capsys.readouterr().err and not Path("run").exists()
    assert main(["train", "text", "--out", "run"]) == 2
    assert "--file: wanted a text file, got none" in capsys.readouterr().err


# Series


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty series of two features and 2 to 6 steps; the first is larger in class "b"."""

    def load(name: str, *, split: str, return_X_y: bool) -> tuple[pd.DataFrame, Any]:
        assert return_X_y
        if name != "Made":
            raise ValueError("no such set\nat all")
        draw = np.random.default_rng(len(split))
        labels = np.array(["a", "b"] * 15)
        steps = draw.integers(2, 7, 30)
        cells = [
            [pd.Series(draw.normal(3 * (label == "b") * (k == 0), 1, n)) for k in range(2)]
            for label, n in zip(labels, steps, strict=True)
        ]
        cells[4][1][1] = np.nan
        return pd.DataFrame({k: [row[k] for row in cells] for k in range(2)}), labels

    module = SimpleNamespace(load_UCR_UEA_dataset=load)
    monkeypatch.setattr(series, "require", lambda name: module)


@pytest.mark.usefixtures("archive")
def test_series_keep_their_lengths() -> None:
    task = series.make(Config("series", dataset="Made"))
    assert (task.features, task.classes) == (2, 2)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [25, 5, 30]
    x, y = task.test.batch(torch.tensor([3, 0]))
    assert isinstance(x, PackedSequence) and y.tolist() == [[1, 0]]
    assert isinstance(task.test, series.Series)
    padded, lengths = pad_packed_sequence(x)
    assert lengths.tolist() == [len(task.test.inputs[3]), len(task.test.inputs[0])]
    assert torch.equal(padded[: lengths[0], 0], task.test.inputs[3])
    assert task.test.inputs[4][1, 1] == 0  # missing: the mean
    learned = torch.cat([*task.train.inputs, *task.validation.inputs])  # type: ignore[attr-defined]
    assert learned.mean(0).abs().max() < 0.1 and (learned.std(0) - 1).abs().max() < 0.1


@pytest.mark.usefixtures("archive")
@pytest.mark.parametrize("layer", ["throughtime", "torch", "rel-lstm", "attention"])
def test_series_train(layer: str) -> None:
    words = ["train", "series", "--dataset", "Made", "--layer", layer, "--epochs", "30"]
    words += ["--hidden", "8", "--lr", "0.02", "--threads", "1", "--out", "run"]
    assert main(words) == 0
    assert pd.read_csv("run/log.csv").test_accuracy.max() > 0.8


@pytest.mark.usefixtures("archive")
def test_other_series_are_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "series", "--dataset", "None", "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert "--dataset: wanted a classification set" in error
    assert "'None' (ValueError: no such set)" in error and error.count("\n") == 1
