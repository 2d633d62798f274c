"""``replace`` turns every ``nn.LSTM`` of a model into a ``throughtime.LSTM``, in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.nn.utils import parametrize

from throughtime.backends.backend import BackendName, Request, can_run
from throughtime.backends.selection import check_name
from throughtime.functional.checks import check_flag
from throughtime.masks import check_probability
from throughtime.nn import LSTM


@dataclass(frozen=True)
class Replacement:
    """Result of :func:`throughtime.replace`; ``str()`` of it is one line per layer.

    Attributes:
        replaced: names of the converted layers, as in ``model.named_modules()``; "" is the model
            itself.
        skipped: name and reason of every LSTM that was not converted.

    Example:
        >>> import torch, throughtime
        >>> print(throughtime.replace(torch.nn.Sequential(torch.nn.LSTM(3, 4))))
        replaced 1, skipped 0
          replaced 0
    """

    replaced: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, skipped {len(self.skipped)}"]
        lines += [f"  replaced {name or '(the model itself)'}" for name in self.replaced]
        lines += [
            f"  skipped {name or '(the model itself)'}: {reason}"
            for name, reason in self.skipped.items()
        ]
        return "\n".join(lines)


def replace(
    model: nn.Module,
    *,
    detach_prob: float = 0.0,
    detach_shared: bool = False,
    backend: BackendName = "auto",
) -> Replacement:
    """Convert every ``nn.LSTM`` inside ``model`` in place, and keep its weights.

    Only the class of a layer changes, as ``torch.nn.utils.parametrize`` does it. The layer stays
    the same object, with its parameters and hooks; so optimizers and layers used in several places
    go on. ``model`` may itself be an ``nn.LSTM``. Subclasses of ``nn.LSTM`` and layers with a
    ``forward`` of their own are not converted, but reported.

    Args:
        model: any module; it changes in place.
        detach_prob: probability in [0, 1] of detaching a step in training.
        detach_shared: True draws one mask for all layers and directions of an LSTM, instead of one
            each.
        backend: as in :class:`throughtime.LSTM`.

    Returns:
        The names of the converted layers, and of the others with the reason.

    Raises:
        RuntimeError: if the backend can never run one of the layers; then no layer changes.
        TypeError: if ``detach_shared`` is no bool.
        ValueError: if ``detach_prob`` or ``backend`` is out of range.

    Example:
        >>> import torch, throughtime
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(3, 4), "head": torch.nn.Linear(4, 2)})
        >>> report = throughtime.replace(model, detach_prob=0.25)
        >>> assert report.replaced == ("rnn",) and model["rnn"].detach_prob == 0.25
    """
    check_probability(detach_prob, "detach_prob")
    check_name(backend)
    check_flag("detach_shared", detach_shared)
    found: dict[str, nn.LSTM] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, LSTM):
            skipped[name] = "it is a throughtime.LSTM already"
        elif isinstance(module, nn.LSTM):
            reason = _why_not(module)
            if reason is None:
                found[name] = module
            else:
                skipped[name] = reason
    if backend != "auto":
        for name, module in found.items():
            reason = can_run(backend, Request("lstm", module.hidden_size, module.proj_size))
            if reason is not None:
                raise RuntimeError(
                    f"replace: backend={backend!r} cannot run {name or 'the model'}: {reason}; "
                    "no layer was changed"
                )
    for module in found.values():
        layer = _convert(module)
        layer.detach_prob = detach_prob
        layer.detach_shared = detach_shared
        layer.backend = backend
    return Replacement(tuple(found), skipped)


def _convert(module: nn.LSTM) -> LSTM:
    # Both classes are an RNNBase with the same attributes; the caller sets the attributes of ours.
    module.__class__ = LSTM  # type: ignore[assignment]
    return cast(LSTM, module)


def _why_not(module: nn.LSTM) -> str | None:
    if parametrize.is_parametrized(module):
        return "it has parametrizations; replace first, then register them on the new layer"
    if type(module) is not nn.LSTM:
        return (
            f"its class {type(module).__name__} may have a forward of its own; if it has not, "
            "put throughtime.LSTM.from_torch(layer) in its place"
        )
    if "forward" in vars(module):
        return "its forward was replaced on the object, and would not be called"
    return None
