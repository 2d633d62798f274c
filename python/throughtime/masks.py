"""Masks over the steps of a sequence: which steps are detached, where an episode starts."""

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


def per_layer(mask: Tensor, count: int, length: int, batch: int) -> Sequence[Tensor]:
    """Split a module's mask into one per layer and direction.

    Args:
        mask: ``[T]`` or ``[T, B]`` for all of them, or ``[count, T, 1 or B]``.
        count: number of layers times directions.
        length: number of steps T.
        batch: number of samples B.

    Returns:
        ``count`` masks, each ``[T]`` or ``[T, B]``.

    Raises:
        RuntimeError: if the shape is none of these.
        TypeError: if ``mask`` is no tensor.

    Example:
        >>> import torch
        >>> both = per_layer(torch.tensor([[[True], [False]], [[False], [False]]]), 2, 2, 7)
        >>> assert [mask.tolist() for mask in both] == [[True, False], [False, False]]
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"LSTM: detach_mask should be a bool Tensor, got {type(mask).__name__}")
    shape = tuple(mask.shape)
    if shape in ((length,), (length, batch)):
        return [mask] * count
    if shape == (count, length, 1):
        return mask.squeeze(2).unbind(0)
    if shape == (count, length, batch):
        return mask.unbind(0)
    raise RuntimeError(
        f"LSTM: detach_mask should have shape [{length}], [{length}, {batch}] or [{count}, "
        f"{length}, 1 or {batch}] ([T], [T, B] or [num_layers * num_directions, T, 1 or B]), got "
        f"{list(shape)}{_if_transposed(shape, length, batch)}"
    )


def check_reset(reset: Tensor | None, length: int, batch: int) -> None:
    """Check type and shape of a module's ``reset``. Each layer checks dtype and device.

    Raises:
        RuntimeError: if the shape is not ``[T, B]``.
        TypeError: if it is no tensor.
    """
    if reset is None:
        return
    if not isinstance(reset, Tensor):
        raise TypeError(f"LSTM: reset should be a bool Tensor, got {type(reset).__name__}")
    shape = tuple(reset.shape)
    if shape != (length, batch):
        raise RuntimeError(
            f"LSTM: reset should have shape {[length, batch]} ([T, B]), got "
            f"{list(shape)}{_if_transposed(shape, length, batch)}"
        )


def reverse_reset(reset: Tensor | None) -> Tensor | None:
    """The ``reset [T, B]`` of the reverse direction.

    The reverse direction leaves an episode that starts at t after step t, so it zeroes the state
    before step t - 1.

    Example:
        >>> import torch
        >>> reverse_reset(torch.tensor([[False], [True], [False]])).flatten().tolist()
        [True, False, False]
    """
    if reset is None:
        return None
    return torch.cat([reset[1:], torch.zeros_like(reset[:1])])


def _if_transposed(shape: tuple[int, ...], length: int, batch: int) -> str:
    if shape[-2:] != (batch, length):
        return ""
    return "; it is time-major, also with batch_first=True: transpose its last two dimensions"
