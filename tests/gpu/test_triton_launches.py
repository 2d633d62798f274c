"""Triton's kernels without a GPU: each compiles, and where each is launched; nothing runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from throughtime.triton_kernels import lstm, rel_lstm, relevancy
from throughtime.triton_kernels.compile import TARGETS, most_spilled
from throughtime.triton_kernels.sample_calls import sample_calls
from triton.runtime.jit import KernelInterface

META = torch.device("meta")  # tensors without numbers, for a GPU that is not there


class Current:
    """Stands for ``torch.cuda.device``, which wants a GPU."""

    device: ClassVar[torch.device] = torch.device("cuda", 0)

    def __init__(self, device: torch.device) -> None:
        self.wanted = device

    def __enter__(self) -> None:
        self.before, Current.device = Current.device, self.wanted

    def __exit__(self, *error: object) -> None:
        Current.device = self.before


@pytest.fixture
def launched_on(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.device]]:
    """By kernel: the GPUs that were the current one when it was launched, which does nothing."""
    found: dict[str, set[torch.device]] = {}

    def stub(name: str) -> Any:
        class Kernel:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                return lambda *args, **options: found.setdefault(name, set()).add(Current.device)

        return Kernel()

    for module in (lstm, rel_lstm, relevancy):
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, KernelInterface):
                monkeypatch.setattr(module, name, stub(f"{module.__name__}.{name}"))
    # The one thing whose size the host waits for: python/README.md, limits.
    monkeypatch.setattr(
        rel_lstm, "retained_positions", lambda last, ends, T, *_: last.new_empty(len(last), T, 2)
    )
    monkeypatch.setattr(lstm, "_shared_bytes", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "device", Current)
    return found


def test_every_kernel_is_launched_on_the_gpu_of_its_tensors(
    launched_on: dict[str, set[torch.device]],
) -> None:
    """Triton launches on the current GPU, here cuda:0, whatever its arguments are on, here meta.

    These have no numbers: nothing but RelLSTM's backward waits for some, which no CUDA graph could.
    """

    for _, sample in sample_calls(META):
        sample()
    assert len(launched_on) == 11 and Current.device.type == "cuda"
    assert {name: gpus for name, gpus in launched_on.items() if gpus != {META}} == {}


@pytest.mark.parametrize(
    ("sequences", "length"), [(1, 1), (8, 2**20), (1, 2**27), (2**17, 16), (2**17, 2**10)]
)
def test_a_grid_holds_any_length_and_batch(sequences: int, length: int) -> None:
    grid = (*relevancy.programs(sequences, length), 1, 1)[:3]
    assert grid[0] <= 2**31 - 1 and max(grid[1:]) <= 65_535  # CUDA's limits
    assert grid[0] * grid[1] * relevancy.QUERIES >= sequences * length


@pytest.mark.timeout(1200)  # two minutes where nothing else runs
def test_every_kernel_compiles_for_every_gpu_without_spills() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "throughtime.triton_kernels.compile"],
        check=False,
        capture_output=True,
        text=True,
        env=env,
        timeout=1180,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stdout)
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    kernels = {row[0] for row in rows}
    launches = {(row[0], row[1]) for row in rows}
    assert len(kernels) == 11 and len(launches) > 90
    wanted = {target: len(launches) for target in TARGETS} | {"gfx942": len(kernels)}
    assert Counter(row[2] for row in rows) == wanted
    for kernel, sample, target, registers, _, spilled in rows:
        assert int(registers) > 0, (kernel, sample, target)
        assert int(spilled) <= most_spilled(sample), (kernel, sample, target)
