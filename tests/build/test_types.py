"""What a type checker knows of the package: the types of a call, and the names that are public."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import throughtime

pytest.importorskip("mypy")

# mypy --strict finds nothing here, neither an error nor a `type: ignore` that ignores none.
CALLS = """
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import assert_type

import throughtime
from throughtime import LSTM, RelevancyAttention, RelevancyCache, RelLSTM, RelState
from throughtime.functional import lstm
from throughtime.functional import relevancy_attention as attention
from throughtime.functional import relevancy_attention_varlen as varlen

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]

def functions(x: Tensor, hx: Two, cache: RelevancyCache) -> None:
    assert_type(lstm(x, hx, x, x, x, x, weight_hr=x, detach_mask=x, lengths=x, reset=x,
                     reset_hx=hx, reverse=True, recompute=True, backend="cpu"),
                tuple[Tensor, Two])
    assert_type(lstm(x, hx, x, x, return_cells=True, reset=x), tuple[Tensor, Two, Tensor])
    lstm(x, hx, x)  # type: ignore[call-overload]
    lstm(x, hx, x, x, masks=x)  # type: ignore[call-overload]

    assert_type(attention(x, x, x, 5, 3, score="dot", score_weight=x, scale=1.0, lengths=x,
                          cache=cache, retain="first", screen_every=2, relevance=x,
                          normalize=True, backend="cpu"), Tensor)
    assert_type(varlen(x, x, x, x, 5, 3, score="dot", score_weight=x, scale=1.0, retain="first",
                       screen_every=2, relevance=x, normalize=True, backend="cpu"), Tensor)
    attention(x, x, x, 5, 3, score="sum")  # type: ignore[call-overload]
    attention(x, x, x, 5, 3, 0.5)  # type: ignore[call-overload]
    varlen(x, x, x, x, 5, 3, lengths=x)  # type: ignore[call-overload]

def flags(x: Tensor, wanted: bool) -> None:
    assert_type(attention(x, x, x, 5, 3, return_retained=False, return_relevance=False), Tensor)
    assert_type(attention(x, x, x, 5, 3, return_retained=True), Two)
    assert_type(attention(x, x, x, 5, 3, return_relevance=True), Two)
    assert_type(attention(x, x, x, 5, 3, return_retained=True, return_relevance=True), Three)
    assert_type(attention(x, x, x, 5, 3, return_relevance=wanted), Tensor | tuple[Tensor, ...])
    assert_type(varlen(x, x, x, x, 5, 3, return_retained=False, return_relevance=False), Tensor)
    assert_type(varlen(x, x, x, x, 5, 3, return_retained=True), Two)
    assert_type(varlen(x, x, x, x, 5, 3, return_relevance=True), Two)
    assert_type(varlen(x, x, x, x, 5, 3, return_retained=True, return_relevance=True), Three)
    assert_type(varlen(x, x, x, x, 5, 3, return_relevance=wanted), Tensor | tuple[Tensor, ...])

def calls(x: Tensor, packed: PackedSequence) -> None:
    lstm, rel, attend = LSTM(3, 4), RelLSTM(3, 4), RelevancyAttention(4, 2, 3, 1)
    assert_type(lstm(x), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(lstm(packed, None, reset=x), tuple[PackedSequence, tuple[Tensor, Tensor]])
    assert_type(rel(x), tuple[Tensor, RelState])
    assert_type(rel(packed, detach_mask=x), tuple[PackedSequence, RelState])
    assert_type(attend(x, lengths=x), Tensor)
    lstm(x, detach_masks=x)  # type: ignore[call-overload]
    lstm(x, None, x)  # type: ignore[call-overload]
    rel(x, resets=x)  # type: ignore[call-overload]
    attend(x, cash=None)  # type: ignore[call-arg]
    attend(packed)  # type: ignore[arg-type]

def numbers(flow: throughtime.GradientFlow) -> list[float]:
    found: list[float] = [row["dh"] for row in (*flow.table(), *flow.horizon())]
    layer: str = flow.parameters()[0]["layer"]
    assert layer
    return found

def names(model: torch.nn.Module) -> tuple[throughtime.Replacement, throughtime.Explanation]:
    return throughtime.replace(model), throughtime.explain("lstm", hidden_size=3)

module: torch.nn.Module = LSTM(3, 4)
"""


def test_a_call_has_types(tmp_path: Path) -> None:
    (tmp_path / "calls.py").write_text(CALLS, encoding="utf-8")
    parent = Path(throughtime.__file__).parents[1]
    # mypy finds an installed package by itself, an editable one by its folder.
    path = {} if parent.name == "site-packages" else {"MYPYPATH": str(parent)}
    cache = Path(sys.prefix, "mypy")  # that of `make test`, where torch has been read already
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={cache}", "calls.py"],
        cwd=tmp_path,
        env=os.environ | path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_functions_return_is_public() -> None:
    assert isinstance(throughtime.explain("lstm", hidden_size=3), throughtime.Explanation)
    assert isinstance(throughtime.replace(throughtime.LSTM(2, 3)), throughtime.Replacement)
    assert {"Explanation", "Replacement"} <= set(throughtime.__all__)
