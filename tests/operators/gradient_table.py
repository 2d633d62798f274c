"""The table of gradients: every way to a gradient, by every route that torch offers.

    python tests/operators/gradient_table.py OUT.md [COMPILER]

COMPILER is the backend of torch.compile: ``aot_eager`` unless given, since gradients are decided
before inductor makes code of them (``inductor`` takes an hour).

A case is a route (how the layer is called: eager, compiled, exported, ...), a derivative (how its
gradient is taken: backward, func.grad, ...), a layer, and what is trainable. Each case ends as

- ``right``: equal to the gradient of ``backend="reference"`` in float64;
- ``refused``: an error of ours that names the way out;
- ``n/a``: torch has no such thing, or fails for ``torch.nn.LSTM`` in the same way;
- anything else is a fault, and so is the exit status.

``tests/operators/test_gradient_table.py`` runs a subset in which every pair of values meets.
"""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import calls
import throughtime
from calls import MASK, B, H, I, T

WAY_OUT = ('backend="reference"', "backend='reference'")


class Case(NamedTuple):
    route: str
    derivative: str
    layer: str
    trainable: str

    def __str__(self) -> str:
        return "-".join(self)


class Outcome(NamedTuple):
    kind: str  # "right", "refused", "n/a", "wrong", "fails"
    why: str = ""


# --- layers: modules with float64 parameters from an input to a tuple of outputs


