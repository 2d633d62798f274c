"""``accelerate`` runs every ``nn.LSTM`` of a process on the kernels of this package."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor
from torch.nn.modules.rnn import LSTM as TorchLSTM

from throughtime import _ext
from throughtime.acceleration.call import why_never
from throughtime.acceleration.handle import Acceleration, innermost
from throughtime.acceleration.operators import KERNELS
from throughtime.acceleration.registration import displaced, put_in_place
from throughtime.backends.backend import Request

__all__ = ["Acceleration", "accelerate", "accelerate_if_asked", "explained", "request"]

VARIABLE = "THROUGHTIME_ACCELERATE"

_logger = logging.getLogger("throughtime")


def accelerate(
    *,
    detach_prob: float = 0.0,
    detach_shared: bool = False,
    generator: torch.Generator | None = None,
) -> Acceleration:
    """Run every ``nn.LSTM`` of this process on our kernels, in models that need no change.

    Ours stand behind torch's own operators, ``aten::lstm.input`` and ``aten::lstm.data``. So
    classes, parameters, ``isinstance`` and saved files stay torch's, and results are equal to
    rounding. A call that ours does not do, or does slower, goes to the original, and the handle
    counts it with the reason: what torch traces or transforms, forward-mode differentiation, tensor
    subclasses, and dtypes that are slower (:func:`throughtime.explain` of an ``nn.LSTM`` names
    them).

    It holds for all threads and for a forked process. A process that is spawned calls it itself, or
    inherits the environment variable ``THROUGHTIME_ACCELERATE=1``, with which ``import torch`` does
    what this function does, in a program that knows nothing of it.

    Args:
        detach_prob: probability in [0, 1] of detaching a step in training: h-detach for models that
            cannot be edited, as in :class:`throughtime.LSTM`. Masks are drawn for layers in
            ``train()``, where gradients are on.
        detach_shared: True draws one mask for all layers and directions of a call.
        generator: random generator for the masks, on the input's device.

    Returns:
        A handle, to be removed by ``.remove()`` or ``with``.

    Raises:
        RuntimeError: if there are no compiled kernels, this torch lacks what is needed, or another
            library stands in the place of the operators.
        TypeError: if ``detach_shared`` is no bool.
        ValueError: if ``detach_prob`` is out of range.

    Example:
        >>> import torch, throughtime
        >>> model = torch.nn.LSTM(3, 4)
        >>> with throughtime.accelerate(detach_prob=0.25) as handle:
        ...     model(torch.randn(5, 2, 3))[0].sum().backward()
        >>> print(handle)  # doctest: +ELLIPSIS
        accelerate: removed in process ..., detach_prob=0.25
          1 calls, cpu kernels

    Source of h-detach: arXiv 1810.03023, Algorithm 1.
    """
    missing = _ext.why_missing()
    if missing is not None and _ext.why_missing("cuda") is not None:
        raise RuntimeError(f"accelerate: {missing}")
    handle = Acceleration(detach_prob, detach_shared, generator)
    try:
        put_in_place(KERNELS)
    except RuntimeError:
        handle.remove()
        raise
    _logger.debug("accelerate: in force, detach_prob=%s", detach_prob)
    return handle


def request(module: TorchLSTM) -> Request:
    """What an ``nn.LSTM`` asks a backend for."""
    weight: Tensor = module.weight_hh_l0  # type: ignore[assignment]  # torch says: or a Module
    return Request("lstm", module.hidden_size, module.proj_size, weight.device, weight.dtype)


def explained(request: Request) -> tuple[str | None, str]:
    """The backend that runs an ``nn.LSTM``, or None, and a sentence on it, for ``explain``."""
    handle = innermost()
    if handle is None:
        return None, (
            "torch runs it: throughtime.accelerate() is not in force; call it, or convert the "
            "layer by throughtime.replace(model)"
        )
    reason = displaced() or why_never(request)
    if reason is not None:
        return None, f"torch runs it: {reason}\n{handle}"
    assert request.device is not None
    return request.device.type, f"accelerate runs it on our {request.device.type} kernels\n{handle}"


def accelerate_if_asked() -> None:
    """Do what THROUGHTIME_ACCELERATE says.

    Raises:
        ValueError: if it is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"environment variable {VARIABLE} should be 0 or 1, got {value!r}")
    if value == "1":
        accelerate()
