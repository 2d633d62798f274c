"""Operators that can be differentiated by whatever meets them: autograd, torch.func, a compiler.

An operator is a pair, ``<name>_forward`` and ``<name>_backward``. The names in their schemas say
how they belong together:

- ``grad_x`` among the arguments of the backward is the gradient of the forward's result ``x``,
  ``grad_x`` among its results that of the forward's argument ``x``;
- every other tensor and number that the backward takes is an argument or a result of the forward;
- ``need_input`` and ``need_weights`` say which gradients are wanted;
- ``save`` of the forward, where it has one, is True where a backward will follow.

From these names follows one ``torch.autograd.Function``, and with it three registrations that make
the operator itself right, without the Python around it, wherever torch meets it (in an exported
program, inside a compiled ``torch.func.grad``, in a trace):

- Autograd: reverse mode by the backward operator; forward mode by the definition in plain PyTorch;
- FuncTorchBatched: ``vmap`` is one call per sample, of the forward and of the backward;
- Autograd of the backward: a second derivative is an error that names the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from throughtime.ops.registration import register

Operator = Callable[..., tuple[Tensor, ...]]

register(
    torch.library.define,
    "second_derivative",
    "(Tensor grad, Tensor of, str title) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _second_derivative(grad: Tensor, of: Tensor, title: str) -> Tensor:
    raise RuntimeError(_once(title))


register(torch.library.impl, "second_derivative", "CompositeExplicitAutograd", _second_derivative)
register(
    torch.library.register_fake, "second_derivative", lambda grad, of, title: torch.empty_like(of)
)


class Differentiable:
    """A forward operator that runs its backward operator as its gradient.

    Calling it with the arguments of the forward, ``save`` left out, gives the forward's results.

    Args:
        name: ``name_forward`` and ``name_backward`` are defined, with fakes, in the namespace
            ``throughtime``; a suffix stands behind both: ``name_forward_triton``.
        title: what the kernels are called in messages.
        definition: takes the arguments of the forward, ``save`` left out, and gives its results in
            plain PyTorch; what only the backward reads may be empty.
        suffix: of both operators.
    """

    def __init__(self, name: str, title: str, definition: Operator, *, suffix: str = "") -> None:
        self.title, self.definition = title, definition
        forward, backward = f"{name}_forward{suffix}", f"{name}_backward{suffix}"
        self.forward_op: Any = getattr(torch.ops.throughtime, forward).default
        self.backward_op: Any = getattr(torch.ops.throughtime, backward).default
        self._read_schemas()
        self._function = _function(self)
        self._refusal = _refusal(self.backward_op, title)
        register(torch.library.impl, forward, "Autograd", self._autograd)
        register(torch.library.impl, backward, "Autograd", self._autograd_of_backward)
        for each, operator in ((forward, self.forward_op), (backward, self.backward_op)):
            register(torch.library.register_vmap, each, _one_call_per_sample(operator))

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        if not _plain():
            return self.forward_op(*args, *self._not_saving)  # type: ignore[no-any-return]
        if torch.is_grad_enabled() and self._requires_grad(args):
            return _apply(self._function, unwrap_dead_wrappers(args))
        return _below(self.forward_op, (*args, *self._not_saving))

    def _read_schemas(self) -> None:
        forward, backward = self.forward_op._schema, self.backward_op._schema
        inputs = [argument.name for argument in forward.arguments]
        self._not_saving: tuple[bool, ...] = (False,) if inputs[-1] == "save" else ()
        self._saving: tuple[bool, ...] = (True,) if self._not_saving else ()
        inputs = inputs[: len(inputs) - len(self._saving)]
        outputs = [result.name for result in forward.returns]
        names = [*inputs, *outputs]
        grads = [a.name for a in backward.arguments if a.name.startswith("grad_")]
        rest = [a for a in backward.arguments if not a.name.startswith(("grad_", "need_"))]
        tensors = [a for a in rest if "Tensor" in str(a.type)]
        options = [a for a in rest if "Tensor" not in str(a.type)]
        flags = [a.name for a in backward.arguments if a.name.startswith("need_")]
        in_order = [*grads, *(a.name for a in (*tensors, *options)), *flags]
        assert in_order == [argument.name for argument in backward.arguments], backward
        self._grads = _picking(outputs.index(name[5:]) for name in grads)
        self._constant = _picking(k for k, x in enumerate(outputs) if f"grad_{x}" not in grads)
        self._tensors = _picking(names.index(a.name) for a in tensors)
        self._options = _picking(names.index(a.name) for a in options)
        results = {r.name[5:]: k for k, r in enumerate(backward.returns)}
        self._results = tuple(results.pop(name, None) for name in inputs)
        assert not results, f"{backward.name} returns gradients of no argument: {results}"
        self._differentiable = tuple(k for k, r in enumerate(self._results) if r is not None)
        self._needs = [_picking(_needing(flag, inputs)) for flag in flags]

    def _requires_grad(self, args: tuple[Any, ...]) -> bool:
        for k in self._differentiable:
            x = args[k]
            if x is not None and x.requires_grad:
                return True
        return False

    def _autograd(self, *args: Any) -> tuple[Tensor, ...]:
        """The forward operator where derivatives may be wanted of it."""
        given = args[: len(self._results)]
        if _any_tangent(given):
            return self.definition(*given)
        if torch.is_grad_enabled() and self._requires_grad(given):
            return _apply(self._function, given)
        return _below(self.forward_op, args)

    def _autograd_of_backward(self, *args: Any) -> tuple[Tensor, ...]:
        """The backward operator where derivatives may be wanted of it."""
        if _any_tangent(args):
            raise RuntimeError(_once(self.title))
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return _apply(self._refusal, args)
        return _below(self.backward_op, args)

    def keep(self, ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
        """Save for the backward pass what the backward operator takes."""
        ctx.mark_non_differentiable(*self._constant(results))
        ctx.set_materialize_grads(False)
        known = (*args, *results)
        ctx.save_for_backward(*self._tensors(known))
        ctx.options = self._options(known)

    def gradients(self, ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The gradient of each argument of the forward; None where none is needed."""
        given = self._grads(grads)
        if all(grad is None for grad in given):
            return (None,) * len(self._results)
        needs = ctx.needs_input_grad
        flags = [True in picked(needs) for picked in self._needs]
        args = (*given, *ctx.saved_tensors, *ctx.options, *flags)
        if torch.is_grad_enabled() or not _plain():
            found = self.backward_op(*args)
        else:
            found = _below(self.backward_op, args)
        return tuple(
            [found[k] if need else None for need, k in zip(needs, self._results, strict=True)]
        )


