"""`torchrun -m bench train`: several processes do what one does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from bench.train.config import Config
from bench.train.folder import RunFolder
from bench.train.ranks import Ranks, alone
from bench.train.task import Sequences
from bench.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--T", "3", "--hidden", "8", "--batch", "7", "--updates-per-epoch", "5"]
COPYING = ["train", "copying", *SHORT, "--train-size", "20", "--anneal", "0", "--threads", "1"]
TIMES = ["seconds", "cpu_seconds", "sequences_per_s"]


def launched(processes: int, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "bench", *COPYING, *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def ran(processes: int, *words: str) -> str:
    """What a run printed that ended well."""
    process = launched(processes, *words)
    out, error = process.communicate(timeout=250)
    assert process.returncode == 0, error
    return out


def log(folder: str) -> pd.DataFrame:
    return pd.read_csv(Path(folder, "log.csv")).drop(columns=TIMES)


def test_two_and_then_four_processes_do_what_one_does() -> None:
    words = ["--p", "0", "--out"]
    ran(1, "--epochs", "4", *words, "one")
    out = ran(2, "--epochs", "2", *words, "many")
    assert out.count("epoch 1/2") == 1 and "1 threads in each of 2 processes" in out
    assert "continuing after epoch 2" in ran(4, "--epochs", "4", *words, "many", "--resume")
    pd.testing.assert_frame_equal(log("many"), log("one"), rtol=1e-4, check_exact=False)


def test_masks_follow_from_seed_rank_and_number_of_processes() -> None:
    words = ["--epochs", "2", "--p", "0.5", "--lr", "0.05", "--out"]
    for folder in ("a", "b"):
        ran(2, *words, folder)
    pd.testing.assert_frame_equal(log("a"), log("b"), check_exact=True)
    ran(1, *words, "one")
    assert (log("a").loss - log("one").loss).abs().iloc[-1] > 1e-5


def test_a_process_that_dies_loses_no_finished_epoch() -> None:
    process = launched(2, "--epochs", "1000000", "--p", "0", "--out", "run")
    end = time.monotonic() + 200
    while not Path("run/log.csv").exists() and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.1)
    children = psutil.Process(process.pid).children()
    children[-1].kill()
    _, error = process.communicate(timeout=100)
    assert process.returncode != 0 and "Signal 9" in error
    kept = len(log("run"))
    state = torch.load("run/checkpoint.pt", weights_only=True)
    trainer = Trainer(Config(**state["config"]))
    with RunFolder(Path("run")) as folder:
        folder.resume(trainer)
        trainer.run(lambda _: folder.save(trainer), until=len(state["history"]) + 2)
    epochs = log("run").epoch.tolist()
    assert epochs == list(range(1, len(epochs) + 1)) and len(epochs) >= kept + 2 >= 3


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_shares_are_a_partition(world: int) -> None:
    for count in (1, 7, 8):
        ranks = [Ranks(rank, world, torch.device("cpu")) for rank in range(world)]
        shares = [list(range(count))[each.share(count)] for each in ranks]
        assert [k for share in shares for k in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    seeds = {each.seed(3, epoch) for each in ranks for epoch in range(5)}
    assert len(seeds) == 5 * world
    assert alone().seed(3, 0) != alone().seed(4, 0) and alone().seed(3, 0) == alone().seed(3, 0)


def test_a_share_is_a_part_of_the_batch() -> None:
    data = Sequences(torch.arange(12).view(4, 3), torch.arange(4).unsqueeze(1))
    indices = torch.tensor([2, 0, 3])
    whole, part = data.batch(indices), data.batch(indices, slice(1, 3))
    assert all(torch.equal(one[:, 1:3], other) for one, other in zip(whole, part, strict=True))
