"""Records: the arguments and the results of an operator, each spelled once.

A record is a ``NamedTuple`` whose fields say what they hold::

    class Arguments(NamedTuple):
        input: Annotated[Tensor, Real("T, B, I")]
        bias: Annotated[Tensor | None, Real("H", backward=False)]
        reverse: bool

The schema of the operator, the checks and the results of its fake implementation follow from it.
Sizes are letters, sums of letters and multiples of letters: ``"T, B"``, ``"P + T"``, ``"4H"``.
A letter is bound by the first tensor that has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

Size = int | torch.SymInt
Sizes = dict[str, Size]
# What computes a size that no tensor shows, from those that are bound and from the record.
Derived = Mapping[str, Callable[[Sizes, Any], Size]]

_SCHEMA_TYPES: dict[object, str] = {bool: "bool", int: "SymInt", float: "float", str: "str"}


@dataclass(frozen=True)
class Layout:
    """What a tensor of a record holds.

    Args:
        shape: its sizes, separated by commas.
        dtype: None is the dtype of the record's first tensor; a function takes the record.
        differentiable: whether it has a gradient.
        backward: whether the backward operator reads it; the name of a flag of the record: if it
            is set, and gets None otherwise.
        absent: what follows if it is None: ``"R = H"``.
        like: the argument whose dtype a result has, in place of the first tensor's.
    """

    shape: str
    dtype: torch.dtype | Callable[[Any], torch.dtype] | None = None
    differentiable: bool = False
    backward: bool | str = True
    absent: str = ""
    like: str = ""
    terms: tuple[Mapping[str, int], ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        terms = tuple(_terms(size) for size in self.shape.split(", "))
        object.__setattr__(self, "terms", terms)


def Real(shape: str, *, differentiable: bool = True, **options: Any) -> Layout:
    """Floating point numbers, by default with a gradient."""
    return Layout(shape, differentiable=differentiable, **options)


def Whole(shape: str, **options: Any) -> Layout:
    """Whole numbers, int64."""
    return Layout(shape, torch.int64, **options)


def Mask(shape: str) -> Layout:
    """Truth values."""
    return Layout(shape, torch.bool)


class Field(NamedTuple):
    """One field of a record; ``layout`` is None for what is no tensor."""

    name: str
    type: str  # as a schema spells it
    layout: Layout | None

    @property
    def optional(self) -> bool:
        """Whether it may be None."""
        return self.type.endswith("?")


# Names of the differentiable tensors of every record.
DIFFERENTIABLE: dict[type[Any], tuple[str, ...]] = {}


def fields(record: type[Any]) -> tuple[Field, ...]:
    """The fields of a record, in order."""
    hints = get_type_hints(record, include_extras=True)
    found = tuple(_field(name, hint) for name, hint in hints.items())
    DIFFERENTIABLE[record] = tuple(x.name for x in found if x.layout and x.layout.differentiable)
    return found


def _field(name: str, hint: Any) -> Field:
    if get_origin(hint) is Annotated:
        kind, layout = get_args(hint)
        return Field(name, "Tensor?" if NoneType in get_args(kind) else "Tensor", layout)
    return Field(name, _SCHEMA_TYPES[hint], None)


def spelled(fields: Iterable[Field]) -> str:
    """Fields as a schema lists them."""
    return ", ".join(f"{field.type} {field.name}" for field in fields)


class Checker:
    """The sizes of one call of an operator, as its tensors show them.

    Args:
        op: the operator's name, for messages.
        derived: sizes that no tensor shows.
        record: the arguments of the call.
    """

    def __init__(self, op: str, derived: Derived, record: Any) -> None:
        self.op, self.derived, self.record = op, derived, record
        self.sizes: Sizes = {}
        self.first: Tensor | None = None

    def check(self, field: Field, tensor: Tensor | None) -> None:
        """Check that a tensor has its sizes and lies beside the first one.

        A single tensor on ``meta`` is enough for torch to take the fake implementation, whose
        results would then go on as if they were numbers.

        Raises:
            RuntimeError: if it does not, or is None where the schema has none.
        """
        layout = field.layout
        assert layout is not None
        if tensor is None:
            if not field.optional:  # a schema's `Tensor` takes None too
                self._refuse(field, "should be a tensor, got None")
            if layout.absent:
                letter, _, other = layout.absent.partition(" = ")
                self._agree(field, letter, 0 if other == "0" else self.sizes[other])
            return
        if self.first is None:
            self.first = tensor
        if tensor.device != self.first.device:
            self._refuse(
                field,
                f"should be on {self.first.device}, as the others are, got {tensor.device}",
            )
        terms = layout.terms
        if tensor.dim() != len(terms):
            self._refuse(field, f"should be [{layout.shape}], got {tensor.dim()} dimensions")
        wanted = [self._bound(term, size) for term, size in zip(terms, tensor.shape, strict=True)]
        shown = ", ".join(map(str, wanted))
        text = self._message(field, f"should have shape [{shown}], got {list(tensor.shape)}")
        for size, want in zip(tensor.shape, wanted, strict=True):
            # Sizes that only a run will show are compared there.
            torch._check(size == want, text.__str__)  # type: ignore[no-untyped-call]

    def shape(self, layout: Layout) -> list[Size]:
        """The sizes of a result."""
        return [self._value(term) for term in layout.terms]

    def empty(self, field: Field) -> Tensor:
        """An uninitialised result."""
        layout = field.layout
        assert layout is not None and self.first is not None
        dtype = layout.dtype
        if callable(dtype) and not isinstance(dtype, torch.dtype):
            dtype = dtype(self.record)
        like = getattr(self.record, layout.like) if layout.like else self.first
        return self.first.new_empty(self.shape(layout), dtype=dtype or like.dtype)

    def _bound(self, term: Mapping[str, int], size: Size) -> Size:
        """What a size should be; the one letter that is not bound yet is bound to make it so."""
        unknown = [x for x in term if x and x not in self.sizes and x not in self.derived]
        if unknown:
            (letter,) = unknown
            rest = sum(n * self._letter(x) for x, n in term.items() if x != letter)
            self.sizes[letter] = (size - rest) // term[letter]
        return self._value(term)

    def _value(self, term: Mapping[str, int]) -> Size:
        total: Size = 0
        for letter, factor in term.items():
            value = self._letter(letter)
            total = total + (value if factor == 1 else factor * value)
        return total

    def _letter(self, letter: str) -> Size:
        if letter not in self.sizes:
            self.sizes[letter] = self.derived[letter](self.sizes, self.record)
        return self.sizes[letter]

    def _agree(self, field: Field, letter: str, value: Size) -> None:
        known = self.sizes.setdefault(letter, value)
        text = self._message(field, f"should be given where {letter} = {known} is not {value}")
        torch._check(known == value, text.__str__)  # type: ignore[no-untyped-call]

    def _message(self, field: Field, words: str) -> str:
        return f"throughtime::{self.op}: {field.name} {words}"

    def _refuse(self, field: Field, words: str) -> None:
        raise RuntimeError(self._message(field, words))


def _terms(size: str) -> Mapping[str, int]:
    """``"4H"`` -> ``{"H": 4}``, ``"P + T"`` -> ``{"P": 1, "T": 1}``."""
    terms: dict[str, int] = {}
    for term in size.split(" + "):
        letter = term.lstrip("0123456789")
        terms[letter] = int(term.removesuffix(letter) or 1)
    return terms


def fake(
    op: str,
    arguments: Iterable[Field],
    results: Iterable[Field],
    derived: Derived,
    record: Any,
) -> tuple[Tensor, ...]:
    """What a fake implementation does: check the arguments, make results without numbers.

    Args:
        op: the operator's name.
        arguments, results: its fields.
        derived: sizes that no tensor shows.
        record: the arguments of the call, by name.
    """
    checker = Checker(op, derived, record)
    for field in arguments:
        if field.layout:
            checker.check(field, getattr(record, field.name))
    return tuple([checker.empty(field) for field in results])
