"""A table of the backends: which can run a layer, which is chosen, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.rnn import LSTM as TorchLSTM

from throughtime.backends.backend import (
    OPERATIONS,
    ORDER,
    BackendName,
    Request,
    Work,
    can_run,
    passed_over,
    unknown,
)
from throughtime.backends.cpu import workers
from throughtime.backends.gpus import find_gpu
from throughtime.backends.selection import preferred

if TYPE_CHECKING:
    from throughtime.nn.backend import BackendChoice


@dataclass(frozen=True)
class Explanation:
    """Result of :func:`throughtime.explain`; ``str()`` of it is a Markdown table.

    Attributes:
        request: operation, sizes, device and dtype that were asked about.
        source: origin of the choice: argument, context, environment or "auto".
        reasons: for each backend None if it can run, otherwise the reason why not.
        chosen: the backend that would run, or None if the explicit choice cannot run.
        gpu_plan: lines on how the CUDA kernels would partition the work; empty without a GPU.
        workers: present number of workers of the CPU kernels, with the reason; None if they would
            not run.
        cpu_plan: lines on how the CPU kernels would partition the work on ``threads`` threads;
            empty without that argument.
        acceleration: for an ``nn.LSTM`` whether :func:`throughtime.accelerate` runs it on our
            kernels, or why not, and how often what has run; None for a layer of this package.

    Example:
        >>> import throughtime
        >>> table = throughtime.explain("lstm", hidden_size=128, backend="reference")
        >>> assert table.chosen == "reference" and table.reasons["reference"] is None
    """

    request: Request
    source: str
    reasons: dict[str, str | None]
    chosen: str | None
    gpu_plan: tuple[str, ...] = ()
    workers: str | None = None
    cpu_plan: tuple[str, ...] = ()
    acceleration: str | None = None

    def __str__(self) -> str:
        request = self.request
        sizes = f"hidden_size={request.hidden_size}"
        if request.proj_size:
            sizes += f", proj_size={request.proj_size}"
        rows = [("backend", "can run", "chosen", "reason"), ("---", "---", "---", "---")]
        for name, reason in self.reasons.items():
            can, mark = "no" if reason else "yes", "*" if name == self.chosen else ""
            rows.append((name, can, mark, reason or ""))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{request.op} with {sizes}, {request.dtype} on {request.device}, {self.source}"]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append(f"| {' | '.join(cells)} | {row[3]} |")
        if self.acceleration is not None:
            lines.append(self.acceleration)
        elif self.chosen is None:
            lines.append("The explicit choice cannot run, so a call raises RuntimeError.")
        if self.workers:
            lines.append(f"CPU workers: {self.workers}")
        return "\n".join([*lines, *self.cpu_plan, *self.gpu_plan])

    __repr__ = __str__


def explain(
    module_or_op: BackendChoice | TorchLSTM | str,
    *,
    hidden_size: int | None = None,
    proj_size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: BackendName | None = None,
    steps: int = 1024,
    batch_size: int = 16,
    gpu: str | None = None,
    threads: int | None = None,
) -> Explanation:
    """Tell which backend would run a layer, and why the others would not.

    For an LSTM on a GPU, present or named by ``gpu``, the table also says how the CUDA kernels
    would partition the work: tier, blocks, shared memory, barriers. For the CPU kernels it gives
    the number of workers: at most torch's threads, at most the CPUs that the process may use
    (affinity, control groups), and fewer for a moment after another process needed one.

    With ``threads`` it says how the CPU kernels would partition the work on that many, whatever
    this machine has. A group of rows walks through time alone. A team
    of workers walks with one group after the other; its members have blocks of units, and meet at
    a barrier after every step. *Balance* is the mean work of a worker / the most work of a worker,
    in rows times blocks. The speed-up over one thread is predicted from the products of the busiest
    worker and from its barriers, with rates measured in this call. Reading of memory, packing of
    weights and the cells' own work are left out. Of relevancy attention a worker has sequences (a
    sample and a head) of its own; the members of a team share the blocks of queries of one.

    Args:
        module_or_op: a layer of this package, or the name of an operator: ``"lstm"``,
            ``"rel_lstm"`` or ``"relevancy_attention"``. Or an ``nn.LSTM``: then the table says
            whether :func:`throughtime.accelerate` runs it on our kernels, and why not.
        hidden_size: H, or the size D of a head. Required for an operator; a module has its own.
        proj_size: P; 0 without projection.
        dtype: dtype of the input; by default the module's, or torch's default dtype.
        device: device of the input; by default the module's, or the CPU.
        backend: the ``backend=`` argument; by default the module's, or ``"auto"``.
        steps: T of the plans.
        batch_size: B of the plans.
        gpu: a GPU to plan for, which need not be present: "H100", "H200", "B200", "A100",
            "RTX 4090" or "RTX 5090"; by default the GPU that ``device`` names.
        threads: a number of threads to plan for, at least 1.

    Returns:
        An object whose ``str()`` is the table and whose ``chosen`` is the name.

    Raises:
        TypeError: if the first argument is neither, or ``hidden_size`` is missing.
        ValueError: if the operator, the backend or the GPU is unknown, or ``threads`` below 1.

    Example:
        >>> import torch, throughtime
        >>> table = throughtime.explain("lstm", hidden_size=128, dtype=torch.bfloat16)
        >>> assert table.reasons["reference"] is None and "| backend" in str(table)
        >>> table = throughtime.explain("lstm", hidden_size=128, dtype=torch.half, gpu="H100")
        >>> assert len(table.gpu_plan) <= 3
        >>> table = throughtime.explain(throughtime.LSTM(1, 128), batch_size=32, threads=64)
        >>> assert table.chosen != "cpu" or "balance" in str(table)
    """
    from throughtime import acceleration
    from throughtime.functional.checks import check_size
    from throughtime.nn.backend import BackendChoice

    accelerated = None
    if isinstance(module_or_op, (BackendChoice, TorchLSTM)):
        module = module_or_op
        if isinstance(module, BackendChoice):
            asked, own = module.backend_request(), module.backend
        else:
            asked, own = acceleration.request(module), "auto"
        request = asked._replace(
            hidden_size=asked.hidden_size if hidden_size is None else hidden_size,
            proj_size=asked.proj_size if proj_size is None else proj_size,
            device=asked.device if device is None else torch.device(device),
            dtype=asked.dtype if dtype is None else dtype,
        )
        argument = own if backend is None else backend
    elif isinstance(module_or_op, str):
        if module_or_op not in OPERATIONS:
            names = tuple(OPERATIONS)
            raise ValueError(unknown(module_or_op, "explain: the operator", names))
        if hidden_size is None:
            raise TypeError("explain: hidden_size is required when an operator is named")
        request = Request(
            module_or_op,
            hidden_size,
            proj_size or 0,
            torch.device("cpu" if device is None else device),
            torch.get_default_dtype() if dtype is None else dtype,
        )
        argument = "auto" if backend is None else backend
    else:
        held = _layers_of(module_or_op)
        raise TypeError(
            "explain: expected a layer of throughtime, an nn.LSTM or the name of an operator, got "
            f"{type(module_or_op).__name__}{held}"
        )
    name, source = preferred(argument)
    reasons = {candidate: can_run(candidate, request) for candidate in ORDER}
    if isinstance(module_or_op, TorchLSTM) and not isinstance(module_or_op, BackendChoice):
        source = "nn.LSTM"
        chosen, accelerated = acceleration.explained(request)
    elif name != "auto":
        chosen = name if reasons[name] is None else None
    else:
        free = (candidate for candidate in ORDER if passed_over(candidate, request) is None)
        chosen = next(free, None)
    if threads is not None:
        check_size("explain", "threads", threads, least=1)

    def plan(name: str, where: object) -> tuple[str, ...]:
        """What a backend says about this layer's work in a place, if it has something to say."""
        backend = OPERATIONS[request.op].get(name)
        if where is None or request.dtype is None or not (backend and backend.describe):
            return ()
        hidden = request.hidden_size
        work = Work(
            dtype=request.dtype,
            steps=steps,
            batch=batch_size,
            directions=2 if getattr(module_or_op, "bidirectional", False) else 1,
            inputs=getattr(module_or_op, "input_size", hidden),
            hidden=hidden,
            outputs=request.proj_size or hidden,
            attention=getattr(module_or_op, "attention_size", hidden),
            heads=getattr(module_or_op, "num_key_value_heads", 1),
            attended=getattr(module_or_op, "window_size", steps)
            + (getattr(module_or_op, "top_k", None) or 0),
            score=getattr(module_or_op, "score", "dot"),
        )
        return tuple(backend.describe(where, work))

    return Explanation(
        request,
        source,
        reasons,
        chosen,
        plan("cuda", find_gpu(gpu, request.device)),
        workers() if chosen == "cpu" else None,
        plan("cpu", threads),
        accelerated,
    )


def _layers_of(model: object) -> str:
    """The layers of a model that could be explained, for a message."""
    from throughtime.nn.backend import BackendChoice

    if not isinstance(model, nn.Module):
        return ""
    layers = model.named_modules()
    names = [repr(name) for name, layer in layers if isinstance(layer, (BackendChoice, TorchLSTM))]
    if not names:
        return ", which holds no such layer"
    return f"; explain one of its layers: model.get_submodule({' or '.join(names[:3])})"
