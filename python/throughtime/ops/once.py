"""Backward operators that cannot be differentiated again, and say so."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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


def look_up_signature(function: type[torch.autograd.Function]) -> None:
    """Look the signature of ``function.forward`` up once.

    ``apply`` binds its arguments to it at every call: a third of a small call's time.
    """
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
