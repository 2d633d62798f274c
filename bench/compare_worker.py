"""One process of ``bench compare``: measures one tree when it is told to.

Run as a file, ``python compare_worker.py TREE THREADS``: it imports the ``throughtime`` of TREE. It
must run with trees that are older than itself, so it uses their public layers only and imports
nothing of ``bench``. Every line that it reads is a request in JSON, every line that it
writes the answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Sizes = Mapping[str, Any]  # columns of rows.Row

WARM_UPS = 3


def main(tree: str, threads: str) -> None:
    """Answers requests until its input ends.

    ``{"case": sizes}`` makes a case ready and answers ``{"seconds": time of one iteration}``;
    ``{"repeats": n}`` times n iterations and answers ``{"seconds": time of one}``; short ones come
    after an untimed one, because the other processes had the caches in the meantime. What cannot be
    done is answered by ``{"error": sentence}``.
    """
    sys.path[0] = tree  # in place of this file's folder, whose modules have common names
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints must not come between the answers
    import torch

    import throughtime

    if not Path(throughtime.__file__).is_relative_to(Path(tree).resolve()):
        raise SystemExit(f"throughtime was imported from {throughtime.__file__}, not from {tree}")
    torch.set_num_threads(int(threads))
    iterate: Callable[[], object] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "case" in request:
                iterate = None  # its memory goes before the next one comes
                iterate = make(request["case"])
                seconds = min(_time(iterate, 1) for _ in range(WARM_UPS))
            else:
                assert iterate is not None
                if request["repeats"] > 1:
                    iterate()
                seconds = _time(iterate, request["repeats"])
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            # an older tree may lack the layer, an argument or the backend
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        else:
            answers.write(json.dumps({"seconds": seconds}) + "\n")


def _time(iterate: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        iterate()
    return (time.perf_counter() - start) / repeats


def make(case: Sizes) -> Callable[[], object]:
    """Forward and backward of a case as a function without arguments.

    Args:
        case: ``op`` (``"lstm"``, ``"rel-lstm"`` or ``"relevancy"``), ``dtype``, and the sizes that
            the operation has, named as the columns of ``rows.Row``.

    Returns:
        What runs one iteration; every call computes the same.

    Example:
        >>> sizes = {"T": 4, "B": 2, "I": 3, "H": 5, "p": 0.5, "dtype": "float32"}
        >>> len(make({"op": "lstm", **sizes})())  # the gradients
        4
    """
    makers = {"lstm": _lstm, "rel-lstm": _rel_lstm, "relevancy": _relevancy}
    return makers[case["op"]](case)


def _lstm(case: Sizes) -> Callable[[], object]:
    import torch

    import throughtime

    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    layer = throughtime.LSTM(case["I"], case["H"]).to(dtype)
    x = torch.randn(case["T"], case["B"], case["I"]).to(dtype)
    grad = torch.randn(case["T"], case["B"], case["H"]).to(dtype)
    mask = None
    if case["p"]:
        mask = torch.randperm(case["T"]) < round(case["p"] * case["T"])
    parameters = list(layer.parameters())
    return lambda: torch.autograd.grad(layer(x, detach_mask=mask)[0], parameters, grad)


def _rel_lstm(case: Sizes) -> Callable[[], object]:
    import torch

    import throughtime

    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    screening = {"window_size": case["window_size"], "top_k": case["top_k"]}
    layer = throughtime.RelLSTM(case["I"], case["H"], **screening).to(dtype)
    x = torch.randn(case["T"], case["B"], case["I"]).to(dtype)
    grad = torch.randn(case["T"], case["B"], case["H"]).to(dtype)
    parameters = list(layer.parameters())
    return lambda: torch.autograd.grad(layer(x)[0], parameters, grad)


def _relevancy(case: Sizes) -> Callable[[], object]:
    import torch

    from throughtime import functional

    torch.manual_seed(0)
    shape = (4, case["B"], case["heads"], case["T"], case["D"])
    q, k, v, grad = torch.randn(shape).to(getattr(torch, case["dtype"])).unbind(0)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    window, top_k = case["window_size"], case["top_k"]
    return lambda: torch.autograd.grad(
        functional.relevancy_attention(q, k, v, window, top_k), (q, k, v), grad
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