class Layer(nn.Module):
    """A module of ours, or of torch as a control; its outputs are the floating ones of ``run``."""

    def __init__(self, inner: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.run = inner, run

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        leaves = pytree.tree_leaves(self.run(self.inner, x))
        return tuple(y for y in leaves if isinstance(y, Tensor) and y.is_floating_point())


def _function(name: str, backend: str) -> Layer:
    """A function of x and of its weights; those of attention are given what they make of x.

    Samples are heads of packed rows.
    """
    call, shapes = calls.CALLS[name]
    if name.startswith("relevancy_attention"):
        inner = nn.ParameterList(torch.randn(I, H) / 2 for _ in shapes)
        if name == "relevancy_attention_varlen":
            return Layer(inner, lambda inner, x: call(backend, *(x @ w for w in inner)))
        return Layer(
            inner,
            lambda inner, x: call(backend, *((x @ w).transpose(0, 1)[:, None] for w in inner))[0],
        )
    inner = nn.ParameterList(torch.randn(shape) / 2 for shape in shapes[1:])
    return Layer(inner, lambda inner, x: call(backend, x, *inner))


SCREENING = {"window_size": 2, "top_k": 2}
BUILD: dict[str, Callable[[Any], Layer]] = {
    "LSTM": lambda backend: Layer(
        throughtime.LSTM(I, H, num_layers=2, bidirectional=True, backend=backend), _masked
    ),
    "RelLSTM": lambda backend: Layer(
        throughtime.RelLSTM(I, H, **SCREENING, backend=backend), _masked
    ),
    "RelevancyAttention": lambda backend: Layer(
        throughtime.RelevancyAttention(
            I, 1, **SCREENING, score="additive", batch_first=False, backend=backend
        ),
        lambda inner, x: inner(x),
    ),
} | {
    f"functional.{name}": functools.partial(_function, name)
    for name in (
        *("lstm", "bidirectional_lstm", "rel_lstm"),
        *("relevancy_attention", "relevancy_attention_varlen"),
    )
}
STOCK = "torch.nn.LSTM"


def _masked(inner: Any, x: Tensor) -> Any:
    return inner(x, detach_mask=MASK)


def build(layer: str, backend: str) -> Layer:
    """The layer with the same weights whatever the backend."""
    torch.manual_seed(0)
    stock = layer == STOCK
    made = Layer(nn.LSTM(I, H), lambda inner, x: inner(x)) if stock else BUILD[layer](backend)
    return made.double()


def example() -> Tensor:
    return torch.randn(T, B, I, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def values(outputs: tuple[Tensor, ...]) -> Tensor:
    """Two numbers ``[2]`` whose gradients differ; sums over samples."""
    squares = sum((y.square().sum() for y in outputs), outputs[0].new_zeros(()))
    return torch.stack((squares, sum((y.sum() for y in outputs), outputs[0].new_zeros(()))))


def loss(outputs: tuple[Tensor, ...]) -> Tensor:
    return values(outputs)[0]


# --- routes: how the layer is called; each takes a function of tensors and a module in it


class Program(NamedTuple):
    """A function of ``leaves``, by name, to the outputs of a layer."""

    leaves: dict[str, Tensor]
    run: Callable[..., tuple[Tensor, ...]]  # of the leaves, in their order
    module: nn.Module | None = None  # where its own parameters take part, beside the leaves


ROUTES = (
    "eager", "functional_call", "compile", "export", "export strict", "AOTInductor", "jit.trace",
    "jit.trace no_grad", "make_fx",
)  # fmt: skip
DERIVATIVES = (
    "backward", "func.grad", "func.vjp", "func.jvp", "func.jacrev", "vmap(grad)",
    "checkpoint reentrant", "checkpoint",
)  # fmt: skip
TRAINABLE = ("all", "frozen weights", "frozen input")
LAYERS = tuple(BUILD)


class NotApplicable(Exception):
    """Torch has no such thing."""


def program(case: Case, module: Layer) -> Program:
    """The layer by the case's route; what follows the derivative is applied by :func:`gradient`."""
    x = example().requires_grad_(case.trainable != "frozen input")
    module.requires_grad_(case.trainable != "frozen weights")
    inner: Callable[..., tuple[Tensor, ...]] = module
    if case.route == "AOTInductor":
        raise NotApplicable("its programs run forward only; torch does not export func.grad to it")
    if case.route in ("export", "export strict"):
        inner = torch.export.export(module, (x,), strict=case.route == "export strict").module()
    elif case.route.startswith("jit.trace"):
        with torch.set_grad_enabled(case.route == "jit.trace"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes become constants, which is said
            inner = torch.jit.trace(module, (x.detach(),), check_trace=False)
    assert isinstance(inner, nn.Module)
    weights = dict(inner.named_parameters())
    if case.route not in ("functional_call", "compile", "make_fx"):
        return Program({"x": x}, inner, inner)
    leaves = dict(weights) if case.trainable != "frozen weights" else {}
    if case.trainable != "frozen input":
        leaves["x"] = x
    constant = {name: w.detach() for name, w in weights.items()}

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = constant | dict(zip(leaves, tensors, strict=True))
        return functional_call(inner, {n: named[n] for n in weights}, (named.get("x", x),))

    return Program(leaves, run)


# --- derivatives


def gradient(case: Case, made: Program, backend: str) -> dict[str, Tensor]:
    """Gradients of the loss by name of leaf or parameter; "tangent" for forward mode."""
    names, leaves = list(made.leaves), tuple(made.leaves.values())
    if case.derivative in ("backward", "checkpoint", "checkpoint reentrant"):
        return _by_backward(case, made, backend)
    if made.module is not None and case.trainable == "frozen input":
        raise NotApplicable("torch.func differentiates arguments, and the only one is frozen")
    derive = _transformed(case, made)
    if case.route == "compile":
        derive = torch.compile(derive, backend=backend)
    elif case.route == "make_fx":
        derive = make_fx(derive)(*(torch.zeros_like(x) for x in leaves))
    found = derive(*(x.detach() for x in leaves))
    if case.derivative == "func.jvp":
        return {"tangent": found}
    return dict(zip(names, found, strict=True))


def _by_backward(case: Case, made: Program, backend: str) -> dict[str, Tensor]:
    run, leaves = made.run, tuple(made.leaves.values())
    if case.derivative != "backward":
        if case.route == "make_fx":
            raise NotApplicable("a traced graph holds no checkpoint")
        inner, reentrant = run, case.derivative == "checkpoint reentrant"
        run = lambda *tensors: checkpoint(inner, *tensors, use_reentrant=reentrant)  # noqa: E731
        if reentrant and not any(x.requires_grad for x in leaves):
            raise NotApplicable("reentrant checkpoints want an argument that requires grad")
    if case.route == "compile":
        run = torch.compile(run, backend=backend)
    elif case.route == "make_fx":
        run = make_fx(run)(*(torch.zeros_like(x) for x in leaves))
    loss(run(*leaves)).backward()
    named = dict(made.leaves)
    if made.module is not None:
        named |= dict(made.module.named_parameters())
    return {
        name: torch.zeros_like(x) if x.grad is None else x.grad
        for name, x in named.items()
        if x.requires_grad
    }


def _transformed(case: Case, made: Program) -> Callable[..., Any]:
    everything = tuple(range(len(made.leaves)))

    def of(*tensors: Tensor) -> Tensor:
        return loss(made.run(*tensors))

    if case.derivative == "func.grad":
        return torch.func.grad(of, everything)
    if case.derivative == "func.vjp":
        return lambda *leaves: torch.func.vjp(of, *leaves)[1](leaves[0].new_ones(()))
    if case.derivative == "func.jvp":
        return lambda *leaves: torch.func.jvp(of, leaves, tuple(map(tangent, leaves)))[1]
    if case.derivative == "func.jacrev":

        def first_row(*leaves: Tensor) -> tuple[Tensor, ...]:
            rows = torch.func.jacrev(lambda *t: values(made.run(*t)), everything)(*leaves)
            return tuple(row[0] for row in rows)

        return first_row
    return _per_sample(case, made)


def _per_sample(case: Case, made: Program) -> Callable[..., Any]:
    """``vmap(grad)``: gradients of each sample; those of weights are then added."""
    names = list(made.leaves)
    if "x" not in names:
        raise NotApplicable("vmap maps over the input, which is a constant of the program here")
    if case.route in ("export", "export strict", "jit.trace", "jit.trace no_grad"):
        raise NotApplicable("the program was made for one batch size")
    dims = tuple(1 if name == "x" else None for name in names)

    def of(*tensors: Tensor) -> Tensor:
        given = [t.unsqueeze(1) if n == "x" else t for n, t in zip(names, tensors, strict=True)]
        return loss(made.run(*given))

    def total(*leaves: Tensor) -> tuple[Tensor, ...]:
        every = torch.func.vmap(torch.func.grad(of, tuple(range(len(names)))), dims)(*leaves)
        return tuple(
            g.movedim(0, 1) if n == "x" else g.sum(0) for n, g in zip(names, every, strict=True)
        )

    return total


def tangent(x: Tensor) -> Tensor:
    """A fixed direction."""
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)


@functools.cache
def exact(layer: str) -> dict[str, Tensor]:
    """The gradient by the definition, eagerly, and its product with the tangents."""
    module = build(layer, "reference")
    x = example().requires_grad_()
    loss(module(x)).backward()
    found = {
        name: p.grad for name, p in (*module.named_parameters(), ("x", x)) if p.grad is not None
    }
    assert all(g.any() for g in found.values())
    return found


def judge(case: Case, compiler: str = "aot_eager", kernels: str = "cpu") -> Outcome:
    """Run one case on a backend of ours; ``compiler`` is the backend of torch.compile."""
    outcome = _attempt(case, compiler, kernels)
    if outcome.kind in ("right", "refused", "n/a"):
        return outcome
    control = case._replace(layer=STOCK)
    stock = _attempt(control, compiler, kernels)
    if stock.kind in ("right", "n/a"):
        return outcome
    return Outcome("n/a", f"torch: the same for {STOCK}: {stock.why}")


def _attempt(case: Case, compiler: str, kernels: str) -> Outcome:
    torch._dynamo.reset()
    wanted = exact(case.layer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            module = build(case.layer, kernels)
            found = gradient(case, program(case, module), compiler)
            wanted = _selected(case, wanted, module)
    except NotApplicable as error:
        return Outcome("n/a", str(error))
    except Exception as error:  # noqa: BLE001, it is what the case ends in
        said = list(_said(error))
        refusals = [text for text in said if any(words in text for words in WAY_OUT)]
        return Outcome("refused" if refusals else "fails", (refusals or said)[0][:300])
    return _compare(found, wanted)


def _said(error: BaseException | None) -> Iterator[str]:
    """The first line of an error and of its causes; torch's traces follow, with paths."""
    while error is not None:
        text = next(iter(str(error).splitlines()), "")
        yield f"{type(error).__name__}: {text}"
        error = error.__cause__ or error.__context__


def _selected(case: Case, wanted: dict[str, Tensor], module: Layer) -> dict[str, Tensor]:
    """What the case differentiates by."""
    backward = case.derivative in ("backward", "checkpoint", "checkpoint reentrant")
    takes_weights = case.route in ("functional_call", "compile", "make_fx") or backward
    chosen = {
        name: g
        for name, g in wanted.items()
        if (name == "x" and case.trainable != "frozen input")
        or (name != "x" and case.trainable != "frozen weights" and takes_weights)
    }
    if case.derivative != "func.jvp":
        return chosen
    return {"tangent": sum(((g * tangent(g)).sum() for g in chosen.values()), torch.zeros(()))}


def _compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> Outcome:
    if found.keys() != wanted.keys():
        return Outcome("wrong", f"gradients of {sorted(found)}, wanted {sorted(wanted)}")
    for name, right in wanted.items():
        error = float(((found[name] - right).abs().max() / right.abs().max()).detach())
        if not error <= 1e-9:
            return Outcome("wrong", f"{name} is wrong by {error:.2g} of its largest value")
    return Outcome("right")


def cases() -> Iterator[Case]:
    for combination in itertools.product(ROUTES, DERIVATIVES, LAYERS, TRAINABLE):
        yield Case(*combination)


# --- the table


def table(outcomes: dict[Case, Outcome], compiler: str) -> str:
    """Markdown: a row per route and derivative, a column per layer, notes below."""
    notes: dict[str, int] = {}

    def cell(outcome: Outcome) -> str:
        note = notes.setdefault(outcome.why, len(notes) + 1) if outcome.why else None
        return outcome.kind + (f" [{note}]" if note else "")

    lines = [f"| route | derivative | {' | '.join(LAYERS)} |", "| --- " * (2 + len(LAYERS)) + "|"]
    for route, derivative in itertools.product(ROUTES, DERIVATIVES):
        cells = [
            [cell(outcomes[Case(route, derivative, layer, t)]) for t in TRAINABLE]
            for layer in LAYERS
        ]
        row = [texts[0] if len(set(texts)) == 1 else " / ".join(texts) for texts in cells]
        lines.append(f"| {route} | {derivative} | {' | '.join(row)} |")
    counts = Counter(outcome.kind for outcome in outcomes.values())
    said = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    listed = "".join(f"[{number}] {why}\n\n" for why, number in notes.items())
    return (
        f"""# Gradients by every route: {said}

`make gradient-table`, torch {torch.__version__}, throughtime {throughtime.__version__}, \
torch.compile with {compiler}, backend `cpu`, float64, against `backend="reference"`. \
Three values in a cell: {", ".join(TRAINABLE)}; one where they are equal. \
*refused*: an error that names the way out. \
*n/a*: torch has no such thing, or fails for torch.nn.LSTM too.

"""
        + "\n".join(lines)
        + f"\n\n{listed}"
    )


def main(path: str, compiler: str = "aot_eager") -> int:
    outcomes = {}
    for case in tqdm(list(cases()), unit="case"):
        outcomes[case] = judge(case, compiler)
        if outcomes[case].kind not in ("right", "refused", "n/a"):
            tqdm.write(f"{case}: {outcomes[case].kind}: {outcomes[case].why}")
    text = table(outcomes, compiler)
    Path(path).write_text(text)
    print(text)
    return int(any(o.kind not in ("right", "refused", "n/a") for o in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
