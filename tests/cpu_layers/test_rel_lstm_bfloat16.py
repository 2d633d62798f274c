"""RelLSTM with bfloat16 operands, by every instruction that multiplies them.

AMX is a stand-in here, as in test_lstm_bfloat16.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from closeness import rms
from samples import EVERYTHING, Given, Layer, detached, doubled, expect

WEIGHTS = ("weight_ih", "weight_hh", "weight_query", "weight_key", "weight_score")
STATES = ("h_0", "c_0", "context_0")
# None of them leaves out a key: rounding may change which one is the least relevant.
WHOLE = (
    Layer(1, 1, 1, 1, 1, 1, 0),
    Layer(20, 3, 3, 19, 21, 20, 0, mask="T"),
    Layer(15, 5, 2, 16, 3, 2, EVERYTHING, lengths=True, mask="TB"),
    Layer(9, 3, 33, 40, 16, 3, 50, lengths=True, before=11),
    Layer(7, 37, 3, 20, 70, 7, 0, lengths=True, mask="TB"),
    Layer(40, 40, 5, 20, 20, 40, 0),
)
SCREENED = (
    Layer(30, 1, 10, 130, 60, 10, 15),
    Layer(25, 7, 3, 70, 40, 4, 3, lengths=True, before=9, mask="TB"),
)


def given_for(case: Layer) -> Given:
    """Arguments that bfloat16 holds, in float32."""
    given = detached(case.inputs(torch.bfloat16))
    return {
        name: (x.float() if x.is_floating_point() else x).contiguous()
        if isinstance(x, Tensor)
        else x
        for name, x in given.items()
    }


def run(layer: Any, case: Layer, given: Given, threads: int = 1) -> dict[str, Tensor]:
    """Results and gradients by the names of the operators."""
    x, memory = given["input"].bfloat16(), given.get("memory")
    T, B, _ = x.shape
    H, P = case.H, 0 if memory is None else memory.size(0)
    sizes = torch.tensor(
        [T, B, case.I, H, case.A, P, given["retained"], case.window_size, case.top_k,
         case.keep_first, threads]
    )  # fmt: skip
    lengths, order = given["lengths"], torch.arange(B)
    if lengths is not None:
        lengths, order = lengths.sort(descending=True)
    call = (x, *(given[name] for name in WEIGHTS), lengths, order)
    left = min(case.window_size - 1, P - given["retained"] + T) + min(
        case.top_k, given["retained"] + max(0, P - given["retained"] + T - case.window_size + 1)
    )

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    found = {"output": room(T, B, H, dtype=x.dtype)}
    found |= {name: room(B, H) for name in ("h_n", "c_n", "context_n")}
    last, index = torch.zeros(P + T, B, dtype=torch.int64), torch.zeros(left, B, dtype=torch.int64)
    saved = room(layer("saved_size", x, sizes))
    states = (given[name] for name in STATES)
    layer("forward", sizes, [*call, *states, given["bias_ih"], memory, given["relevance"],
                             *found.values(), last, index, room(left, B), saved])  # fmt: skip
    grads = {"input": torch.zeros_like(x), **{name: room(B, H) for name in STATES}}
    grads["memory"] = room(P, B, H)
    for name in ("weight_ih", "weight_hh", "bias_ih", "weight_query", "weight_key", "weight_score"):
        grads[name] = torch.full_like(given[name], torch.nan)
    layer("backward", sizes, [*call, given["c_0"], last, saved, given["grad_output"].bfloat16(),
                              *(given[f"grad_{name}"] for name in ("h_n", "c_n", "context_n")),
                              given["detach_mask"], *grads.values()])  # fmt: skip
    found |= {f"grad_{name}": grad for name, grad in grads.items() if grad.numel()}
    return found | {"last": last, "memory_index": index}


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_against_the_reference(layer: Any, case: Layer) -> None:
    """bfloat16 rounds operands by at most 2^-9 of their size; nothing else rounds as much."""
    given = given_for(case)
    exact = doubled(given)
    for name, x in exact.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_(not name.startswith("grad_") and name != "relevance")
    wanted, found = expect(case, exact), run(layer, case, given)
    assert torch.equal(found.pop("last"), wanted["last"])
    assert torch.equal(found.pop("memory_index"), wanted["memory_index"])
    for name, x in found.items():
        assert rms(x, wanted[name]) <= 2e-2, name


@pytest.mark.parametrize("case", SCREENED, ids=str)
def test_bits_do_not_depend_on_threads(layer: Any, case: Layer) -> None:
    given = given_for(case)
    one = run(layer, case, given)
    assert all(x.isfinite().all() for x in one.values())
    for threads in (2, 3, 8, 40):
        found = run(layer, case, given, threads)
        assert all(torch.equal(x, one[name]) for name, x in found.items())


def test_the_stand_in_has_the_bits_of_amx(layer: Any, stand_in: Any) -> None:
    if layer.isa != "amx":
        pytest.skip("this processor has no AMX, or this is another instruction set's turn")
    for case in (*WHOLE, *SCREENED):
        given = given_for(case)
        one, other = run(layer, case, given), run(stand_in, case, given)
        assert all(torch.equal(x, other[name]) for name, x in one.items())
