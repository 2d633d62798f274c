"""What holds of the compiled kernels of relevancy screening alone, called as operators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from closeness import assert_all_close, assert_close
from samples import Attention, Layer, definition, doubled, expect, operate, run, taken
from throughtime import _ext
from throughtime.ops.relevancy.arguments import memory_sizes

if _ext.extension is None:
    pytest.skip("the compiled kernels are not in this installation", allow_module_level=True)
kernels: Any = _ext.extension


def test_threads_are_used() -> None:
    """The bit-equality above means something only if threads share the larger cases."""
    code = """
import os, torch
from samples import Attention, run
from throughtime import _ext
torch.set_num_threads(4)
_ext.extension.pretend_cpus(4)
case = Attention(4, 2, 300, 64, 64, 20, 20)
run(case, case.inputs())
print(len(os.listdir("/proc/self/task")))
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc to count threads in")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=env, timeout=120, stdout=subprocess.PIPE
    )
    assert int(done.stdout.split()[-1]) >= 4


@pytest.mark.parametrize(
    "case",
    [
        Attention(2, 2, 40, 12, 9, 4, 3),
        Attention(2, 2, 40, 12, 9, 4, 3, additive=True),
        Attention(2, 2, 40, 12, 9, 4, 3, screen_every=5),
        Attention(2, 2, 40, 12, 9, 4, 3, additive=True, screen_every=5),
        Attention(1, 2, 260, 20, 16, 70, 80),  # longer than a chain of sums
        Attention(1, 2, 260, 20, 16, 70, 80, screen_every=32),
    ],
    ids=str,
)
def test_chunks_give_the_bits_of_one_call(case: Attention) -> None:
    given = case.inputs(torch.float32)
    rows = {name: given[name].detach() for name in ("query", "key", "value")}
    with torch.no_grad():
        whole = operate("relevancy_forward", given)["output"]
        for sizes in ([1] * case.T, [7, 1, 2, case.T - 10], [case.T - 1, 1]):
            kept = {name: rows[name][:, :, :0] for name in ("key", "value")}
            left, at, outputs = {"relevance": None, "retained": 0, "seen": None}, 0, []
            for steps in sizes:
                now = {name: x[:, :, at : at + steps] for name, x in rows.items()}
                now |= {name: torch.cat([x, now[name]], 2) for name, x in kept.items()}
                found = operate("relevancy_forward", given | now | left)
                outputs.append(found["output"])
                prefix, retained = kept["key"].size(2), left["retained"]
                window = (case.window_size, case.top_k, case.screen_every)
                after = memory_sizes(steps, prefix, retained, *window)
                at += steps
                left = {"relevance": found["memory_relevance"], "retained": after[0]}
                left["seen"] = torch.full((case.B,), at)
                kept = {name: taken(now[name], found["memory_index"]) for name in kept}
            assert torch.equal(torch.cat(outputs, 2), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("additive", [False, True])
def test_output_and_gradient_follow_the_kernels_own_choice(
    dtype: torch.dtype, additive: bool
) -> None:
    """Ordinary masked attention over j <= i <= last_j is the same function of its inputs."""
    case = Attention(2, 3, 70, 12, 9, 4, 6, additive=additive)
    given = case.inputs(dtype)
    # Near-ties: most keys are copies of three.
    with torch.no_grad():
        given["key"][:] = given["key"][:, :, torch.arange(70) % 3]
    found, exact = run(case, given), doubled(given)
    q, k, v, w = (exact.get(name) for name in ("query", "key", "value", "score_weight"))
    i, j = torch.arange(70).unsqueeze(1), torch.arange(70)
    allowed = (j <= i) & (i <= found["last"].unsqueeze(2))
    assert (allowed.sum(-1) <= case.window_size + case.top_k).all()
    if w is None:
        scores = given["scale"] * q @ k.transpose(2, 3)
    else:
        scores = torch.tanh(q.unsqueeze(3) + k.unsqueeze(2)) @ w.view(1, 3, 1, 12, 1)
        scores = scores.squeeze(-1)
    output = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    leaves = {n: x for n, x in exact.items() if isinstance(x, Tensor) and x.requires_grad}
    grads = torch.autograd.grad(output, list(leaves.values()), exact["grad_output"])
    wanted = {"output": output.detach()}
    wanted |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    assert_all_close(
        {name: found[name] for name in wanted}, {n: x.to(dtype) for n, x in wanted.items()}
    )


def test_of_equals_the_earlier_keys_are_retained() -> None:
    """Every score is equal, so that a new key has a quarter beside three retained ones."""
    rows = dict.fromkeys(("key", "value"), torch.ones(1, 1, 33, 4))
    rows |= {"query": torch.ones(1, 1, 30, 4), "retained": 3}
    given = Attention(1, 1, 30, 4, 4, 1, 3).inputs(torch.float32) | rows
    for relevance, kept, last in (
        ([0.25, 0.25, 0.25], [0, 1, 2], [29, 29, 29, *range(30)]),
        ([0.125, 0.125, 0.25], [2, 3, 4], [1, 0, 29, 29, 29, *range(2, 30)]),
    ):
        given["relevance"] = torch.tensor(relevance).view(1, 1, 3)
        for found in (operate("relevancy_forward", given), definition("relevancy", given)):
            assert found["memory_index"].flatten().tolist() == kept
            assert found["last"].flatten().tolist() == last


def test_nan_stays_in_its_sample_and_head() -> None:
    case = Attention(2, 2, 20, 4, 4, 4, 3)
    given = case.inputs()
    clean = run(case, given)
    with torch.no_grad():
        given["key"][0, 1, 3] = torch.nan
    found = run(case, given)
    others = torch.tensor([[True, False], [True, True]])
    for name in ("output", "last", "grad_query", "grad_key", "grad_value"):
        assert torch.equal(found[name][others], clean[name][others]), name
    output, last = found["output"], found["last"]
    assert output[0, 1].isnan().any() and ((last >= -1) & (last < 20)).all()
    assert output[0, 1, :3].isfinite().all(), "queries before the key do not see it"


@pytest.mark.parametrize("screen_every", [1, 8, 32])
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output"])
def test_an_infinity_reaches_what_it_reaches_in_the_definition(
    name: str, screen_every: int
) -> None:
    """Not what shares a block of queries or of keys with it."""
    case = Attention(2, 2, 70, 8, 8, 6, 5, screen_every=screen_every)
    given = case.inputs()
    with torch.no_grad():
        given[name][0, 1, 33, 3] = torch.inf
    found, wanted = run(case, given), expect(case, given)
    assert torch.equal(found["last"], wanted["last"])
    for each in ("output", "grad_query", "grad_key", "grad_value"):
        finite = found[each].isfinite()
        assert torch.equal(finite, wanted[each].isfinite()), each
        assert_close(found[each].where(finite, 0), wanted[each].where(finite, 0), each)
    assert not found["grad_key"].isfinite().all()


def test_nan_stays_in_its_row_of_a_layer() -> None:
    case = Layer(12, 3, 2, 5, 4, 3, 2)
    given = case.inputs()
    clean = run(case, given)
    with torch.no_grad():
        given["input"][4, 1] = torch.nan
    found = run(case, given)
    for name in ("output", "h_n", "c_n", "context_n", "grad_input", "grad_h_0"):
        rows, wanted = (x.movedim(-2, 0) for x in (found[name], clean[name]))
        assert torch.equal(rows[[0, 2]], wanted[[0, 2]]), name
    assert found["output"][:4].isfinite().all() and found["output"][4, 1].isnan().all()


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (Attention(3, 2, 9, 3, 19, 2, 50, additive=True, lengths=True), ("query", "key", "value")),
        (Layer(15, 5, 2, 16, 3, 2, 3, lengths=True), ("input",)),
    ],
    ids=str,
)
def test_nothing_past_the_end_is_read(case: Attention | Layer, names: tuple[str, ...]) -> None:
    given = case.inputs()
    clean = run(case, given)
    past = torch.arange(case.T) >= given["lengths"].unsqueeze(1)
    past = past.T if isinstance(case, Layer) else past.unsqueeze(1).expand(-1, case.heads, -1)
    assert past.any()
    with torch.no_grad():
        for name in (*names, "grad_output"):
            given[name][past] = torch.nan
    for name, tensor in run(case, given).items():
        assert torch.equal(tensor, clean[name]), name


