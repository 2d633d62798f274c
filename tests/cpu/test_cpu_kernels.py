"""The compiled CPU kernels: instruction sets, ways to divide the work, threads, memory."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import throughtime
from cases import Shape, as_dtype, call, options_for, results, tensors
from closeness import assert_all_close
from samples import (
    ATTENTION,
    BEYOND_PAPER,
    LAYERS,
    Given,
    Recurrence,
    Sample,
    assert_same,
    doubled,
    expect,
    run,
)
from throughtime import _ext
from throughtime.functional import lstm

if _ext.extension is None:
    pytest.skip("the compiled kernels are not in this installation", allow_module_level=True)
kernels: Any = _ext.extension

# One shape per way to divide the work: see test_plan_*.
SHAPES = (
    Shape(9, 3, 2, 40),  # one group, a team; input inside the step
    Shape(5, 37, 70, 19),  # two groups, input projected per chunk
    Shape(11, 70, 3, 50),  # four groups of uneven height
    Shape(130, 1, 5, 33),  # one row: chunks of many steps, the ring of gate gradients wraps
    Shape(6, 5, 130, 170),  # several panels of columns, with rests
    Shape(7, 37, 3, 50, 18),  # projected, in groups
    Shape(5, 3, 50, 170, 130),  # projected, by a team
    Shape(1, 70, 60, 200),  # brief: a block's panels and weight gradients in one place
    Shape(4, 37, 130, 200),  # brief: panels of the input in one place
    Shape(3, 40, 3, 260),  # brief, input inside the step
    Shape(2, 37, 130, 260, 70),  # brief and projected
    Shape(1, 37, 130, 260, 70),  # one step: weights unpacked, projected
)
OPTIONS = ("plain", "mask-T", "mask-TB-reverse", "all", "all-reverse")
RECURRENCES = [Recurrence(shape, option) for shape in SHAPES for option in OPTIONS]
RECURRENCES += [
    Recurrence(shape, option, anew=True)
    for shape in SHAPES
    for option in ("reset", "all", "all-reverse")
]
every_case = pytest.mark.parametrize(
    "case", [*RECURRENCES, *ATTENTION, *BEYOND_PAPER, *LAYERS], ids=str
)


def inputs(case: Sample, dtype: torch.dtype) -> Given:
    """With the one form of a mask that operators take."""
    given = case.inputs(dtype)
    mask = given.get("detach_mask")
    if mask is not None and mask.dim() == 1:
        given["detach_mask"] = mask.unsqueeze(1).expand(-1, given["input"].size(1))
    return given


@every_case
def test_every_instruction_set_matches_the_reference(isa: str, case: Sample, threads: None) -> None:
    torch.set_num_threads(2)
    for dtype in (torch.float64, torch.float32):
        given = inputs(case, dtype)
        found, exact = run(case, given), expect(case, doubled(given))
        if isinstance(case, Recurrence):
            rounded = {name: x.to(dtype) for name, x in exact.items()}
            assert_all_close({name: found[name] for name in exact}, rounded)
        else:
            assert_same(found, exact, expect(case, given) if dtype == torch.float32 else None)


@every_case
def test_bit_equal_for_every_number_of_threads(case: Sample, threads: None) -> None:
    given = inputs(case, torch.float32)
    torch.set_num_threads(1)
    first = run(case, given)
    for count in (1, 2, 3, 5) * 3:
        torch.set_num_threads(count)
        again = run(case, given)
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name]), f"{name} with {count} threads"


def test_a_pool_with_fewer_threads_than_asked_for() -> None:
    # OpenMP grants two threads where torch asks for four: each stands for two workers of a team.
    code = """
import torch
from cases import Shape, results, tensors
from throughtime.functional import lstm
from throughtime import _ext
named = tensors(Shape(20, 4, 3, 300))
assert len(_ext.extension.lstm_plan(20, 4, 3, 300, 300, 8, 4)["backward"]["blocks"]) > 1
_ext.extension.pretend_cpus(4)
torch.set_num_threads(1)
alone = results(lstm, named, backend="cpu")
torch.set_num_threads(4)
together = results(lstm, named, backend="cpu")
assert all(torch.equal(alone[name], together[name]) for name in alone)
"""
    env = os.environ | {"OMP_THREAD_LIMIT": "2", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=120)


@pytest.mark.parametrize("shape", SHAPES[7:], ids=str)
def test_a_sample_of_a_brief_walk_is_the_same_in_a_smaller_batch(
    isa: str, shape: Shape, threads: None
) -> None:
    torch.set_num_threads(2)
    named = as_dtype(tensors(shape), torch.float32)
    whole = _results_per_sample(named)
    for rows in (slice(1), slice(1, 20), slice(20, None)):
        part = {name: x[:, rows] if name == "input" else x for name, x in named.items()}
        part |= {name: named[name][rows] for name in ("h_0", "c_0")}
        for x, wanted in zip(
            _results_per_sample(as_dtype(part, torch.float32)), whole, strict=True
        ):
            assert torch.equal(x, wanted[:, rows] if x.dim() == 3 else wanted[rows])


def _results_per_sample(named: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Output, states, and the gradients of input and states, whatever the batch."""
    output, states = call(lstm, named, backend="cpu")
    leaves = [named[name] for name in ("input", "h_0", "c_0")]
    return [output, *states, *torch.autograd.grad((output, *states), leaves, (output, *states))]


