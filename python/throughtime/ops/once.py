"""autograd.Function: applied without its cost per call; backwards that cannot be differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:  # parts of torch that it promises nothing about
    from torch._functorch.utils import unwrap_dead_wrappers

    _transforms_active: Callable[[], bool] | None = torch._C._are_functorch_transforms_active
except (ImportError, AttributeError):
    _transforms_active = None


def once_differentiable(
    run: Callable[..., tuple[Tensor, ...]], name: str
) -> Callable[..., tuple[Tensor, ...]]:
    """``run``, or what refuses a second derivative where the gradient of ``run`` is recorded.

    Args:
        run: a backward operator.
        name: of the kernels, for the message.
    """

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return run(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
            raise RuntimeError(
                f"throughtime: the compiled {name} kernels can be differentiated once, and a "
                'second derivative was asked for; use backend="reference" for double backward'
            )

    def call(*args: Any) -> tuple[Tensor, ...]:
        # Gradients are recorded inside a backward only for a second derivative.
        if torch.is_grad_enabled():
            return Refusing.apply(*args)  # type: ignore[no-untyped-call,no-any-return]
        return run(*args)

    return call


def apply(function: type[torch.autograd.Function], *args: Any) -> tuple[Tensor, ...]:
    """``function.apply(*args)``, with all arguments of its forward, and faster.

    ``apply`` binds its arguments to the signature of forward at every call, a third of a small
    call's time; what it does then is done here. Transforms of torch.func and Dynamo go its way.
    """
    if torch.compiler.is_compiling() or _transforms_active is None or _transforms_active():
        return function.apply(*args)  # type: ignore[no-untyped-call,no-any-return]
    bound: Any = super(torch.autograd.Function, function)
    return bound.apply(*unwrap_dead_wrappers(args))  # type: ignore[no-any-return]
