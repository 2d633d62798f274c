"""Makes a program smaller while the same kind of thing comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fuzz import targets
from fuzz.program import Spec
from fuzz.runner import outcome_of


def _smaller(spec: Spec) -> Iterator[Spec]:
    for k in range(len(spec.breaks)):
        yield replace(spec, breaks=spec.breaks[:k] + spec.breaks[k + 1 :])
    for name, on in spec.options.items():
        if on:
            yield replace(spec, options={**spec.options, name: False})
    for name, size in spec.sizes.items():
        for smaller in (s for s in targets.SIZES[name] if s < size):
            yield replace(spec, sizes={**spec.sizes, name: smaller})


def shrunk(spec: Spec, kind: str, tries: int) -> Spec:
    """The smallest program found in which something of that kind still happens."""
    smaller = iter(_smaller(spec))
    for _ in range(tries):
        candidate = next(smaller, None)
        if candidate is None:
            break
        if outcome_of(candidate).kind == kind:
            spec, smaller = candidate, iter(_smaller(candidate))
    return spec
