"""The backward of an operation, differentiable: by its definition in plain PyTorch, on demand.

First derivatives are the kernels', also with ``create_graph=True``. Where a second one is asked
for, the definition runs again and torch differentiates it twice. Where torch traces or transforms,
an operator stands in its place that fails when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from throughtime.ops.autograd import SingleLevelFunction, below, named
from throughtime.ops.record import Field
from throughtime.ops.registration import register

Gradients = tuple[Tensor | None, ...]


def once(title: str) -> str:
    """What is said where a second derivative cannot be had."""
    return (
        f"throughtime: the compiled {title} kernels can be differentiated once where torch traces "
        'or transforms, and a second derivative was asked for; use backend="reference"'
    )


register(
    torch.library.define,
    "second_derivative",
    "(Tensor grad, Tensor of, str title) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _second_derivative(grad: Tensor, of: Tensor, title: str) -> Tensor:
    raise RuntimeError(once(title))


register(torch.library.impl, "second_derivative", "CompositeExplicitAutograd", _second_derivative)
register(
    torch.library.register_fake, "second_derivative", lambda grad, of, title: torch.empty_like(of)
)


class Definition(NamedTuple):
    """What the backward of an operation is made of.

    ``run`` makes the results from a record of ``arguments``; the backward operator takes
    ``takes``, by name; beside these it gets the arguments that it does not always read, ``unread``.
    """

    run: Callable[[Any], tuple[Tensor, ...]]
    arguments: type[Any]
    results: Sequence[Field]
    takes: Sequence[Field]
    unread: Sequence[str]
    gradients: Sequence[Field]


def differentiable(
    name: str, backward: Callable[..., tuple[Tensor, ...]], of: Definition
) -> type[Any]:
    """An autograd function that runs ``backward`` on all but the last, unread arguments."""
    count = len(of.takes)

    class Backward(SingleLevelFunction):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return backward(args[:count])

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in inputs])
            ctx.options = [None if isinstance(x, Tensor) else x for x in inputs]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
            saved = zip(ctx.saved_tensors, ctx.options, strict=True)
            inputs = [option if x is None else x for x, option in saved]
            if all(grad is None for grad in grads):
                return (None,) * len(inputs)
            return _second(of, inputs, ctx.needs_input_grad, grads)

    return named(Backward, name)


def refusal(operator: Any, title: str) -> type[Any]:
    """The backward operator with an error as its own gradient."""

    class Backward(SingleLevelFunction):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return below(operator, args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in inputs])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            # An operator, which fails when it runs: a compiler traces more gradients than are used.
            grad = next((grad for grad in grads if grad is not None), None)
            if grad is None:
                return (None,) * len(ctx.needs_input_grad)
            refuse = torch.ops.throughtime.second_derivative.default
            return tuple(
                refuse(grad, x, title) if need else None
                for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
            )

    return named(Backward, f"{title}Gradient")


def _second(
    of: Definition, inputs: Sequence[Any], needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> Gradients:
    """The gradient of each input, from those of the first derivatives."""
    again = torch.is_grad_enabled()
    names = ["" if field.name in of.unread else field.name for field in of.takes]
    names += of.unread
    with torch.enable_grad():
        # Views, so that a gradient ends at this input and does not go on into another one.
        leaves = {
            name: x.view_as(x)
            for name, x, need in zip(names, inputs, needs, strict=True)
            if name and need
        }
        given = dict(zip(names, inputs, strict=True)) | leaves
        results = of.run(of.arguments(*(given[name] for name in of.arguments._fields)))
        outputs, starts = [], []
        for field, x in zip(of.results, results, strict=False):
            start = given.get(f"grad_{field.name}")
            if start is not None and x.requires_grad:
                outputs.append(x)
                starts.append(start)
        wanted = {
            field.name.removeprefix("grad_"): grad
            for field, grad in zip(of.gradients, grads, strict=True)
            if grad is not None
        }
        sources = [given[name] for name in wanted]
        firsts = torch.autograd.grad(outputs, sources, starts, create_graph=True, allow_unused=True)
        used = [
            (first, grad)
            for first, grad in zip(firsts, wanted.values(), strict=True)
            if first is not None and first.requires_grad
        ]
        found: Gradients = (None,) * len(leaves)
        if used:
            found = torch.autograd.grad(
                [first for first, _ in used],
                list(leaves.values()),
                [grad for _, grad in used],
                create_graph=again,
                allow_unused=True,
            )
    by_name = dict(zip(leaves, found, strict=True))
    return tuple(map(by_name.get, names))
