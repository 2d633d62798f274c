"""The Triton kernels: relevancy screening in the interpreter, all compiled without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

import throughtime
from cases import random
from samples import EVERYTHING, Attention, Layer, assert_same, doubled, expect, run
from throughtime import functional

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton.language as tl
from throughtime.triton_kernels import relevancy

# The interpreter takes milliseconds per operation: few and small.
ATTENTION = (
    Attention(1, 1, 1, 1, 1, 1, 0),
    Attention(2, 2, 11, 4, 3, 3, 2),
    Attention(1, 2, 12, 5, 4, 2, 3, additive=True, lengths=True, before=7),
    Attention(3, 1, 5, 3, 3, 9, 3, before=4, lengths=True),
    Attention(2, 1, 9, 3, 2, 1, 50, additive=True),
    Attention(2, 1, 18, 3, 3, 3, 2, keep_first=True),
)
LAYERS = (
    Layer(1, 1, 1, 1, 1, 1, 0),
    Layer(7, 3, 2, 19, 18, 2, 2, mask="T"),
    Layer(6, 3, 2, 4, 3, 2, 3, lengths=True, mask="TB", before=5),
    Layer(4, 2, 1, 3, 3, 6, EVERYTHING, before=3),
    Layer(6, 17, 1, 3, 2, 2, 1, lengths=True, keep_first=True),  # two tiles of samples
)


@pytest.mark.parametrize("case", [*ATTENTION, *LAYERS], ids=str)
def test_kernels_match_the_reference(case: Attention | Layer) -> None:
    given = case.inputs()
    assert_same(run(case, given, "_triton"), expect(case, given))


@pytest.mark.parametrize("case", [ATTENTION[2], ATTENTION[5]], ids=str)
def test_keys_are_found_in_every_block_of_positions(
    case: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relevancy, "BLOCK_S", tl.constexpr(4))
    given = case.inputs()
    assert_same(run(case, given, "_triton"), expect(case, given))


@pytest.mark.parametrize("case", [ATTENTION[2], LAYERS[2]], ids=str)
def test_float32(case: Attention | Layer) -> None:
    given = case.inputs(torch.float32)
    exact = expect(case, doubled(given))
    assert_same(run(case, given, "_triton"), exact, expect(case, given))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, the interpreter, names each NaN
def test_ties_and_nan() -> None:
    ones = torch.ones(1, 2, 12, 2)
    ones[0, 1, 5] = torch.nan
    forward = torch.ops.throughtime.relevancy_forward_triton
    output, _, last, index, _ = forward(ones, ones, ones, None, None, None, 0, 1, 3, 0.5, False)
    assert index[0, 0].tolist() == [0, 1, 2], "of equals the earlier keys stay"
    assert last[0, 0].tolist() == [11, 11, 11, *range(3, 12)]
    assert output[0, 0].isfinite().all() and output[0, 1, :5].isfinite().all()
    assert output[0, 1, 5].isnan().all() and (last < 12).all()


def test_nothing_past_the_end_is_read() -> None:
    case = Layer(6, 3, 2, 4, 3, 2, 3, lengths=True)
    given = case.inputs()
    clean = run(case, given, "_triton")
    past = torch.arange(6).unsqueeze(1) >= given["lengths"]
    assert past.any()
    with torch.no_grad():
        given["input"][past] = torch.nan
        given["grad_output"][past] = torch.nan
    for name, tensor in run(case, given, "_triton").items():
        assert torch.equal(tensor, clean[name]), name


def test_public_functions_and_gradients() -> None:
    """An explicit backend runs Triton; "auto" never takes its interpreter."""
    assert throughtime.explain("rel_lstm", hidden_size=4).chosen != "triton"
    q, k, v = (random(1, 1, 7, 2, seed=s).requires_grad_() for s in range(3))
    results = []
    for backend in ("triton", "reference"):
        output = functional.relevancy_attention(q, k, v, 2, 2, backend=backend)
        results.append((output, *torch.autograd.grad(output.square().sum(), (q, k, v))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    layer = throughtime.RelLSTM(2, 3, window_size=2, top_k=2, backend="triton")
    same = throughtime.RelLSTM(2, 3, window_size=2, top_k=2, backend="reference")
    same.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 2)
    (one, state), (other, expected) = layer(x), same(x)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(state.memory, expected.memory)


@pytest.mark.timeout(600)  # a minute where nothing else runs
def test_every_kernel_compiles_for_every_gpu_without_spills() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "throughtime.triton_kernels.compile"],
        check=False,
        capture_output=True,
        text=True,
        env=env,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stdout)
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    kernels = {row[0] for row in rows}
    assert len(kernels) == 11
    assert Counter(row[2] for row in rows) == {
        "sm_80": 44, "sm_90": 44, "sm_100": 44, "gfx942": len(kernels),
    }  # fmt: skip
    for kernel, sizes, target, registers, _, spilled in rows:
        most = 64 if " of " in sizes else 0  # odd sizes
        assert int(registers) > 0 and int(spilled) <= most, (kernel, sizes, target)
