"""Registers the package's classes with ``torch.load`` and its states with ``torch.export``."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils import _pytree as pytree  # no public way imports as fast

from throughtime.backends.explanation import Explanation
from throughtime.nn import LSTM, LSTMCell, RelevancyAttention, RelLSTM
from throughtime.replacement import Replacement
from throughtime.schedule import DetachSchedule
from throughtime.states import RelevancyCache, RelState


def register() -> None:
    """Register them all; the package's import calls this once."""
    states = (RelState, RelevancyCache)
    layers = (LSTM, LSTMCell, RelLSTM, RelevancyAttention)
    torch.serialization.add_safe_globals(
        [*layers, DetachSchedule, Replacement, Explanation, *states]
    )
    for state in states:
        _register_state(state)


def _register_state(cls: type[Any]) -> None:
    """Register a dataclass as a pytree of its fields; ``options`` is a constant."""
    # In reverse order: torch.export replaces names in text, and would find "c" in "context".
    names = sorted((field.name for field in dataclasses.fields(cls)), reverse=True)
    leaves, constants = ([n for n in names if (n == "options") == last] for last in (False, True))

    def flatten(state: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(state, n) for n in leaves], tuple(getattr(state, n) for n in constants)

    def flatten_with_keys(state: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        values, context = flatten(state)
        return [(pytree.GetAttrKey(n), x) for n, x in zip(leaves, values, strict=True)], context

    def unflatten(values: Any, context: tuple[Any, ...]) -> Any:
        return cls(**dict(zip((*leaves, *constants), (*values, *context), strict=True)))

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"throughtime.{cls.__name__}",
        to_dumpable_context=list,
        from_dumpable_context=_as_tuples,
        flatten_with_keys_fn=flatten_with_keys,
    )


def _as_tuples(value: Any) -> Any:
    """Turn JSON's lists back into tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
