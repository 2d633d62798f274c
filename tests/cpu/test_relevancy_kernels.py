"""The compiled kernels of relevancy screening, called as operators, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import random
from cases_relevancy import (
    ATTENTION,
    GRADIENTS,
    LAYERS,
    Attention,
    Layer,
    assert_same,
    attention_inputs,
    doubled,
    expect_attention,
    expect_layer,
    flat,
    layer_grads,
    layer_inputs,
    ops,
    run_attention,
    run_layer,
    taken,
    without_second_bias,
)
from closeness import assert_all_close
from throughtime import _ext
from throughtime.reference.screening import Memory

if _ext.extension is None:
    pytest.skip("the compiled kernels are not in this installation", allow_module_level=True)
kernels: Any = _ext.extension


@pytest.fixture
def threads() -> Iterator[None]:
    """The test sets the number of threads; kernels take as many workers on any machine."""
    before = torch.get_num_threads()
    kernels.pretend_cpus(8)
    yield
    kernels.pretend_cpus(0)
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_matches_the_reference(isa: str, case: Attention, threads: None) -> None:
    torch.set_num_threads(2)
    given, grad = attention_inputs(case), random(case.B, case.heads, case.T, case.Dv, seed=9)
    assert_same(run_attention(case, given, grad), expect_attention(case, given, grad))
    given, grad = attention_inputs(case, torch.float32), grad.float()
    exact = expect_attention(case, doubled(given), grad.double())
    plain = expect_attention(case, given, grad)
    assert_same(run_attention(case, given, grad), exact, plain)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layer_matches_the_reference(isa: str, case: Layer, threads: None) -> None:
    torch.set_num_threads(2)
    given, grads = layer_inputs(case), layer_grads(case)
    assert_same(run_layer(case, given, grads), expect_layer(case, given, grads))
    given, grads = layer_inputs(case, torch.float32), layer_grads(case, torch.float32)
    exact = expect_layer(case, doubled(given), [g.double() for g in grads])
    assert_same(run_layer(case, given, grads), exact, expect_layer(case, given, grads))


@pytest.mark.parametrize("case", [*ATTENTION, *LAYERS], ids=str)
def test_bit_equal_for_every_number_of_threads(case: Attention | Layer, threads: None) -> None:
    def once() -> dict[str, Tensor]:
        if isinstance(case, Attention):
            grad = random(case.B, case.heads, case.T, case.Dv, seed=9, dtype=torch.float32)
            return flat(run_attention(case, attention_inputs(case, torch.float32), grad))
        grads = layer_grads(case, torch.float32)
        return flat(run_layer(case, layer_inputs(case, torch.float32), grads))

    torch.set_num_threads(1)
    first = once()
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        again = once()
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name]), f"{name} with {count} threads"


def test_threads_are_used() -> None:
    """The bit-equality above means something only if the larger cases are cut among threads."""
    code = "import torch; from test_relevancy_kernels import *; "
    code += "torch.set_num_threads(4); kernels.pretend_cpus(4); "
    code += "case = Attention(4, 2, 300, 64, 64, 20, 20); given = attention_inputs(case); "
    code += "run_attention(case, given, torch.randn(4, 2, 300, 64, dtype=torch.float64))"
    folders = map(str, Path(__file__).parents[:2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    count = "import threading, os; print(len(os.listdir('/proc/self/task')))"
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc to count threads in")
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {count}"],
        check=True,
        env=env,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout.split()[-1]) >= 4


@pytest.mark.parametrize("additive", [False, True])
def test_chunks_give_the_bits_of_one_call(additive: bool) -> None:
    case = Attention(2, 2, 40, 12, 9, 4, 3, additive=additive)
    given = attention_inputs(case, torch.float32)
    q, k, v, w = (given.get(name) for name in ("query", "key", "value", "score_weight"))
    with torch.no_grad():
        whole = ops.relevancy_forward(q, k, v, w, None, None, 0, 4, 3, 0.7, False)
        for cuts in ([1] * 40, [7, 1, 2, 30], [39, 1]):
            kept = [x[:, :, :0] for x in (k, v)]
            relevance, retained, at, outputs = None, 0, 0, []
            for steps in cuts:
                now = [
                    torch.cat([a, b[:, :, at : at + steps]], 2)
                    for a, b in zip(kept, (k, v), strict=True)
                ]
                output, _, _, index, relevance = ops.relevancy_forward(
                    q[:, :, at : at + steps], *now, w, None, relevance, retained, 4, 3, 0.7, False
                )
                outputs.append(output)
                retained = min(3, retained + max(0, kept[0].size(2) - retained + steps - 3))
                kept = [taken(x, Memory(index, relevance, retained)) for x in now]
                at += steps
            assert torch.equal(torch.cat(outputs, 2), whole[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("additive", [False, True])
def test_output_and_gradient_follow_the_kernels_own_choice(
    dtype: torch.dtype, additive: bool
) -> None:
    """Ordinary masked attention over j <= i <= last_j is the same function of its inputs."""
    case = Attention(2, 3, 70, 12, 9, 4, 6, additive=additive)
    given = attention_inputs(case, dtype)
    # Near-ties: most keys are copies of three.
    with torch.no_grad():
        given["key"][:] = given["key"][:, :, torch.arange(70) % 3]
    grad = random(2, 3, 70, 9, seed=9, dtype=dtype)
    found = run_attention(case, given, grad)
    q, k, v = (given[name].detach().double().requires_grad_() for name in ("query", "key", "value"))
    w = given["score_weight"].detach().double().requires_grad_() if additive else None
    i, j = torch.arange(70).unsqueeze(1), torch.arange(70)
    allowed = (j <= i) & (i <= found["last"].unsqueeze(2))
    assert (allowed.sum(-1) <= case.window_size + case.top_k).all()
    if w is None:
        scores = case.scale * q @ k.transpose(2, 3)
    else:
        scores = torch.tanh(q.unsqueeze(3) + k.unsqueeze(2)) @ w.view(1, 3, 1, 12, 1)
        scores = scores.squeeze(-1)
    output = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    leaves = [q, k, v] + ([w] if w is not None else [])
    grads = torch.autograd.grad(output, leaves, grad.double())
    names = ("output", "grad query", "grad key", "grad value", "grad score_weight")
    wanted = dict(zip(names, (output.detach(), *grads), strict=False))
    assert_all_close(
        {name: found[name] for name in wanted}, {n: x.to(dtype) for n, x in wanted.items()}
    )


def test_of_equals_the_earlier_keys_are_retained() -> None:
    ones = torch.ones(1, 1, 30, 4)
    _, _, last, index, _ = ops.relevancy_forward(
        ones, ones, ones, None, None, None, 0, 5, 3, 0.5, False
    )
    # Keys that met a window not yet full got more: the first has most. From key 4 on all are equal.
    assert index[0, 0, :3].tolist() == [0, 1, 2]
    _, _, _, index, _ = ops.relevancy_forward(
        ones, ones, ones, None, None, None, 0, 1, 3, 0.5, False
    )
    assert index[0, 0].tolist() == [0, 1, 2]
    assert last[0, 0, 5:25].tolist() == list(range(9, 29))


def test_nan_stays_in_its_sample_and_head() -> None:
    q, k, v = (random(2, 2, 20, 4, seed=s).requires_grad_() for s in range(3))
    with torch.no_grad():
        k[0, 1, 3] = torch.nan
        results = ops.relevancy_forward(q, k, v, None, None, None, 0, 4, 3, 0.5, False)
        output, lse, last = results[:3]
        grads = ops.relevancy_backward(
            torch.ones_like(output), q, k, v, None, None, output, lse, last, 0, 4, 0.5
        )
        clean = ops.relevancy_forward(q, k.nan_to_num(), v, None, None, None, 0, 4, 3, 0.5, False)
    others = torch.tensor([[True, False], [True, True]])
    assert torch.equal(output[others], clean[0][others]) and torch.equal(
        last[others], clean[2][others]
    )
    assert output[0, 1].isnan().any() and ((last >= -1) & (last < 20)).all()
    assert output[0, 1, :3].isfinite().all(), "queries before the key do not see it"
    for grad in grads[:3]:
        assert grad[others].isfinite().all()


def test_nan_stays_in_its_row_of_a_layer() -> None:
    case = Layer(12, 3, 2, 5, 4, 3, 2)
    given, grads = layer_inputs(case), layer_grads(case)
    clean = run_layer(case, given, grads)
    with torch.no_grad():
        given["input"][4, 1] = torch.nan
    found = run_layer(case, given, grads)
    for name in ("output", "h_n", "c_n", "context_n", "grad input", "grad h_0"):
        rows, wanted = (x.movedim(-2, 0) for x in (found[name], clean[name]))
        assert torch.equal(rows[[0, 2]], wanted[[0, 2]]), name
    assert found["output"][:4].isfinite().all() and found["output"][4, 1].isnan().all()


def test_nothing_past_the_end_is_read() -> None:
    attention = Attention(3, 2, 9, 3, 19, 2, 50, additive=True, lengths=True)
    given = attention_inputs(attention)
    grad = random(3, 2, 9, 19, seed=9)
    clean = flat(run_attention(attention, given, grad))
    past = torch.arange(9) >= given["lengths"].view(3, 1, 1)
    assert past.any()
    with torch.no_grad():
        for name in ("query", "key", "value"):
            given[name][past.expand(3, 2, 9)] = torch.nan
        grad = grad.masked_fill(past.unsqueeze(-1), torch.nan)
    for name, tensor in flat(run_attention(attention, given, grad)).items():
        assert torch.equal(tensor, clean[name]), name

    case = Layer(15, 5, 2, 16, 3, 2, 3, lengths=True)
    given, grads = layer_inputs(case), layer_grads(case)
    clean = flat(run_layer(case, given, grads))
    past = torch.arange(15).unsqueeze(1) >= given["lengths"]
    assert past.any()
    with torch.no_grad():
        given["input"][past] = torch.nan
        grads[0][past] = torch.nan
    for name, tensor in flat(run_layer(case, given, grads)).items():
        assert torch.equal(tensor, clean[name]), name


@pytest.mark.parametrize("case", [LAYERS[1], LAYERS[3]], ids=str)
def test_saving_nothing_and_needing_nothing_changes_nothing(case: Layer) -> None:
    given, grads = layer_inputs(case), layer_grads(case)
    full = run_layer(case, given, grads)
    initial = [given[name] for name in ("input", "h_0", "c_0", "context_0")]
    weights = [given["weight_ih"], given["weight_hh"]]
    attention = [given[name] for name in ("weight_query", "weight_key", "weight_score")]
    with torch.no_grad():
        found = {}
        for save in (False, True):
            found[save] = ops.rel_lstm_forward(
                *initial,
                given.get("memory"),
                given["relevance"],
                *weights,
                given["bias"],
                None,
                *attention,
                given["lengths"],
                None,
                given["retained"],
                case.window_size,
                case.top_k,
                False,
                save,
            )
        assert found[False][-1].numel() == 0
        for one, other in zip(found[False][:-1], found[True][:-1], strict=True):
            assert torch.equal(one, other)
        few = ops.rel_lstm_backward(
            *grads,
            *(given[name] for name in ("input", "c_0")),
            *weights,
            *attention,
            given["lengths"],
            given["mask"],
            found[True][4],
            found[True][-1],
            given["retained"],
            case.window_size,
            False,
            False,
        )
    for name, grad in zip(GRADIENTS, without_second_bias(few), strict=True):
        if name in ("h_0", "c_0", "context_0") or (name == "memory" and name in given):
            assert torch.equal(grad, full[f"grad {name}"]), name
        else:
            assert grad.numel() == 0, name


WRONG = {
    "key should have the T = 5": {"key": (2, 3, 4, 8)},
    "key should have shape \\[2, 3, 5, 8\\], got \\[2, 3, 5, 7\\]": {"key": (2, 3, 5, 7)},
    "value should have shape \\[2, 3, 5, 8\\], got \\[2, 2, 5, 8\\]": {"value": (2, 2, 5, 8)},
    "score_weight should have shape \\[3, 8\\], got \\[8\\]": {"score_weight": (8,)},
    "query should be \\[B, heads, T, D\\], got 3 dimensions": {"query": (2, 5, 8)},
}


@pytest.mark.parametrize("message", WRONG)
def test_operator_names_what_is_wrong(message: str) -> None:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("query", "key", "value"), (2, 3, 5, 8))
    shapes |= {"score_weight": (3, 8)} | WRONG[message]
    tensors = [torch.zeros(shape) for shape in shapes.values()]
    with pytest.raises(RuntimeError, match=message):
        ops.relevancy_forward(*tensors, None, None, 0, 2, 2, 1.0, False)


def test_operator_refuses_an_impossible_memory_and_window() -> None:
    q, k = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 8, 2)
    call = ops.relevancy_forward
    with pytest.raises(RuntimeError, match=r"at most top_k = 1 retained positions.*got 2 and 3"):
        call(q, k, k, None, None, torch.zeros(1, 1, 5), 2, 9, 1, 1.0, False)
    with pytest.raises(RuntimeError, match="relevance should be given for the 5 keys"):
        call(q, k, k, None, None, None, 2, 9, 4, 1.0, False)
    with pytest.raises(RuntimeError, match="window_size should be at least 1"):
        call(q, q, q, None, None, None, 0, 0, 4, 1.0, False)
    with pytest.raises(RuntimeError, match=r"lengths should be in \[0, 3\].*got 4 for sample 0"):
        call(q, q, q, None, torch.tensor([4]), None, 0, 1, 4, 1.0, False)
