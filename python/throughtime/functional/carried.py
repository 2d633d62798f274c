"""Checks of what one call carries to the next: ``RelState`` and ``RelevancyCache``."""

from __future__ import annotations

import torch
from torch import Tensor

from throughtime.functional.checks import readable
from throughtime.functional.recurrent import check_devices, check_dtypes
from throughtime.ops.precision import LOW_PRECISION
from throughtime.states import RelevancyCache, RelState

_NEW_STATE = "begin anew with hx=(hx.h, hx.c)"
_NEW_CACHE = "begin a new sequence with a new RelevancyCache()"


def check_state_sizes(
    op: str, state: RelState, leading: tuple[int, ...], batch: int, hidden: int
) -> None:
    """Check that a state's fields are tensors of one set of sizes.

    Args:
        op: for the message.
        state: what was given as hx.
        leading: ``(L,)`` for the state of L layers, ``()`` for that of one.
        batch: number of samples B.
        hidden: hidden size H.

    Raises:
        RuntimeError: if a size is another.
        TypeError: if a field is no tensor.
    """
    for name in ("h", "c", "context", "memory", "relevance", "position", "length"):
        _check_tensor(op, f"hx.{name}", getattr(state, name))
    units = (*leading, batch, hidden)
    slots = state.memory.shape[len(leading)] if state.memory.dim() > len(leading) else 0
    wanted = {
        "h": units,
        "c": units,
        "context": units,
        "memory": (*leading, slots, batch, hidden),
        "relevance": (*leading, slots, batch),
        "position": (*leading, slots, batch),
        "length": (batch,),
    }
    for name, shape in wanted.items():
        _check_size(f"hx.{name}", getattr(state, name), shape)


def check_state(
    op: str,
    state: RelState,
    input: Tensor,
    hidden: int,
    options: tuple[int, int | None, str],
    autocast: torch.dtype | None,
) -> None:
    """Check that one layer's state fits the input and the call's window_size, top_k and retain.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`throughtime.functional.rel_lstm` says.
    """
    check_state_sizes(op, state, (), input.size(1), hidden)
    named = {f"hx.{name}": getattr(state, name) for name in ("h", "c", "context", "memory")}
    check_devices(input, "hidden", named)
    check_dtypes(op, input, {}, named, autocast)
    if state.options is not None:
        _check_options(op, "hx", state, "window_size, top_k, retain", options, _NEW_STATE)
    slots = state.memory.size(0)
    _check_screening(op, "hx", "states", state, slots, input, (*options[:2], 1), _NEW_STATE)


def check_cache(
    op: str,
    cache: RelevancyCache,
    key: Tensor,
    value: Tensor,
    sizes: tuple[int, int, int],
    others: tuple[object, ...],
) -> None:
    """Check that a cache continues what this call goes on with; remember the options.

    Args:
        op: for the message.
        cache: what was given.
        key: the call's own.
        value: the call's own.
        sizes: window_size, top_k and screen_every.
        others: score, scale, retain, normalize and whether relevance is given.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`throughtime.functional.relevancy_attention`
            says.
    """
    if not isinstance(cache, RelevancyCache):
        raise TypeError(f"{op}: cache should be a RelevancyCache, got {type(cache).__name__}")
    options = (*sizes, *others)
    names = ("key", "value", "relevance", "position", "length")
    missing = [name for name in names if getattr(cache, name) is None]
    if len(missing) == len(names):
        cache.options = options
        return
    if missing:
        raise ValueError(f"{op}: cache holds no {' and no '.join(missing)}; {_NEW_CACHE}")
    for name in names:
        _check_tensor(op, f"cache.{name}", getattr(cache, name))
    listed = "window_size, top_k, screen_every, score, scale, retain, normalize, relevance given"
    _check_options(op, "cache", cache, listed, options, _NEW_CACHE)
    assert cache.key is not None and cache.value is not None
    for name, old, new in (("key", cache.key, key), ("value", cache.value, value)):
        wanted, got = ((*x.shape[:2], *x.shape[3:]) for x in (new, old))
        if wanted != got:
            raise ValueError(
                f"{op}: cache holds {name}s of (B, heads, features) = {got}, but {name} has "
                f"{wanted}; {_NEW_CACHE}"
            )
        if old.dtype != new.dtype or old.device != new.device:
            raise ValueError(
                f"{op}: cache holds {name}s in {old.dtype} on {old.device}, but {name} is in "
                f"{new.dtype} on {new.device}; run all calls of a sequence in one dtype on one "
                f"device, under the same autocast (prefill and generation too), or {_NEW_CACHE}"
            )
    batch, heads, slots, _ = cache.key.shape
    rows = (batch, heads, slots)
    for name, shape in {
        "value": (*rows, value.size(3)),
        "relevance": rows,
        "position": rows,
        "length": (batch,),
    }.items():
        _check_size(f"cache.{name}", getattr(cache, name), shape)
    _check_screening(op, "cache", "keys", cache, slots, key, sizes, _NEW_CACHE)


def _check_options(
    op: str,
    owner: str,
    held: RelState | RelevancyCache,
    listed: str,
    options: tuple[object, ...],
    way_out: str,
) -> None:
    if held.options != options:
        raise ValueError(
            f"{op}: {owner} was begun with ({listed}) = {held.options}, got {options}; "
            f"go on with the same, or {way_out}"
        )


def _check_screening(
    op: str,
    owner: str,
    kind: str,
    held: RelState | RelevancyCache,
    slots: int,
    input: Tensor,
    sizes: tuple[int, int | None, int],
    way_out: str,
) -> None:
    """Check relevance, position, length and retained of ``slots`` slots but for their shapes."""
    relevance = torch.float32 if input.dtype in LOW_PRECISION else input.dtype
    wanted = {"relevance": relevance, "position": torch.int64, "length": torch.int64}
    for name, dtype in wanted.items():
        x: Tensor = getattr(held, name)
        if x.dtype != dtype:
            raise ValueError(
                f"{op}: {owner}.{name} should have dtype {dtype} for an input of {input.dtype}, "
                f"got {x.dtype}; convert it: {owner}.{name}.to({dtype})"
            )
        if x.device != input.device:
            raise RuntimeError(
                f"{op}: {owner}.{name} should be on the input's device {input.device}, got "
                f"{x.device}; move it: {owner}.{name}.to({str(input.device)!r})"
            )
        least = 0 if name == "length" else -1  # which marks an empty slot
        if x.numel() and readable(x) and not x.min().item() >= least:  # nor is NaN
            raise ValueError(
                f"{op}: {owner}.{name} should hold numbers from {least}, got "
                f"{x.min().item()}; {way_out}"
            )
    retained = held.retained
    if not isinstance(retained, (int, torch.SymInt)) or not 0 <= retained <= slots:
        raise ValueError(
            f"{op}: {owner}.retained should be an int from 0 to its {slots} slots, got "
            f"{retained!r}; {way_out}"
        )
    window_size, top_k, screen_every = sizes
    window, most = slots - retained, window_size + screen_every - 2
    if window > most or (top_k is not None and retained > top_k):
        others = "window_size - 1" if screen_every == 1 else "window_size + screen_every - 2"
        raise ValueError(
            f"{op}: {owner} holds {retained} retained {kind} and {window} of the window, more "
            f"than top_k = {top_k} and {others} = {most} allow; go on with the sizes of the call "
            f"that made it, or {way_out}"
        )


def _check_tensor(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} should be a Tensor, got {type(x).__name__}")


def _check_size(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise RuntimeError(f"Expected {name} size {shape}, got {list(x.shape)}")
