"""Operations: a forward and a backward operator, made from the records of their arguments.

An operation ``x`` with the records ``Arguments`` and ``Results`` is two operators::

    x_forward(<arguments>, bool save) -> (<results>)
    x_backward(grad_<result>..., <arguments>, <results>, need_...) -> (grad_<argument>...)

- every differentiable result has a ``grad_<result>``, every differentiable argument a
  ``grad_<argument>``;
- the backward takes the whole record of arguments, and None for what it does not read
  (``backward=False``), and those results that it reads;
- ``need_input``, ``need_weights`` and ``need_reset`` say which gradients are wanted; others are
  always computed;
- ``save`` is True where a backward will follow: then the forward's last results hold what is saved
  for it, which callers do not see. Operations that save nothing have no ``save``.

From the records follow schemas, fakes, one ``torch.autograd.Function``, and the registrations that
make the operator right wherever torch meets it (in an exported program, inside a compiled
``torch.func.grad``, in a trace):

- Autograd: reverse mode by the backward operator; forward mode by the definition in plain PyTorch;
- FuncTorchBatched: ``vmap`` is one call per sample, of the forward and of the backward;
- Autograd of the backward: in eager mode a second derivative comes from the definition; where
  torch traces or transforms, it is an error that names the way out.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from throughtime.ops.autograd import (
    SingleLevelFunction,
    any_tangent,
    apply,
    below,
    named,
    plain,
    recording,
)
from throughtime.ops.record import Checker, Derived, Field, Layout, fake, fields, spelled
from throughtime.ops.registration import register
from throughtime.ops.second_derivative import Definition, differentiable, once, refusal
from throughtime.ops.watching import backward_of

Arguments = TypeVar("Arguments", bound=tuple[Any, ...])
Results = TypeVar("Results", bound=tuple[Any, ...])
Implementation = Callable[..., tuple[Tensor, ...]]

_TAGS = (torch.Tag.pt2_compliant_tag,)


def define(
    name: str,
    arguments: Sequence[Field],
    results: Sequence[Field],
    implementation: Implementation | None,
    fake: Implementation,
) -> Any:
    """Define an operator and return it.

    Args:
        name: in the namespace ``throughtime``.
        arguments, results: what the schema lists.
        implementation: for CPU and GPU, given the arguments one by one; None if C++ registers it.
        fake: makes results without numbers.
    """
    schema = f"({spelled(arguments)}) -> ({spelled(results)})"
    register(torch.library.define, name, schema, tags=_TAGS)
    if implementation is not None:
        register(torch.library.impl, name, ("cpu", "cuda"), implementation)
    register(torch.library.register_fake, name, fake)
    return getattr(torch.ops.throughtime, name).default


class Operation(Generic[Arguments, Results]):
    """A forward operator that runs its backward operator as its gradient.

    Calling it with a record of arguments gives the record of results.

    Args:
        name: ``name_forward`` and ``name_backward`` are the operators; ``suffix`` follows both.
        title: what the kernels are called in messages.
        arguments, results: the records.
        definition: makes the results from the arguments in plain PyTorch.
        saved: what the forward saves for the backward, by name.
        needs: of ``"input"``, ``"weights"`` and ``"reset"`` those gradients that can be left out.
        derived: sizes that no argument shows.
        suffix: of both operators.
        forward, backward: implementations for CPU and GPU, where C++ has none. Each takes a record
            of all arguments of its operator.
        composite: they call other operators only, so that they are their own fakes.
    """

    def __init__(
        self,
        name: str,
        title: str,
        arguments: type[Arguments],
        results: type[Results],
        definition: Callable[[Arguments], tuple[Tensor, ...]],
        *,
        saved: Mapping[str, Layout] | None = None,
        needs: tuple[str, ...] = (),
        derived: Derived | None = None,
        suffix: str = "",
        forward: Implementation | None = None,
        backward: Implementation | None = None,
        composite: bool = False,
    ) -> None:
        self.title, self.definition = title, definition
        self.arguments, self.results, self.derived = arguments, results, derived or {}
        self._inputs = fields(arguments)
        kept = [Field(name, "Tensor", layout) for name, layout in (saved or {}).items()]
        self._results_count = len(fields(results))
        self._outputs = (*fields(results), *kept)
        self._not_saving: tuple[bool, ...] = (False,) if saved else ()
        self._saving: tuple[bool, ...] = (True,) if saved else ()
        self._lay_out(needs)

        names = f"{name}_forward{suffix}", f"{name}_backward{suffix}"
        save = [Field("save", "bool", None)] if saved else []
        takes = namedtuple("ForwardCall", [x.name for x in (*self._inputs, *save)])  # type: ignore[misc]
        self.backward_call: Any = namedtuple(  # type: ignore[misc]
            "BackwardCall", [x.name for x in self.backward_takes]
        )
        run_forward, run_backward = (
            _on_record(takes, forward),
            _on_record(self.backward_call, backward),
        )
        if composite:
            assert run_forward and run_backward
            fakes = (run_forward, run_backward)
        else:
            fakes = (self._forward_fake(names[0]), self.backward_fake(names[1]))
        self.forward_op: Any = define(
            names[0], (*self._inputs, *save), self._outputs, run_forward, fakes[0]
        )
        self.backward_op: Any = define(
            names[1], self.backward_takes, self.backward_gives, run_backward, fakes[1]
        )
        self._function = _function(self)
        self._refusal = refusal(self.backward_op, title)
        self._twice = differentiable(
            f"{title}Gradient",
            lambda args: below(self.backward_op, args),
            Definition(
                definition,
                arguments,
                self._outputs,
                self.backward_takes,
                [x.name for x in self._inputs if x.layout and x.layout.backward is not True],
                self.backward_gives,
            ),
        )
        register(torch.library.impl, names[0], "Autograd", self._autograd)
        register(torch.library.impl, names[1], "Autograd", self._autograd_of_backward)
        for each, operator in zip(names, (self.forward_op, self.backward_op), strict=True):
            register(torch.library.register_vmap, each, _one_call_per_sample(operator))

    def __call__(self, args: Arguments) -> Results:
        """Run the forward operator, differentiable once; the arguments are taken as checked."""
        if not plain():
            found = self.forward_op(*args, *self._not_saving)
        elif recording() and self._requires_grad(args):
            found = apply(self._function, unwrap_dead_wrappers(args))
        else:
            found = below(self.forward_op, (*args, *self._not_saving))
        return self.results._make(found[: self._results_count])  # type: ignore[attr-defined, no-any-return]

    def _lay_out(self, needs: tuple[str, ...]) -> None:
        """Lay out the backward operator, and what it takes of the forward's record."""
        inputs, outputs = self._inputs, self._outputs
        differentiable = [k for k, x in enumerate(inputs) if _differentiable(x)]
        with_gradient = [k for k, x in enumerate(outputs) if _differentiable(x)]
        reads = [x for x in outputs if x.layout and x.layout.backward]
        required = "Tensor" if len(with_gradient) == 1 else "Tensor?"
        grads = [
            Field(f"grad_{outputs[k].name}", required, outputs[k].layout) for k in with_gradient
        ]
        unread = [k for k, x in enumerate(inputs) if x.layout and not x.layout.backward]
        again = [x._replace(type="Tensor?") if k in unread else x for k, x in enumerate(inputs)]
        flags = [Field(f"need_{x}", "bool", None) for x in needs]
        self.backward_takes = (*grads, *again, *reads, *flags)
        self.backward_gives = tuple(
            Field(f"grad_{inputs[k].name}", "Tensor", inputs[k].layout) for k in differentiable
        )
        self._grads, self._again, self._reads = tuple(grads), tuple(again), tuple(reads)

        # Saved tensors, then options, then None: the backward puts them in the record's order.
        read = [k for k, x in enumerate(inputs) if x.layout and x.layout.backward]
        options = [k for k, x in enumerate(inputs) if not x.layout]
        order = [*read, *options, *unread]
        self._take_unread = _picking(
            k for k, x in enumerate(inputs) if x.layout and x.layout.backward is not True
        )
        self._read_count, self._unread = len(read), (None,) * len(unread)
        self._restore = _picking(order.index(k) for k in range(len(inputs)))
        self._take_read, self._take_options = _picking(read), _picking(options)
        # Without its flag, the None that keep() puts behind the arguments is read.
        wanted = {k: x.layout.backward for k, x in enumerate(inputs) if x.layout}
        conditional = [k for k in read if isinstance(wanted[k], str)]
        names = [x.name for x in inputs]
        self._flag = names.index(str(wanted[conditional[0]])) if conditional else None
        self._take_unconditional = _picking(len(inputs) if k in conditional else k for k in read)
        self._take_results = _picking(outputs.index(x) for x in reads)
        self._take_grads = _picking(with_gradient)
        self._take_constant = _picking(k for k in range(len(outputs)) if k not in with_gradient)
        self._differentiable = tuple(differentiable)
        self._found = tuple(
            differentiable.index(k) if k in differentiable else None for k in range(len(inputs))
        )
        self._needs = [
            _picking(k for k, x in enumerate(inputs) if _need(x.name) == need) for need in needs
        ]

    def _requires_grad(self, args: tuple[Any, ...]) -> bool:
        for k in self._differentiable:
            x = args[k]
            if x is not None and x.requires_grad:
                return True
        return False

    def _autograd(self, *args: Any) -> tuple[Tensor, ...]:
        """The forward operator where derivatives may be wanted of it."""
        given = args[: len(self._inputs)]
        if any_tangent(given):
            results = self.definition(self.arguments._make(given))  # type: ignore[attr-defined]
            nothing = results[0].new_empty(0)
            return (*results, *[nothing] * (len(self._outputs) - len(results)))
        if recording() and self._requires_grad(given):
            return apply(self._function, given)
        return below(self.forward_op, args)

    def _autograd_of_backward(self, *args: Any) -> tuple[Tensor, ...]:
        """The backward operator where derivatives may be wanted of it."""
        if any_tangent(args):
            raise RuntimeError(once(self.title))
        if recording() and torch._C._any_requires_grad(*args):
            return apply(self._refusal, args)
        return below(self.backward_op, args)

    def keep(self, ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
        """Save for the backward pass what the backward operator takes."""
        ctx.mark_non_differentiable(*self._take_constant(results))
        ctx.set_materialize_grads(False)
        if self._flag is None or args[self._flag]:
            read = self._take_read(args)
        else:
            read = self._take_unconditional((*args, None))
        ctx.save_for_backward(*read, *self._take_results(results))
        ctx.options = self._take_options(args)
        ctx.unread = self._take_unread(args)
        ctx.versions = _versions(ctx.unread)
        ctx.backward_op = backward_of(self, args, results)

    def gradients(self, ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The gradient of each argument of the forward; None where none is needed."""
        given = self._take_grads(grads)
        if all(grad is None for grad in given):
            return (None,) * len(self._inputs)
        needs = ctx.needs_input_grad
        flags = [True in picked(needs) for picked in self._needs]
        saved, count = ctx.saved_tensors, self._read_count
        arguments = self._restore((*saved[:count], *ctx.options, *self._unread))
        args = (*given, *arguments, *saved[count:], *flags)
        if not plain():
            found = self.backward_op(*args)
        elif torch.is_grad_enabled():
            if _versions(ctx.unread) != ctx.versions:
                raise RuntimeError(
                    f"throughtime: an argument of the {self.title} has been modified by an inplace "
                    "operation since the forward pass, and create_graph=True needs it as it was; "
                    "modify a copy of it"
                )
            found = apply(self._twice, (*args, *ctx.unread))
        else:
            found = below(ctx.backward_op, args)
        return tuple(
            [
                found[k] if need and k is not None else None
                for need, k in zip(needs, self._found, strict=True)
            ]
        )

    def _forward_fake(self, name: str) -> Implementation:
        def run(*args: Any) -> tuple[Tensor, ...]:
            given, save = args[: len(self._inputs)], args[len(self._inputs) :]
            record = self.arguments._make(given)  # type: ignore[attr-defined]
            return fake(name, self._inputs, self._outputs, self._derived(save), record)

        return run

    def _derived(self, save: tuple[bool, ...]) -> Derived:
        """Sizes of what is saved are zero where nothing is."""
        if save == (False,):
            return {**self.derived, "saved": lambda sizes, args: 0}
        return self.derived

    def backward_fake(self, name: str) -> Implementation:
        """A fake of the backward operator ``name``."""

        def run(*args: Any) -> tuple[Tensor, ...]:
            call = self.backward_call._make(args)
            checker = Checker(name, self.derived, call)
            for field in (*self._again, *self._reads, *self._grads):
                x = getattr(call, field.name)
                if field.layout and (field.layout.backward is True or x is not None):
                    checker.check(field, x)
            given = call._asdict()
            return tuple([self._gradient(checker, field, given) for field in self.backward_gives])

        return run

    def _gradient(self, checker: Checker, field: Field, call: dict[str, Any]) -> Tensor:
        """An uninitialised gradient: empty where it is not needed."""
        name = field.name.removeprefix("grad_")
        layout = field.layout
        assert layout is not None and checker.first is not None
        absent = layout.backward is True and call[name] is None
        if absent or not call.get(f"need_{_need(name)}", True):
            return checker.first.new_empty(0)
        return checker.empty(field)


def part_of(name: str, whole: str) -> None:
    """Make an operator refuse to be differentiated, which another one does for it.

    Args:
        name: of the operator, in the namespace ``throughtime``.
        whole: the operator that calls it.
    """
    operator = getattr(torch.ops.throughtime, name).default

    def autograd(*args: Any) -> tuple[Tensor, ...]:
        wanted = recording() and torch._C._any_requires_grad(*args)
        if wanted or any_tangent(args):
            raise RuntimeError(
                f"throughtime::{name} has no gradient of its own; call throughtime::{whole}, which "
                "has one, or detach the arguments"
            )
        return below(operator, args)

    register(torch.library.impl, name, "Autograd", autograd)


def _on_record(record: Any, implementation: Implementation | None) -> Implementation | None:
    if implementation is None:
        return None
    return lambda *args: implementation(record._make(args))


def _versions(tensors: Iterable[Any]) -> list[int]:
    """How often each tensor has been written to; torch does not count for inference tensors."""
    return [x._version for x in tensors if x is not None and not x.is_inference()]


def _differentiable(field: Field) -> bool:
    return field.layout is not None and field.layout.differentiable


def _need(name: str) -> str:
    """The flag ``need_...`` that covers the gradient of an argument, if there is one."""
    if name.startswith("reset_"):
        return "reset"
    return "weights" if name.startswith(("weight", "bias")) else name


def _function(pair: Operation[Any, Any]) -> type[Any]:
    class Function(SingleLevelFunction):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return below(pair.forward_op, (*args, *pair._saving))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pair.keep(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return pair.gradients(ctx, grads)

    return named(Function, pair.title)


def _picking(positions: Iterable[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What takes the items at ``positions`` out of a sequence, faster than a loop."""
    chosen = tuple(positions)
    if len(chosen) > 1:
        return itemgetter(*chosen)
    return lambda items: tuple([items[k] for k in chosen])


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
