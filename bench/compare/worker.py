"""One process of ``bench compare``: measures one tree on request.

Run as a file, ``python worker.py TREE THREADS``: it imports the ``throughtime`` of TREE. The tree
may be older than this file, so it uses public layers only, and imports nothing of ``bench``. Every
line that it reads is a request in JSON, every line that it writes the answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WARM_UPS = 3


def main(tree: str, threads: str) -> None:
    """Answer requests until the input ends.

    ``{"case": sizes}`` prepares a case and answers ``{"seconds": time of one iteration}``;
    ``{"repeats": n}`` times n iterations and answers ``{"seconds": time of one}``; short ones come
    after an untimed one, because the other processes had the caches in the meantime. What cannot be
    done is answered by ``{"error": sentence}``.
    """
    sys.path[0] = tree  # in place of this file's folder
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


def make(case: Mapping[str, Any]) -> Callable[[], Any]:
    """One iteration, forward and backward, as a function that returns the gradients."""
    import torch

    import throughtime

    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    screening = {name: case[name] for name in ("window_size", "top_k") if case[name] is not None}
    if case["op"] == "relevancy":
        from throughtime.functional import relevancy_attention

        shape = (4, case["B"], case["heads"], case["T"], case["D"])
        q, k, v, grad = torch.randn(*shape).to(dtype).unbind(0)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        attend: Any = relevancy_attention
        return lambda: torch.autograd.grad(attend(*leaves, **screening), leaves, grad)
    kind = throughtime.LSTM if case["op"] == "lstm" else throughtime.RelLSTM
    layer = kind(case["I"], case["H"], **screening).to(dtype)
    x = torch.randn(case["T"], case["B"], case["I"]).to(dtype)
    grad = torch.randn(case["T"], case["B"], case["H"]).to(dtype)
    options = {}
    if case.get("p"):
        options["detach_mask"] = torch.randperm(case["T"]) < round(case["p"] * case["T"])
    parameters = list(layer.parameters())
    return lambda: torch.autograd.grad(layer(x, **options)[0], parameters, grad)


if __name__ == "__main__":
    main(*sys.argv[1:])