# Sequences that are long enough for a team, of whole vectors and not, at several borders.
SHARED = [
    Attention(1, 1, 900, 16, 32, 30, 20),
    Attention(1, 1, 700, 20, 9, 70, 40, screen_every=5),
    Attention(1, 3, 600, 16, 20, 20, 10, screen_every=32),
    Attention(1, 1, 1100, 16, 16, 40, 0, screen_every=50, given=True),
    Attention(1, 1, 800, 12, 16, 40, 30, before=60, normalize=True),
    Attention(3, 1, 1200, 16, 16, 40, 30, lengths=True, screen_every=3),
    Attention(1, 1, 700, 20, 9, 40, 30, group=3),
    Attention(1, 1, 1300, 20, 16, 40, 30, packed=(700, 0, 600), screen_every=4),
]


@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_bits_where_a_team_shares_a_sequence(
    case: Attention, infinite: bool, threads: None
) -> None:
    given = case.inputs(torch.float32)
    if infinite:
        for name in ("key", "value"):
            given[name] = given[name].detach().clone()
            given[name][..., case.T // 3, 1] = torch.inf
            given[name].requires_grad_()
    torch.set_num_threads(1)
    alone = run(case, given)
    for count in (2, 3, 5, 8) * 3:
        sequences = (len(case.packed) or case.B) * case.heads
        longest = max(case.packed or (case.T,))
        plan = kernels.relevancy_plan(sequences, longest, case.D, 40, count, True)
        shares = sequences % count
        assert (plan[-1]["members"] > 1) == bool(shares and count // shares > 1)
        torch.set_num_threads(count)
        together = run(case, given)
        for name, tensor in alone.items():
            assert torch.equal(tensor.nan_to_num(7.0), together[name].nan_to_num(7.0)), (
                name,
                count,
            )