def part_of(name: str, whole: str) -> None:
    """Make an operator refuse to be differentiated, which another one does for it.

    Args:
        name: of the operator, in the namespace ``throughtime``.
        whole: the operator that calls it.
    """
    operator = getattr(torch.ops.throughtime, name).default

    def autograd(*args: Any) -> tuple[Tensor, ...]:
        wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if wanted or _any_tangent(args):
            raise RuntimeError(
                f"throughtime::{name} has no gradient of its own; call throughtime::{whole}, which "
                "has one, or detach the arguments"
            )
        return _below(operator, args)

    register(torch.library.impl, name, "Autograd", autograd)


def _plain() -> bool:
    """Whether nothing but eager autograd watches, so that the dispatcher's detour can be saved."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _apply(function: type[Any], args: Iterable[Any]) -> tuple[Tensor, ...]:
    """``function.apply(*args)`` for the innermost level of differentiation alone.

    That of ``torch.autograd.Function`` binds its arguments to the signature of forward at every
    call, a third of a small call's time, and hands what torch.func transforms to all its levels:
    the dispatcher has come down to one of them already where an Autograd kernel runs.
    """
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)  # type: ignore[no-any-return]
    with enable_single_level_autograd_function():
        return function.apply(*args)  # type: ignore[no-any-return]


def _below(operator: Any, args: Iterable[Any]) -> tuple[Tensor, ...]:
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


def _function(pair: Differentiable) -> type[Any]:
    class Function(_SingleLevelFunction):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return _below(pair.forward_op, (*args, *pair._saving))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pair.keep(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return pair.gradients(ctx, grads)

    return _named(Function, pair.title)


def _refusal(operator: Any, title: str) -> type[Any]:
    """The backward operator with an error as its own gradient."""

    class Backward(_SingleLevelFunction):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return _below(operator, args)

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

    return _named(Backward, f"{title}Gradient")


def _named(function: type, name: str) -> type[Any]:
    """``grad_fn`` shows the name of the class."""
    return type(name, (function,), {})


def _once(title: str) -> str:
    return (
        f"throughtime: the compiled {title} kernels can be differentiated once, and a second "
        'derivative was asked for; use backend="reference" for double backward'
    )


def _any_tangent(args: Iterable[Any]) -> bool:
    """Whether forward-mode differentiation goes through one of the arguments."""
    return any(
        isinstance(x, Tensor)
        and x.is_floating_point()
        and torch._VF._unpack_dual(x, level=0)[1] is not None
        for x in args
    )


def _picking(positions: Iterable[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What takes the items at ``positions`` out of a sequence, faster than a loop."""
    chosen = tuple(positions)
    if len(chosen) > 1:
        return itemgetter(*chosen)
    return lambda items: tuple([items[k] for k in chosen])


def _needing(flag: str, inputs: list[str]) -> tuple[int, ...]:
    """The arguments of a forward whose gradients ``flag`` asks for."""
    if flag == "need_weights":
        return tuple(k for k, name in enumerate(inputs) if name.startswith(("weight", "bias")))
    return (inputs.index(flag.removeprefix("need_")),)


def _one_call_per_sample(operator: Any) -> Callable[..., tuple[tuple[Tensor, ...], Any]]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        batched = list(zip(args, in_dims, strict=True))
        results = [
            operator(*[x if d is None else x.select(d, k) for x, d in batched])
            for k in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(each) for each in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule
