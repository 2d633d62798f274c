"""``replace`` turns every ``nn.LSTM`` of a model into a ``throughtime.LSTM``, ``restore`` back."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.nn.modules.rnn import LSTM as TorchLSTM  # nn.LSTM, whatever a program made of that name
from torch.nn.modules.rnn import LSTMCell as TorchLSTMCell
from torch.nn.utils import parametrize

from throughtime.backends.backend import BackendName, Request, can_run
from throughtime.backends.selection import check_name, users_level
from throughtime.functional.checks import check_flag
from throughtime.masks import check_probability
from throughtime.nn import LSTM


@dataclass(frozen=True)
class Replacement:
    """Result of :func:`throughtime.replace` and ``restore``; ``str()`` is one line per layer.

    Attributes:
        replaced: names of the converted layers, as in ``model.named_modules()``; "" is the model
            itself.
        skipped: name and reason of every LSTM and LSTMCell that was not converted.
        notes: for some of the converted layers what became of their class.
        done: ``"replaced"`` or ``"restored"``.

    Example:
        >>> import torch, throughtime
        >>> print(throughtime.replace(torch.nn.Sequential(torch.nn.LSTM(3, 4))))
        replaced 1, skipped 0
          replaced '0'
    """

    replaced: tuple[str, ...]
    skipped: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)
    done: Literal["replaced", "restored"] = "replaced"

    def __str__(self) -> str:
        lines = [f"{self.done} {len(self.replaced)}, skipped {len(self.skipped)}"]
        for name in self.replaced:
            note = self.notes.get(name)
            lines.append(f"  {self.done} {_shown(name)}{f': {note}' if note else ''}")
        lines += [f"  skipped {_shown(name)}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def _shown(name: str) -> str:
    return repr(name) if name else "(the model itself)"


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
    go on. ``model`` may itself be an ``nn.LSTM``. A layer of a subclass of ``nn.LSTM`` gets a class
    that has both, the subclass and ours, as bases. Layers with a ``forward`` of their own and
    ``nn.LSTMCell`` are not converted, but reported, with a warning. :func:`throughtime.restore` is
    the way back.

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
    found, skipped = _layers(model, TorchLSTM, "replace")
    if backend != "auto":
        for name, module in found.items():
            reason = can_run(backend, Request("lstm", module.hidden_size, module.proj_size))
            if reason is not None:
                raise RuntimeError(
                    f"replace: backend={backend!r} cannot run {_shown(name)}: {reason}; "
                    "no layer was changed"
                )
    notes = {}
    for name, module in found.items():
        kind: Any = type(module)
        if kind is not TorchLSTM:
            notes[name] = f"its class has both, {kind.__name__} and throughtime.LSTM, as bases"
        _convert(module, _ours(kind))
        module.detach_prob = detach_prob
        module.detach_shared = detach_shared
        module.backend = backend
    return Replacement(tuple(found), skipped, notes)


def restore(model: nn.Module) -> Replacement:
    """Turn every ``throughtime.LSTM`` inside ``model`` back into an ``nn.LSTM``, in place.

    The inverse of :func:`throughtime.replace`: the layer stays the same object with its parameters
    and hooks, and a layer of a subclass of ``nn.LSTM`` gets its class again. The options that
    ``nn.LSTM`` does not have (h-detach, recompute, backend) are dropped. A layer that was made as a
    ``throughtime.LSTM`` is converted too; one of a subclass of it is not, but reported, with a
    warning.

    Args:
        model: any module; it changes in place.

    Returns:
        The names of the converted layers, and of the others with the reason.

    Example:
        >>> import torch, throughtime
        >>> model = torch.nn.Sequential(torch.nn.LSTM(3, 4))
        >>> report = throughtime.replace(model, detach_prob=0.25)
        >>> print(throughtime.restore(model))
        restored 1, skipped 0
          restored '0'
        >>> assert type(model[0]) is torch.nn.LSTM
    """
    found, skipped = _layers(model, LSTM, "restore")
    notes = {}
    for name, module in found.items():
        kind = vars(type(module)).get("_replaced", TorchLSTM)
        if kind is not TorchLSTM:
            notes[name] = f"its class is {kind.__name__} again"
        for attribute in _OPTIONS:
            vars(module).pop(attribute, None)
        _convert(module, kind)
        module.flatten_parameters()
    return Replacement(tuple(found), skipped, notes, "restored")


def _layers(
    model: nn.Module, base: type[nn.Module], verb: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Layers that are a ``base``, by name: those to convert, and of the others why not."""
    found, skipped = {}, {}
    for name, module in model.named_modules():
        if base is TorchLSTM and isinstance(module, LSTM):
            skipped[name] = "it is a throughtime.LSTM already"
        elif isinstance(module, base) or (base is TorchLSTM and isinstance(module, TorchLSTMCell)):
            reason = _why_not(module, base)
            if reason is None:
                found[name] = module
            else:
                skipped[name] = reason
                _warn(f"{verb}: skipped {_shown(name)}: {reason}")
    return found, skipped


# What a throughtime.LSTM has beside the attributes of an RNNBase.
_OPTIONS = ("_detach_prob", "detach_shared", "recompute", "_backend")


def _convert(module: nn.Module, kind: type[nn.Module]) -> None:
    # Both classes are an RNNBase with the same attributes; the caller sets or drops ours.
    module.__class__ = kind


@functools.cache
def _ours(kind: type[TorchLSTM]) -> type[LSTM]:
    """Our class for a layer of a class: ours alone, or with the methods of the subclass."""
    if kind is TorchLSTM:
        return LSTM
    names = {
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "__reduce_ex__": _reduce,
        "_replaced": kind,
        "forward": LSTM.forward,  # before nn.LSTM's; else its methods come before ours
    }
    return types.new_class(kind.__name__, (kind, LSTM), exec_body=lambda body: body.update(names))


def _reduce(layer: Any, protocol: int) -> tuple[Any, ...]:
    """What pickle does with a layer whose class no module holds."""
    return _anew, (type(layer)._replaced,), layer.__getstate__()


def _anew(kind: Any) -> nn.Module:
    made = _ours(kind)
    return made.__new__(made)


def _why_not(module: nn.Module, base: type[nn.Module]) -> str | None:
    """Why a layer that is a ``base`` stays what it is, or None."""
    kind = type(module)
    if isinstance(module, TorchLSTMCell):
        return "it is an nn.LSTMCell; put a throughtime.LSTMCell there, which takes its state_dict"
    if parametrize.is_parametrized(module):
        return "it has parametrizations; replace first, then register them on the new layer"
    if "forward" in vars(module):
        return "its forward was replaced on the object, and would not be called"
    own = [name for name in _CALLED if _method(kind, name) is not _method(base, name)]
    if own:
        return f"its class {kind.__name__} has {' and '.join(own)} of its own"
    if base is LSTM and kind is not LSTM and "_replaced" not in vars(kind):
        return f"its class {kind.__name__} is a subclass of throughtime.LSTM"
    return None


def _method(kind: type[nn.Module], name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(kind, name)
    return found


# nn.LSTM's forward, and what it calls.
_CALLED = (
    "forward",
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=users_level())
