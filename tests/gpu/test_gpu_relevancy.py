"""Relevancy attention and RelLSTM: the Triton kernels against the reference.

``pytest -m gpu`` runs them on a GPU; without one they run in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

import samples
import throughtime
from cases import random
from cases_gpu import DEVICE, MARKS, ON_GPU, gpu, may_hang, needs_cuda, on_device
from samples import EVERYTHING, Attention, Layer, assert_same, doubled, expect, run
from throughtime import functional

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from throughtime.triton_kernels import relevancy

pytestmark = [*gpu, may_hang, *MARKS["triton"]]

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
# Sizes as they are used. Of so many float32 comparisons some may be ties but for rounding, so
# float32 gets those sizes without a choice to make.
LONG = Attention(2, 4, 700, 64, 64, 64, 64, lengths=True)
WIDE = Layer(60, 33, 10, 128, 25, 10, 15, lengths=True, mask="TB")
NO_CHOICE = (Attention(2, 4, 300, 64, 64, 300, 0), Layer(40, 33, 10, 128, 25, 40, 0, mask="T"))
LARGE = [
    *((x, torch.float64) for x in (*samples.ATTENTION, *samples.LAYERS, *NO_CHOICE, LONG, WIDE)),
    *((x, torch.float32) for x in (*samples.ATTENTION, *samples.LAYERS, *NO_CHOICE)),
]


def on_cpu(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in found.items()}


def check(case: Attention | Layer, dtype: torch.dtype = torch.float64) -> None:
    """The same keys are chosen, exactly."""
    given = case.inputs(dtype)
    found = run(case, on_device(given), "_triton")
    plain = expect(case, given) if dtype == torch.float32 else None
    assert_same(on_cpu(found), expect(case, doubled(given)), plain)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float64) for case in (*ATTENTION, *LAYERS)),
        *((case, torch.float32) for case in (ATTENTION[2], LAYERS[2])),
        *(pytest.param(*each, marks=needs_cuda) for each in LARGE),
    ],
    ids=str,
)
def test_kernels_match_the_reference(case: Attention | Layer, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", [ATTENTION[2], ATTENTION[5]], ids=str)
def test_keys_are_found_in_every_block_of_positions(
    case: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relevancy, "POSITIONS", 4)
    check(case)


@needs_cuda
@pytest.mark.parametrize("case", [samples.ATTENTION[2], LONG], ids=str)
def test_repeats_are_bit_equal(case: Attention) -> None:
    given = on_device(case.inputs(torch.float32))
    first = on_cpu(run(case, given, "_triton"))
    for _ in range(20):
        again = on_cpu(run(case, given, "_triton"))
        assert all(torch.equal(x, again[name]) for name, x in first.items())


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    """Arithmetic is float32's for 16-bit numbers, so the result is that of the same numbers."""
    q, k, v = (random(2, 2, 100, 32, seed=s, dtype=dtype).to(DEVICE) for s in range(3))
    found = functional.relevancy_attention(q, k, v, 16, 8, backend="triton")
    wide = q.float(), k.float(), v.float()
    wanted = functional.relevancy_attention(*wide, 16, 8, backend="triton")
    error = (found.float() - wanted).abs().max()
    assert found.dtype == dtype and error <= torch.finfo(dtype).eps * wanted.abs().max()


def test_calls_one_after_the_other_are_one_call() -> None:
    torch.manual_seed(0)
    units, batch = (40, 9) if ON_GPU else (5, 2)
    layer = throughtime.RelLSTM(5, units, window_size=6, top_k=4, backend="triton").to(DEVICE)
    x = random(30 if ON_GPU else 12, batch, 5, seed=1, dtype=torch.float32).to(DEVICE)
    with torch.no_grad():
        whole, _ = layer(x)
        parts, state = [], None
        for part in x.split(7):  # type: ignore[no-untyped-call]
            output, state = layer(part, state)
            parts.append(output)
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)
    assert whole.device == x.device and whole.abs().max() > 0.01


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, the interpreter, names each NaN
def test_ties_and_nan() -> None:
    """A new key has a quarter beside three retained ones, which have as much."""
    rows = torch.ones(1, 2, 15, 2, device=DEVICE)
    rows[0, 1, 8] = torch.nan
    relevance = torch.full((1, 2, 3), 0.25, device=DEVICE)
    forward = torch.ops.throughtime.relevancy_forward_triton
    output, _, last, index, *_ = forward(
        rows[:, :, 3:],
        rows,
        rows,
        None,
        None,
        relevance,
        3,
        1,
        3,
        0.5,
        False,
        1,
        None,
        None,
        False,
        False,
        None,
    )
    assert index[0, 0].tolist() == [0, 1, 2], "of equals the earlier keys stay"
    assert last[0, 0].tolist() == [11, 11, 11, *range(12)]
    assert output[0, 0].isfinite().all() and output[0, 1, :5].isfinite().all()
    assert output[0, 1, 5].isnan().all() and (last < 12).all()


def test_the_operators_refuse_what_the_paper_does_not_have() -> None:
    given = on_device(Attention(1, 1, 4, 2, 2, 2, 2, screen_every=2).inputs())
    with pytest.raises(RuntimeError, match="screen as the paper does"):
        run(Attention(1, 1, 4, 2, 2, 2, 2), given, "_triton")


def test_nothing_past_the_end_is_read() -> None:
    case = Layer(6, 3, 2, 4, 3, 2, 3, lengths=True)
    given = on_device(case.inputs())
    clean = run(case, given, "_triton")
    past = torch.arange(6, device=DEVICE).unsqueeze(1) >= given["lengths"]
    assert past.any()
    with torch.no_grad():
        given["input"][past] = torch.nan
        given["grad_output"][past] = torch.nan
    for name, tensor in run(case, given, "_triton").items():
        assert torch.equal(tensor, clean[name]), name


def test_public_functions_and_gradients() -> None:
    """An explicit backend runs Triton; "auto" never takes its interpreter."""
    chosen = throughtime.explain("rel_lstm", hidden_size=4, device=DEVICE).chosen
    assert (chosen == "triton") == ON_GPU
    q, k, v = (random(1, 1, 7, 2, seed=s).to(DEVICE).requires_grad_() for s in range(3))
    results = []
    for backend in ("triton", "reference"):
        output = functional.relevancy_attention(q, k, v, 2, 2, backend=backend)
        results.append((output, *torch.autograd.grad(output.square().sum(), (q, k, v))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    layer = throughtime.RelLSTM(2, 3, window_size=2, top_k=2, backend="triton").to(DEVICE)
    same = throughtime.RelLSTM(2, 3, window_size=2, top_k=2, backend="reference").to(DEVICE)
    same.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 2, device=DEVICE)
    (one, state), (other, expected) = layer(x), same(x)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(state.memory, expected.memory)
