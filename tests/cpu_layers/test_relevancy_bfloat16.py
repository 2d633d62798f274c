"""Relevancy attention with bfloat16 operands, by every instruction that multiplies them.

AMX is a stand-in here, as in test_lstm_bfloat16.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from closeness import rms
from samples import ATTENTION, BEYOND_PAPER, Attention, Given, detached, doubled, expect, taken
from throughtime.ops.relevancy.arguments import memory_sizes

CASES = [case for case in (*ATTENTION, *BEYOND_PAPER) if not case.additive]
LARGE = (
    Attention(1, 2, 300, 64, 64, 64, 64),
    Attention(1, 1, 300, 33, 70, 30, 20, screen_every=32, group=2),
    Attention(2, 1, 530, 20, 16, 70, 80, lengths=True),
    Attention(1, 1, 150, 16, 16, 3, 5, screen_every=31),  # a block's queries have no key in common
)


def given_for(case: Attention) -> Given:
    """Arguments of the operators: rows in bfloat16, relevance in float32."""
    given = detached(case.inputs(torch.bfloat16))
    for name in ("relevance", "given"):
        if given[name] is not None:
            given[name] = given[name].float()
    return given


def forward(layer: Any, given: Given, threads: int = 1) -> dict[str, Tensor]:
    """Results by the names of the operators."""
    query, value = given["query"], given["value"]
    (B, heads, T, _), keys = query.shape, value.size(2)
    starts, retained = given.get("cu_seqlens"), given["retained"]
    window = [given[name] for name in ("window_size", "top_k", "screen_every")]
    left = 0 if starts is not None else sum(memory_sizes(T, keys - T, retained, *window))

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    last, index = (torch.zeros(B, value.size(1), n, dtype=torch.int64) for n in (keys, left))
    found = {"output": room(B, heads, T, value.size(3), dtype=query.dtype), "last": last}
    found |= {"memory_index": index, "memory_relevance": room(*index.shape)}
    received = room(*last.shape) if given["return_relevance"] else None
    sizes, call = _call(given, threads)
    layer("forward", sizes, [*call, given["relevance"], given["given"], found["output"],
                             room(B, heads, T), last, None if starts is not None else index,
                             found["memory_relevance"], received])  # fmt: skip
    return found | ({} if received is None else {"received": received})


def run(layer: Any, given: Given, threads: int = 1) -> dict[str, Tensor]:
    """The same, and gradients."""
    found = forward(layer, given, threads)
    grads = {name: torch.full_like(given[name], torch.nan) for name in ("query", "key", "value")}
    sizes, call = _call(given | {"top_k": given["retained"]}, threads)
    layer("backward", sizes, [*call, given["grad_output"], found["last"], *grads.values()])
    return found | {f"grad_{name}": grad for name, grad in grads.items()}


def _call(given: Given, threads: int) -> tuple[Tensor, list[Tensor | None]]:
    query, key, value = (given[name] for name in ("query", "key", "value"))
    starts, (B, heads, T, D) = given.get("cu_seqlens"), query.shape
    samples = B if starts is None else len(starts) - 1
    longest = T if starts is None else int(starts.diff().max())
    options = ("window_size", "top_k", "screen_every", "keep_first", "normalize")
    window_size, top_k, screen_every, keep_first, normalize = (given[name] for name in options)
    sizes = [samples, key.size(1), heads // key.size(1), D, value.size(3), longest]
    sizes += [key.size(2) - T, given["retained"], window_size, top_k, screen_every]
    sizes += [T, keep_first, normalize, threads]
    steps = (given["lengths"], given["seen"], starts)
    scale = torch.tensor(given["scale"], dtype=torch.float32)
    return torch.tensor(sizes), [query, key, value, *steps, scale]


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_against_the_reference(layer: Any, case: Attention) -> None:
    """bfloat16 rounds operands by at most 2^-9 of their size; nothing else rounds as much.

    Scores are sums of exact products, so the same keys are chosen.
    """
    given = given_for(case)
    exact = doubled(given)
    for name in ("query", "key", "value"):
        exact[name].requires_grad_()
    wanted, found = expect(case, exact), run(layer, given)
    for name in ("last", "memory_index"):
        assert torch.equal(found.pop(name), wanted[name])
    assert found.keys() <= wanted.keys()
    for name in [name for name, x in found.items() if x.numel()]:
        allowed = 1e-2 if found[name].dtype == torch.bfloat16 else 1e-5
        assert rms(found[name], wanted[name]) <= allowed, name


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_bits_do_not_depend_on_threads(layer: Any, case: Attention) -> None:
    given = given_for(case)
    one = run(layer, given)
    assert all(x.isfinite().all() for x in one.values())
    for threads in (2, 3, 8):
        found = run(layer, given, threads)
        assert all(torch.equal(x, one[name]) for name, x in found.items())


@pytest.mark.parametrize("case", [*LARGE, Attention(1, 2, 23, 7, 7, 5, 4)], ids=str)
def test_bits_do_not_depend_on_the_batch(layer: Any, case: Attention) -> None:
    """A head of keys alone has the bits that it has beside others."""
    given = given_for(case) | {"lengths": None}
    whole = run(layer, given)
    for head in range(given["key"].size(1)):
        queries = slice(head * case.group, (head + 1) * case.group)
        alone = given | {
            name: given[name][:1, queries if name in ("query", "grad_output") else [head]]
            .contiguous()
            for name in ("query", "key", "value", "grad_output")
        }  # fmt: skip
        for name, x in run(layer, alone).items():
            of_queries = name in ("output", "grad_query")
            assert torch.equal(x, whole[name][:1, queries if of_queries else [head]]), name


@pytest.mark.parametrize("case", [*LARGE[:2], Attention(1, 1, 300, 8, 2000, 64, 64)], ids=str)
def test_chunks_give_the_bits_of_one_call(layer: Any, case: Attention) -> None:
    """The wide one has enough numbers for some to be rounded up by one order of a sum alone."""
    given = given_for(case)
    whole = forward(layer, given)["output"]
    window = (case.window_size, case.top_k, case.screen_every)
    for sizes in ([7, 1, 2, 50, case.T - 60], [150, 3, case.T - 153], [case.T - 1, 1]):
        kept = {name: given[name][:, :, :0] for name in ("key", "value")}
        left, at, outputs = {"relevance": None, "retained": 0, "seen": None}, 0, []
        for steps in sizes:
            now = {n: given[n][:, :, at : at + steps] for n in ("query", "key", "value")}
            now |= {name: torch.cat([x, now[name]], 2) for name, x in kept.items()}
            now = {name: x.contiguous() for name, x in now.items()}
            found = forward(layer, given | now | left)
            outputs.append(found["output"])
            prefix = kept["key"].size(2)
            at += steps
            left["retained"] = memory_sizes(steps, prefix, left["retained"], *window)[0]
            left["relevance"], left["seen"] = found["memory_relevance"], torch.tensor([at])
            kept = {name: taken(now[name], found["memory_index"]) for name in kept}
        assert torch.equal(torch.cat(outputs, 2), whole)


@pytest.mark.parametrize("number", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output"])
def test_infinity_and_nan_reach_what_attends_them(layer: Any, name: str, number: float) -> None:
    """As in the reference, whatever shares a block with them."""
    case = Attention(1, 1, 90, 20, 16, 12, 5, screen_every=4)
    given = given_for(case)
    given[name][0, 0, 37, 3] = number
    exact = doubled(given)
    for leaf in ("query", "key", "value"):
        exact[leaf].requires_grad_()
    wanted, found = expect(case, exact), run(layer, given)
    assert torch.equal(found["last"], wanted["last"])
    for result in ("output", "grad_query", "grad_key", "grad_value"):
        there = wanted[result].isfinite()
        assert torch.equal(found[result].isfinite(), there), result
        assert rms(found[result][there], wanted[result][there]) <= 1e-2, result


def test_the_stand_in_has_the_bits_of_amx(layer: Any, stand_in: Any) -> None:
    if layer.isa != "amx":
        pytest.skip("this processor has no AMX, or this is another instruction set's turn")
    for case in (*CASES, *LARGE):
        given = given_for(case)
        one, other = run(layer, given), run(stand_in, given)
        assert all(torch.equal(x, other[name]) for name, x in one.items())
