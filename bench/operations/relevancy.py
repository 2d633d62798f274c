"""``bench relevancy``: relevancy attention of ``[B, heads, T, D]`` beside attention of torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.operations.operation import (
    OURS,
    Case,
    Contestant,
    Operation,
    Peer,
    Work,
    computed,
    placed,
    random,
)
from bench.operations.rel_lstm import pairs
from throughtime import functional

# B * heads * T^2 from which a call takes minutes (at this: 26 s), or its weights fill gigabytes.
TOO_LONG = (8 * 32768**2, "its time grows with T^2, one call would take minutes")
TOO_LARGE = (8 * 2048**2, "its memory grows with T^2, the weights would fill gigabytes")
REFERENCE_STEPS = 512
SIZES: dict[str, Any] = {
    "B": 2,
    "heads": 4,
    "D": 64,
    "window_size": 64,
    "top_k": 64,
    "screen_every": 1,
}


def _case(T: int) -> Case:
    return Case(op="relevancy", T=T, score="dot", **SIZES)


def full_why_not(limit: tuple[int, str], case: Case) -> str | None:
    """Full attention is quadratic, and has the score of a product."""
    if case.score != "dot":
        return f"cannot run: full attention has no {case.score} score"
    most, reason = limit
    return f"not measured: {reason}" if case.queries * case.T > most else None


def attend(contestant: Contestant, case: Case, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The output and, of ours, ``last``: the last query that attended each key."""
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    if contestant.impl == "sdpa":
        return {"output": F.scaled_dot_product_attention(query, key, value, is_causal=True)}
    if contestant.impl == "banded":
        mask = torch.ones(case.T, case.T, dtype=torch.bool, device=query.device)
        mask = mask.tril().triu(1 - (case.window_size or 1))
        return {"output": F.scaled_dot_product_attention(query, key, value, attn_mask=mask)}
    if contestant.impl == "full":
        future = torch.ones(case.T, case.T, dtype=torch.bool, device=query.device).triu(1)
        scores = query.shape[-1] ** -0.5 * query @ key.transpose(2, 3)
        return {"output": scores.masked_fill(future, -torch.inf).softmax(3) @ value}
    output, last = functional.relevancy_attention(  # type: ignore[call-overload]
        *(query, key, value, case.window_size, case.top_k),
        score=case.score,
        score_weight=inputs.get("score_weight"),
        screen_every=case.screen_every or 1,
        return_retained=True,
        backend=contestant.backend or "auto",
    )
    return {"output": output, "last": last}


class Relevancy(Operation):
    name, kernel = "relevancy", "relevancy_attention"
    sizes: ClassVar = {
        "T": "steps",
        "B": "batch",
        "heads": "attention heads",
        "D": "features per head",
        "window_size": "latest keys attended",
        "top_k": "retained keys attended",
        "screen_every": "queries from one change of the retained keys to the next",
    }
    default = tuple(_case(T) for T in (512, 1024, 2048, 4096, 8192, 16384))
    quick = (_case(512), _case(2048))
    typical = _case(2048)
    peers: ClassVar = {
        name: Peer(label, same_function=False, why_not=partial(full_why_not, limit))
        for name, label, limit in (
            ("sdpa", "full attention (sdpa)", TOO_LONG),
            ("banded", "the window alone (sdpa with a mask)", TOO_LONG),
            ("full", "full attention by hand", TOO_LARGE),
        )
    }
    default_peers = ("sdpa",)
    scores = ("dot", "additive")

    def reference_why_not(self, case: Case) -> str | None:
        if case.T > REFERENCE_STEPS:
            return "not measured: a Python loop over T, one call would take many seconds"
        return None

    def gflop(self, impl: str, case: Case) -> float:
        """Scores and outputs; backward four products of that size. Full attention has its own.

        Scores that a backward pass computes anew are not counted, as they could be kept.
        """
        sizes = {
            OURS: (case.window_size, case.top_k, case.screen_every or 1),
            "banded": (case.window_size, 0),
        }
        attended = case.B * case.heads * pairs(case.T, *sizes.get(impl, (case.T, 0)))
        return 1e-9 * attended * 4 * case.D * (3 if case.trains else 1)

    def gbyte(self, impl: str, case: Case) -> float:
        """Query, key and value read, output written; backward these, its gradient, and theirs."""
        tensors = 4 + (7 if case.trains else 0)
        return 1e-9 * case.itemsize * case.queries * case.D * tensors

    def work(self, contestant: Contestant, case: Case, *, exact: bool = False) -> Work:
        """Query, key and value from seeds 0 to 2, gradient of the output from seed 4."""
        shape = (case.B, case.heads, case.T, case.D)
        made = {name: random(*shape, seed=k) for k, name in enumerate(("query", "key", "value"))}
        if case.score == "additive":
            made["score_weight"] = random(case.heads, case.D, seed=3) / case.D**0.5
        leaves = {name: placed(x, case, exact=exact).requires_grad_() for name, x in made.items()}
        output_grad = placed(random(*shape, seed=4), case, exact=exact)
        call = computed(partial(attend, contestant, case, leaves), case, exact=exact)
        return Work(call, leaves, output_grad)
