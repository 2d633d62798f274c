"""The levels of differentiation: what the autograd functions of operations are, and run in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction


class SingleLevelFunction(_SingleLevelFunction):
    """``torch.autograd.Function`` for one level of differentiation.

    Its ``apply`` is that of C++, without the part in Python that takes a third of a small call's
    time. What compiled autograd asks a function for is in the class that it leaves out.
    """

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple[int]:
        key: int = ctx._autograd_function_id
        return (key,)


def named(function: type, name: str) -> type[Any]:
    """``grad_fn`` shows the name of the class."""
    return type(name, (function,), {})


def plain() -> bool:
    """Whether nothing but eager autograd watches, so that the dispatcher's detour can be saved."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def recording() -> bool:
    """Whether autograd records what runs now: never in inference mode, whatever is inside it."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def apply(function: type[Any], args: Iterable[Any]) -> tuple[Tensor, ...]:
    """``function.apply(*args)`` for the innermost level of differentiation alone.

    That of ``torch.autograd.Function`` binds its arguments to the signature of forward at every
    call, a third of a small call's time, and hands what torch.func transforms to all its levels:
    the dispatcher has come down to one of them already where an Autograd kernel runs.
    """
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)  # type: ignore[no-any-return]
    with enable_single_level_autograd_function():
        return function.apply(*args)  # type: ignore[no-any-return]


def below(operator: Any, args: Iterable[Any]) -> tuple[Tensor, ...]:
    """Run an operator below this level of autograd.

    ``torch.autograd.Function`` turns differentiation off in its forward; the levels further out
    have not been there yet.
    """
    if not torch._C._are_functorch_transforms_active():
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)  # type: ignore[no-any-return]
    with (
        torch.enable_grad(),
        forward_ad._set_fwd_grad_enabled(True),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        return operator(*args)  # type: ignore[no-any-return]


def any_tangent(args: Iterable[Any]) -> bool:
    """Whether forward-mode differentiation goes through one of the arguments."""
    return any(
        isinstance(x, Tensor)
        and x.is_floating_point()
        and torch._VF._unpack_dual(x, level=0)[1] is not None
        for x in args
    )
