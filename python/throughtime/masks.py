"""Masks over the steps of a sequence: which steps are detached."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor


def check_probability(p: float, name: str) -> float:
    """Return ``p`` as a float.

    Raises:
        ValueError: if ``p`` is not a number in [0, 1].
    """
    if isinstance(p, bool) or not isinstance(p, numbers.Real) or not 0 <= p <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1], got {p!r}")
    return float(p)


def detach_mask(
    length: int,
    p: float,
    *,
    batch: int | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a mask whose entries are True with probability ``p``.

    Args:
        length: number of time steps T.
        p: probability of detaching a step, in [0, 1].
        batch: None draws one decision per step, ``[T]``, which the batch shares (the paper's
            rule). A number B draws one per step and sample, ``[T, B]``.
        device: device of the mask.
        generator: random generator on ``device``.

    Returns:
        bool ``[T]`` or ``[T, B]``.

    Raises:
        ValueError: if ``p`` is outside [0, 1].

    Example:
        >>> import torch
        >>> from throughtime.masks import detach_mask
        >>> mask = detach_mask(6, 0.5, generator=torch.Generator().manual_seed(0))
        >>> assert mask.shape == (6,) and mask.dtype == torch.bool
        >>> assert detach_mask(6, 1.0).all() and not detach_mask(6, 0.0).any()

    Source: arXiv 1810.03023, Algorithm 1.
    """
    p = check_probability(p, "p")
    shape = (length,) if batch is None else (length, batch)
    # torch.compile passes symbolic sizes, and rand with a generator does not take them.
    if generator is None:
        return torch.rand(shape, device=device) < p
    return torch.rand(shape, device=device, generator=generator) < p


def drawn(
    count: int,
    length: int,
    p: float,
    *,
    shared: bool,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Sequence[Tensor]:
    """Draw one mask ``[T]`` per layer and direction; if ``shared``, the same for all.

    Example:
        >>> import torch
        >>> one, two = drawn(2, 50, 0.5, shared=True)
        >>> assert one.shape == (50,) and torch.equal(one, two)
    """
    rows = 1 if shared else count
    steps = detach_mask(rows * length, p, device=device, generator=generator)
    return steps.view(rows, length).expand(count, length).unbind(0)


def per_layer(
    mask: Tensor, count: int, length: int, batch: int, batch_first: bool
) -> Sequence[Tensor]:
    """Split a module's mask, in the layout of its input, into one per layer and direction.

    Args:
        mask: ``[T]`` or ``[T, B]`` for all of them, or ``[count, T, 1 or B]``; with ``batch_first``
            ``[T]``, ``[B, T]`` or ``[count, 1 or B, T]``.
        count: number of layers times directions.
        length: number of steps T.
        batch: number of samples B.
        batch_first: whether the batch comes before the steps.

    Returns:
        ``count`` masks, each ``[T]`` or ``[T, B]``.

    Raises:
        RuntimeError: if the shape is none of these.
        TypeError: if ``mask`` is no tensor.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[True], [False]], [[False], [False]]])
        >>> [one.tolist() for one in per_layer(mask, 2, 2, 7, batch_first=False)]
        [[True, False], [False, False]]
        >>> one, _ = per_layer(torch.ones(7, 2).bool(), 2, 2, 7, batch_first=True)
        >>> assert one.shape == (2, 7)
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"LSTM: detach_mask should be a bool Tensor, got {type(mask).__name__}")
    steps = mask.transpose(-1, -2) if batch_first and mask.dim() > 1 else mask
    shape = tuple(steps.shape)
    if shape in ((length,), (length, batch)):
        return [steps] * count
    if shape == (count, length, 1):
        return steps.squeeze(2).unbind(0)
    if shape == (count, length, batch):
        return steps.unbind(0)
    sizes, letters = (
        f"[{t}], {layout(t, b, batch_first)} or [{n}, {layout(t, f'1 or {b}', batch_first)[1:]}"
        for n, t, b in ((count, length, batch), ("num_layers * num_directions", "T", "B"))
    )
    raise RuntimeError(
        f"LSTM: detach_mask should have shape {sizes} ({letters}), got {list(mask.shape)}"
        f"{if_transposed(mask, length, batch, batch_first)}"
    )


def layout(steps: object, samples: object, batch_first: bool) -> str:
    """Two sizes in the layout of the input, for a message."""
    return f"[{samples}, {steps}]" if batch_first else f"[{steps}, {samples}]"


def if_transposed(mask: Tensor, length: int, batch: int, batch_first: bool) -> str:
    """A hint for a message, if a mask has the other layout."""
    other = (length, batch) if batch_first else (batch, length)
    if tuple(mask.shape[-2:]) != other:
        return ""
    return f"; with batch_first={batch_first} its last two dimensions should change places"
