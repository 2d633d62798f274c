"""``bench relevancy``: relevancy attention of ``[B, heads, T, D]`` beside attention of torch."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

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


def flex_why_not(case: Case) -> str | None:
    """FlexAttention has no backward pass on CPUs, and needs a compiler there."""
    if case.device == "cpu" and case.mode != "inference":
        return "cannot run: FlexAttention has no backward pass on CPUs; --modes inference"
    if case.device == "cpu" and not shutil.which("c++"):
        return "cannot run: FlexAttention needs a C++ compiler, and there is no c++ here"
    return full_why_not(TOO_LONG, case)


def h2o_why_not(case: Case) -> str | None:
    """H2O wants all weights at once, and another package."""
    if importlib.util.find_spec("kvpress") is None:
        return "cannot run: kvpress is not installed: pip install kvpress"
    return full_why_not(TOO_LARGE, case)


def weights_of_all(case: Case, query: Tensor, key: Tensor) -> Tensor:
    """Of full causal attention ``[B, heads, T, T]``, by hand."""
    future = torch.ones(case.T, case.T, dtype=torch.bool, device=query.device).triu(1)
    scores = query.shape[-1] ** -0.5 * query @ key.transpose(2, 3)
    return scores.masked_fill(future, -torch.inf).softmax(3)


def sdpa(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def banded(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = torch.ones(case.T, case.T, dtype=torch.bool, device=query.device)
    mask = mask.tril().triu(1 - (case.window_size or 1))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@cache
def window_blocks(window_size: int, T: int, device: str) -> BlockMask:
    """FlexAttention's blocks of a window; made once, as a program would."""
    return create_block_mask(
        lambda b, h, i, j: (j <= i) & (i - j < window_size), None, None, T, T, device=device
    )


def flex(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if not torch.is_grad_enabled():  # on a CPU it refuses leaves, whatever the mode
        query, key, value = query.detach(), key.detach(), value.detach()
    blocks = window_blocks(case.window_size or 1, case.T, case.device)
    # Compiled for a CPU it has no float64.
    attention = flex_attention if query.dtype == torch.float64 else _compiled_flex()
    output: Tensor = attention(query, key, value, block_mask=blocks)
    return output


def full(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return weights_of_all(case, query, key) @ value


def h2o(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Full attention, then kvpress keeps the keys with the most of it, once, at the end."""
    from kvpress import ObservedAttentionPress

    weights = weights_of_all(case, query, key)
    scores = ObservedAttentionPress().score(None, None, key, value, weights, {})
    kept = min(case.T, (case.window_size or 0) + (case.top_k or 0))
    places = scores.topk(kept).indices.unsqueeze(3).expand(-1, -1, -1, case.D)
    key.gather(2, places), value.gather(2, places)
    return weights @ value


class Attention(NamedTuple):
    """Another attention, of case, query, key and value."""

    of: Callable[[Case, Tensor, Tensor, Tensor], Tensor]
    label: str
    why_not: Callable[[Case], str | None]
    window_alone: bool = False


_too_long, _too_large = partial(full_why_not, TOO_LONG), partial(full_why_not, TOO_LARGE)
OTHERS: Mapping[str, Attention] = {
    "sdpa": Attention(sdpa, "full attention (sdpa)", _too_long),
    "banded": Attention(banded, "the window alone (sdpa with a mask)", _too_long, True),
    "flex": Attention(flex, "the window alone (compiled FlexAttention)", flex_why_not, True),
    "full": Attention(full, "full attention by hand", _too_large),
    "h2o": Attention(h2o, "full attention, then kvpress chooses keys once (H2O)", h2o_why_not),
}


def attend(contestant: Contestant, case: Case, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The output and, of ours, ``last``: the last query that attended each key."""
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    if not contestant.ours:
        return {"output": OTHERS[contestant.impl].of(case, query, key, value)}
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
        name: Peer(other.label, same_function=False, why_not=other.why_not)
        for name, other in OTHERS.items()
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
        if impl == OURS:
            sizes = case.window_size, case.top_k, case.screen_every or 1
        else:
            sizes = case.window_size if OTHERS[impl].window_alone else case.T, 0, 1
        attended = case.B * case.heads * pairs(case.T, *sizes)
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
        return Work(call, leaves, output_grad, inference_only=contestant.impl == "flex")
