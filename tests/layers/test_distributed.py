"""Two processes with half a batch each beside one process with all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing

import shares
from closeness import assert_close
from shares import CASES, WORLD, Case

Found = list[dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Of each process what it found in each case."""
    folder = tmp_path_factory.mktemp("group")
    multiprocessing.start_processes(shares.run, (str(folder),), nprocs=WORLD, start_method="spawn")
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD)]


def expected(case: Case) -> dict[str, Tensor]:
    """Of one process: nn.LSTM, but where masks detach or 16 bits round ours in the same way."""
    if not case.low:
        return shares.train(case if case.masked else Case("nn.LSTM", case.wrap, False))
    parts = [shares.train(case, shares.share_of(rank)) for rank in range(WORLD)]
    return {
        name: torch.cat([part[name] for part in parts]) if name.startswith("output")
        else sum(part[name] for part in parts) / WORLD
        for name in parts[0]
    }  # fmt: skip


def check(found: Found, case: Case) -> None:
    own = [one[str(case)] for one in found]
    for name, due in expected(case).items():
        if name.startswith("output"):
            assert_close(torch.cat([one[name] for one in own]), due, name)
        else:
            assert due.abs().max() > 1e-4
            for one in own:
                assert_close(one[name], due, name)


@pytest.mark.parametrize("case", [case for case in CASES if case.wrap.startswith("DDP")], ids=str)
def test_distributed_data_parallel(found: Found, case: Case) -> None:
    check(found, case)


@pytest.mark.parametrize("case", [case for case in CASES if case.wrap.startswith("FSDP")], ids=str)
def test_fully_shard(found: Found, case: Case) -> None:
    check(found, case)