@pytest.mark.parametrize("option", ["plain", "all", "all-reverse"])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[8], Shape(40, 20, 60, 100)], ids=str)
def test_buffers_full_of_nan_are_never_read(shape: Shape, option: str, threads: None) -> None:
    torch.set_num_threads(2)
    options = options_for(shape)[option]
    named = tensors(shape)
    clean = results(lstm, named, backend="cpu", **options)
    poison = {k: torch.full_like(v, math.nan).requires_grad_() for k, v in named.items()}
    throughtime.empty_cache()
    del_me = results(lstm, poison, backend="cpu", **options)
    assert del_me["output"].isnan().any()
    del del_me
    assert kernels.cache_statistics()["idle_bytes"] > 0
    again = results(lstm, named, backend="cpu", **options)
    for name, tensor in clean.items():
        assert torch.equal(tensor, again[name]), name


def test_the_cache_reuses_and_never_raises_the_peak() -> None:
    shape = Shape(60, 20, 8, 64)
    named = as_dtype(tensors(shape), torch.float32)
    throughtime.empty_cache()
    results(lstm, named, backend="cpu")
    before = kernels.cache_statistics()
    assert before["idle_bytes"] > 0
    for _ in range(5):
        results(lstm, named, backend="cpu")
        now = kernels.cache_statistics()
        assert now["peak_used_bytes"] == before["peak_used_bytes"]
        assert now["used_bytes"] + now["idle_bytes"] <= now["peak_used_bytes"]
    throughtime.empty_cache()
    now = kernels.cache_statistics()
    assert now["idle_bytes"] == 0 and now["peak_used_bytes"] == now["used_bytes"]


def test_results_survive_later_calls() -> None:
    shape = Shape(60, 20, 8, 64)
    named = as_dtype(tensors(shape), torch.float32)
    output, (h_n, c_n) = lstm(
        named["input"], None, *(named[k] for k in ("weight_ih", "weight_hh")), backend="cpu"
    )
    kept = [x.detach().clone() for x in (output, h_n, c_n)]
    for _ in range(3):
        results(lstm, as_dtype({k: 2 * v for k, v in named.items()}, torch.float32), backend="cpu")
    for x, wanted in zip((output, h_n, c_n), kept, strict=True):
        assert torch.equal(x, wanted)


@pytest.mark.skipif(torch.__version__ < (2, 11), reason="before torch 2.11 memory is torch's own")
def test_nothing_is_saved_when_nothing_needs_a_gradient() -> None:
    shape = Shape(200, 16, 8, 128)
    named = as_dtype(tensors(shape), torch.float32)
    weights = [named[k] for k in ("weight_ih", "weight_hh")]
    saved = 4 * 5 * shape.T * shape.B * shape.H

    def held(enabled: bool) -> int:
        before: int = kernels.cache_statistics()["used_bytes"]
        with torch.set_grad_enabled(enabled):
            result = lstm(named["input"], None, *weights, backend="cpu")
        after: int = kernels.cache_statistics()["used_bytes"]
        assert result[0].requires_grad is enabled
        return after - before

    assert held(True) - held(False) >= saved


def run_out_of_memory(call: str) -> str:
    """What a call says that gets 64 MB of address space more than there is, or stderr."""
    code = f"""
import re, resource, torch, throughtime
from throughtime import _ext
from throughtime.functional import relevancy_attention
kernels = _ext.extension
x = torch.randn(2000, 16, 8)
lstm, rel_lstm = throughtime.LSTM(8, 256), throughtime.RelLSTM(8, 256)
small = [lstm(x[:20])[0], rel_lstm(x[:20])[0]]
sum(y.sum() for y in small).backward()
before = kernels.cache_statistics()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    {call}
except RuntimeError as error:
    print(type(error).__name__, error)
after = kernels.cache_statistics()
assert after["used_bytes"] + after["idle_bytes"] <= after["peak_used_bytes"]
assert after["peak_used_bytes"] <= limit, after
lstm(x[:20])[0].sum().backward()  # goes on
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return done.stdout if done.returncode == 0 else f"{done.returncode}: {done.stderr}"


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize(
    ("call", "op"),
    [
        ("lstm(x)", "lstm_forward"),
        ("rel_lstm(x)", "rel_lstm_forward"),
        (
            "relevancy_attention(*[x[:1, :1].expand(16, 4, 80000, 8)] * 3, 4, 4)",
            "relevancy_forward",
        ),
    ],
)
def test_out_of_memory_is_torchs_error(call: str, op: str) -> None:
    said = run_out_of_memory(call)
    found = re.match(
        rf"RuntimeError throughtime::{op}: can't allocate memory: you tried to allocate (\d+) b",
        said,
    )
    assert found, said
    assert int(found[1]) >= 20_000_000
    assert "smaller batch" in said and "fewer steps" in said


def test_a_failed_allocation_does_not_raise_the_peak() -> None:
    before = kernels.cache_statistics()["peak_used_bytes"]
    layer = throughtime.LSTM(1, 256, backend="cpu")
    with pytest.raises(RuntimeError, match="you tried to allocate"):
        layer(torch.zeros(1, 1, 1).expand(1 << 34, 1, 1))
    assert kernels.cache_statistics()["peak_used_bytes"] == before


def test_small_results_can_be_resized() -> None:
    output, (h_n, c_n) = throughtime.LSTM(8, 64, backend="cpu")(torch.randn(20, 4, 8))
    for x in (output, h_n, c_n):
        x.detach().untyped_storage().resize_(0)
        assert x.untyped_storage().nbytes() == 0
