"""Triton's kernels without a GPU: each compiles, and where each is launched; nothing runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from throughtime.triton_kernels import lstm, rel_lstm, relevancy
from throughtime.triton_kernels.compile import TARGETS, most_spilled
from throughtime.triton_kernels.sample_calls import sample_calls
from triton.runtime.jit import KernelInterface

from triton_ir import Walk, parse

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


class Compiled(NamedTuple):
    """What ``compile.py`` prints, and the folder of Triton's GPU IR."""

    table: str
    folder: Path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("ir")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    module = "throughtime.triton_kernels.compile"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, "--ir", str(folder)],
        check=False,
        capture_output=True,
        text=True,
        env=env,
        timeout=1180,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Compiled(done.stdout, folder)


@pytest.mark.timeout(1200)  # two minutes where nothing else runs
def test_every_kernel_compiles_for_every_gpu_without_spills(compiled: Compiled) -> None:
    print(compiled.table)
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in compiled.table.splitlines()[2:]]
    kernels = {row[0] for row in rows}
    launches = {(row[0], row[1]) for row in rows}
    assert len(kernels) == 11 and len(launches) > 90
    wanted = {target: len(launches) for target in TARGETS} | {"gfx942": len(kernels)}
    assert Counter(row[2] for row in rows) == wanted
    for kernel, sample, target, registers, _, spilled in rows:
        assert int(registers) > 0, (kernel, sample, target)
        assert int(spilled) <= most_spilled(sample), (kernel, sample, target)


# What a program both stores and reads; of h_n, c_n, grad_h and grad_c it reads where it begins.
REREAD = {
    "lstm.walk_forward": {"output", "h_n", "c_n"},
    "lstm.walk_backward": {"grad_gates", "grad_h", "grad_c"},
    "rel_lstm.walk_forward": {"states", "hidden", "queries", "keys", "context", "cells"},
    "rel_lstm.walk_backward": {"dh", "du", "dw", "dq", "da", "cells", "context", "direct"},
}


@pytest.mark.timeout(1200)
def test_a_load_of_what_the_program_stored_stands_behind_a_barrier(compiled: Compiled) -> None:
    """No compiler moves it in front, nor fetches it ahead of the step that stores it."""
    reread: dict[str, set[str]] = {name: set() for name in REREAD}
    files = sorted(compiled.folder.iterdir())
    assert len(files) == len(compiled.table.splitlines()) - 2
    for file in files:
        walk = Walk(parse(file.read_text("utf-8")))
        assert not walk.faults, f"{file.name}: {list(walk.faults)}"
        reread.get(file.name.split()[0], set()).update(walk.written & walk.read)
    assert reread == REREAD  # else the IR is not understood


IR = """
tt.func public @kernel(%a: !tt.ptr<f32>, %n: i32) attributes {noinline = false} {
  %p = tt.splat %a : !tt.ptr<f32> -> tensor<4x!tt.ptr<f32>>
  BEFORE
  scf.for %i = %c0 to %n step %c1 : i32 {
    FIRST
    %q = tt.addptr %p, %i : tensor<4x!tt.ptr<f32>>, tensor<4xi32>
    %x:2 = scf.if %i -> (tensor<4x!tt.ptr<f32>>, i32) {
      THEN
      scf.yield %q, %i : tensor<4x!tt.ptr<f32>>, i32
    } else {
      scf.yield %p, %i : tensor<4x!tt.ptr<f32>>, i32
    }
    LAST
    tt.store %p, %v : tensor<4x!tt.ptr<f32>>
    END
  }
}
}"""
LOAD, COPY = "%l = tt.load %q", "%l = ttg.async_copy_global_to_local %x#0, %s"
BARRIER, AGAIN = "ttg.barrier all", "scf.for %k = %c0 to %n step %c1 : i32 {\n%y = tt.load %q\n}"


@pytest.mark.parametrize(
    ("lines", "right"),
    [
        ({"LAST": COPY, "END": BARRIER}, True),
        ({"LAST": COPY, "FIRST": BARRIER}, True),
        ({"LAST": AGAIN, "FIRST": BARRIER}, True),
        ({"LAST": AGAIN}, False),
        ({"LAST": AGAIN, "FIRST": "ttg.barrier local"}, False),  # for shared memory
        ({"LAST": COPY, "THEN": BARRIER}, False),  # not on every way
        ({"END": f"{LOAD}\n{BARRIER}"}, False),
        ({"THEN": LOAD}, False),
        ({"LAST": "%l = tt.load %p"}, True),  # a thread finds what it stored itself
        ({"BEFORE": "%l = tt.load %p", "LAST": COPY, "END": BARRIER}, False),  # fetched ahead
    ],
    ids=str,
)
def test_how_the_order_of_barriers_and_loads_is_read(lines: dict[str, str], right: bool) -> None:
    text = re.sub("[A-Z]{3,}", lambda word: lines.get(word[0], ""), IR)
    assert (not Walk(parse(text)).faults) == right
