"""``gradient_flow``: how the gradient of a loss travels through the steps of a model's layers."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from os import PathLike
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler

from throughtime.diagnostics import statistics
from throughtime.diagnostics.attention import KeyFlow, KeyParts
from throughtime.diagnostics.call import Call, norm_of
from throughtime.diagnostics.parts import Hops, Parts, StepGradients
from throughtime.diagnostics.rel_parts import AttentionFlow, RelParts
from throughtime.diagnostics.updates import Updates
from throughtime.diagnostics.verdict import sentence
from throughtime.functional.checks import check_size

Row = dict[str, Any]  # of text, int and float, by the name of the column


def gradient_flow(
    model: nn.Module, *, scaler: GradScaler | None = None, stride: int = 1
) -> GradientFlow:
    """Record the gradient that reaches every step of every layer of a model that remembers.

    A hook on an LSTM's output sees Y_t alone, what the loss asks of output t: the recurrence is
    inside of the layer. This records dL/dh_t and dL/dc_t with all that later steps bring. The
    kernels hold both in their backward pass, and store them where a call is recorded: two stores
    of T B H numbers, and nothing outside the block. They are kept until the next update, together
    with input, output and its gradient, which the pass has made anyway.

    The block holds forward and backward passes; any number of them. An ``nn.LSTM`` in it runs on
    our kernels (:func:`throughtime.accelerate`). Backends ``"cpu"`` and ``"reference"`` are
    recorded, and no call that ``torch.compile`` or ``torch.func`` traces. A layer is recorded by
    one block at a time.

    A loop over an LSTMCell is one call of T steps, as long as the cell gets the very ``(h, c)``
    that it gave the step before; an episode starts by ``reset``. A state that was detached,
    multiplied or changed in place begins another call. ``direct`` of such a loop is the difference
    of ``dh`` and what the next step brings, and so has the rounding of ``dh``.

    Args:
        model: a model that holds :class:`throughtime.LSTM`, :class:`throughtime.LSTMCell`,
            :class:`throughtime.RelLSTM`, :class:`throughtime.RelevancyAttention` or ``nn.LSTM``, or
            such a layer itself.
        scaler: a ``GradScaler`` whose scale the loss has; what is shown is divided by it.
        stride: n >= 1: of every n-th step the gradients are kept, counted so that the last step of
            a call (in its direction of travel) is; the two then take an n-th of the memory. A
            RelLSTM that is called with ``reset`` keeps every step, and shows every n-th.

    Returns:
        The record, to be used by ``with``.

    Raises:
        TypeError: if ``model`` is no module, ``scaler`` no GradScaler, or ``stride`` no int.
        ValueError: if the model has no such layer, or ``stride`` is not positive.

    Example:
        >>> import torch, throughtime
        >>> model = torch.nn.LSTM(3, 8)
        >>> with throughtime.gradient_flow(model) as flow:
        ...     output, _ = model(torch.randn(20, 4, 3))
        ...     output[-1].sum().backward()
        >>> row = flow.table()[0]
        >>> assert row["layer"] == "l0" and row["step"] == 0 and row["dc"] > 0

    Source: Kanuparthi et al., ICLR 2019, arXiv 1810.03023, section 2 (the paths A and B).
    """
    return GradientFlow(model, scaler, stride)


class GradientFlow:
    """Result of :func:`throughtime.gradient_flow`; ``str()`` of it is a verdict in one sentence,
    or says why there is none.

    All numbers are of the last update: calls, then a backward pass. Of earlier ones ``|dc|`` of 16
    samples stays, for pictures. ``layer`` is a name of :attr:`layers`, or its place there;
    ``direction`` is 1 for the one that travels backward, and ``call`` counts the calls of a layer
    in one update.

    Args:
        model: as in :func:`throughtime.gradient_flow`.
        scaler: as in :func:`throughtime.gradient_flow`.
        stride: as in :func:`throughtime.gradient_flow`.

    Raises:
        TypeError: if ``model`` is no module, ``scaler`` no GradScaler, or ``stride`` no int.
        ValueError: if it has nothing to record, or ``stride`` is not positive.

    Example:
        >>> import torch, throughtime
        >>> lstm = throughtime.LSTM(3, 8, backend="reference")
        >>> with throughtime.gradient_flow(lstm) as flow:
        ...     lstm(torch.randn(20, 4, 3))[0][-1].sum().backward()
        >>> assert flow.gradients().dc.shape == (20, 4, 8)
    """

    def __init__(self, model: nn.Module, scaler: GradScaler | None = None, stride: int = 1) -> None:
        check_size("gradient_flow", "stride", stride, least=1)
        if scaler is not None and not isinstance(scaler, GradScaler):
            got = type(scaler).__name__
            raise TypeError(f"gradient_flow: scaler should be a GradScaler or None, got {got}")
        self._updates = Updates(model, scaler, stride)

    def __enter__(self) -> GradientFlow:
        self._updates.recorder.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._updates.recorder.stop()

    def __str__(self) -> str:
        try:
            return self.verdict()
        except RuntimeError as error:  # there is none yet, or no more
            return str(error)

    __repr__ = __str__

    @property
    def layers(self) -> list[str]:
        """Names of the recorded layers: of the module and its stacked layer, ``"rnn.l0"``."""
        return self._updates.layers()

    @property
    def updates(self) -> int:
        """Number of backward passes that were recorded."""
        return self._updates.count()

    def gradients(
        self, layer: str | int = 0, direction: int = 0, *, call: int = 0
    ) -> StepGradients:
        """Give the gradients of a call, step by step.

        ``dc_cell`` takes about the time of a forward pass in plain PyTorch and 14 T B H numbers,
        whatever the stride; of a RelLSTM as much as :meth:`attention`.

        Args:
            layer: its name, or its place in :attr:`layers`.
            direction: 0 or 1.
            call: of the layer in the last update.

        Returns:
            ``dh``, ``dc``, ``direct`` and ``dc_cell``, each ``[T, B, H]`` (``dh`` and ``direct`` of
            a projected layer ``[T, B, P]``), steps in the order of the input; with a stride those
            that are kept. The samples of a packed batch are ordered by falling length.

        Raises:
            RuntimeError: if no backward pass was recorded, or an input was changed since.
            ValueError: if there is no such call, or it is one of a RelevancyAttention.
        """
        return self._updates.ask("gradients", Parts, layer, direction, call).gradients()

    def keys(self, layer: str | int = 0, *, call: int = 0) -> KeyFlow:
        """Give what the queries, keys and values of a RelevancyAttention get, and what is attended.

        The gradients are those that its backward pass makes, and kept. The rest takes a walk over
        the steps in plain PyTorch, in time O(T (window_size + top_k)) and as much memory.

        Args:
            layer: as in :meth:`gradients`.
            call: as in :meth:`gradients`.

        Returns:
            Gradients by query, key and value, numbers of candidates, how long each key is held,
            and the weights by distance.

        Raises:
            RuntimeError: if no backward pass was recorded, or an input was changed since.
            ValueError: if there is no such call, or it is not one of a RelevancyAttention.
        """
        return self._updates.ask("keys", KeyParts, layer, 0, call).keys()

    def attention(self, layer: str | int = 0, *, call: int = 0) -> AttentionFlow:
        """Say how attention carries the gradient of a call of a RelLSTM, and what it attends.

        Takes two walks over the steps in plain PyTorch, in time O(T (window_size + top_k)), with
        about 28 H + 3 (window_size + top_k) numbers for each step and sample, whatever the stride.
        :meth:`table`, :meth:`gradients`, :meth:`verdict` and :meth:`plot` take the same walks,
        which are made once for the call that was asked for last.

        Args:
            layer: as in :meth:`gradients`.
            call: as in :meth:`gradients`.

        Returns:
            The parts of ``dh`` that attention and the recurrence bring, attention's share,
            numbers of candidates, depth, best path, and how long each step is held: of every step.

        Raises:
            RuntimeError: if no backward pass was recorded, or an input was changed since.
            ValueError: if there is no such call, or it is not one of a RelLSTM.
        """
        return self._updates.ask("attention", RelParts, layer, 0, call).attention()

    def hops(self, count: int, layer: str | int = 0, direction: int = 0, *, call: int = 0) -> Hops:
        """Split dc by the number of passages through h: a spectrum, and any p follows from it.

        A passage leads from a step to the h before it: through W_hh, and of a RelLSTM through
        h_{t-1} in s_t, while attention to h_j is none. Each hop takes about the time of a forward
        pass in plain PyTorch, and T B H numbers stay. It takes every step, whatever the stride.

        Args:
            count: K, the largest number of passages; from T - 1 on the spectrum is whole.
            layer: as in :meth:`gradients`.
            direction: as in :meth:`gradients`.
            call: as in :meth:`gradients`.

        Returns:
            The spectrum ``[K + 1, T, B, H]``, and ``expected(p)``: the mean of dc over the masks of
            h-detach with probability p, without training with it.

        Raises:
            RuntimeError: if no backward pass was recorded, or an input was changed since.
            ValueError: if there is no such call, ``count`` is negative, the layer has a plain cell,
                which has no c_t, or is a RelevancyAttention.
        """
        check_size("hops", "count", count, least=0)
        return self._updates.ask("hops", Parts, layer, direction, call).hops(count)

    def parameters(self) -> list[Row]:
        """Compare each layer's weight gradient with gA, that with every step detached.

        gA is the cell part; of a RelLSTM what the cell and attention bring. Takes about two forward
        passes in plain PyTorch for each call.

        Returns:
            A row for each call and direction of a recurrent layer: ``layer``, ``call``,
            ``direction``, ``norm`` of the gradient of all weights and biases of this call,
            ``cell_share`` = ``|gA| / |g|``, and ``cosine`` of the two, NaN if one is 0.

        Raises:
            RuntimeError: if no backward pass was recorded, an input was changed since, or an LSTM
                was recorded with a stride: it takes the gradients of every step.
            ValueError: if no recorded layer is recurrent.
        """
        rows: list[Row] = []
        for call in self._updates.recurrent("parameters"):
            parts = self._updates.parts(call)
            assert isinstance(parts, Parts)
            whole, cell = (parts.weights(only) for only in (False, True))
            norm, of_cell = norm_of(torch.stack([whole, cell])).tolist()
            rows.append({
                **_place(call),
                "norm": norm,
                "cell_share": of_cell / norm if norm else float("nan"),
                "cosine": ((whole.double() / norm) @ (cell.double() / of_cell)).item(),
            })  # fmt: skip
        return rows

    def table(self) -> list[Row]:
        """List what reaches each step.

        Norms are over the units, and of a batch the median, with the quantiles of 10 and 90 %
        beside it (``dh_10``, ``dh_90``). Takes about two forward passes in plain PyTorch for each
        call, and 20 T B H numbers of memory while it works; of a RelLSTM see :meth:`attention`.

        Returns:
            A row for each layer, call, direction and step t that is kept: ``layer``, ``call``,
            ``direction``, ``step``, the norms ``dh``, ``dc``, ``direct`` (Y_t), ``cell`` (the part
            of dc through the cell alone), ``rest`` (dc without it), ``cut`` (share of the gradient
            by h_t that the mask of the step after takes away; NaN for a masked LSTM with a
            stride), and the shares ``zeros`` and ``subnormals`` of dc. A row of a RelLSTM has also
            the norms ``recurrent``, ``value`` and ``key``, which with ``direct`` are the parts of
            dh, and the share of ``attention`` = ``|value + key|`` by the sum of the norms of the
            four parts. A row of a RelevancyAttention has the norms ``query``, ``key`` and ``value``
            of what these get, the means over its heads ``kappa`` and ``effective`` (see
            :class:`KeyFlow`), and the shares ``zeros`` and ``subnormals`` of what the values get.
            NaN where no sample has the step.

        Raises:
            RuntimeError: if no backward pass was recorded, or an input was changed since.
        """
        rows: list[Row] = []
        for call in self._updates.calls():
            columns = statistics.columns(call, self._updates.parts(call))
            for k, step in enumerate(call.steps):
                values = {name: column[k].item() for name, column in columns.items()}
                rows.append({**_place(call), "step": step, **values})
        return rows

    def horizon(self, fraction: float = 0.01) -> list[Row]:
        """Say how far back the gradient reaches.

        Args:
            fraction: of the norm at a sample's last step that is kept, > 0.

        Returns:
            A row for each recurrent layer, call and direction: ``dh`` and ``dc``, the steps before
            the last after which the median norm is below the fraction (infinite if it never is, NaN
            if that of the last step is not finite), and ``decades``, by which ``|dc|`` grows or
            falls in 100 steps backward. Of a loss on the last step alone, ``dh`` of that step is
            all ``direct``: it falls at once where each step passes little to the one before, though
            what it passes may last. :meth:`verdict` compares the farthest step with ``dc``.

        Raises:
            RuntimeError: if no backward pass was recorded.
            ValueError: if ``fraction`` is not positive, or no recorded layer is recurrent.
        """
        if not fraction > 0:
            raise ValueError(f"horizon: fraction should be greater than 0, got {fraction}")
        rows: list[Row] = []
        for call in self._updates.recurrent("horizon"):
            dh, dc = (
                statistics.median(statistics.by_distance(norm_of(x), call)) for x in call.whole()
            )
            rows.append({
                **_place(call),
                "dh": statistics.reach(dh, fraction, call.stride),
                "dc": statistics.reach(dc, fraction, call.stride),
                "decades": statistics.decades(dc, call.stride),
            })  # fmt: skip
        return rows

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write :meth:`table` into a file; what a row does not have is empty.

        Args:
            path: of a CSV file, which is replaced.

        Raises:
            RuntimeError: if no backward pass was recorded, or an input was changed since.
        """
        rows = self.table()
        with open(path, "w", newline="", encoding="utf-8") as file:
            names = dict.fromkeys(name for row in rows for name in row)
            writer = csv.DictWriter(file, list(names))
            writer.writeheader()
            writer.writerows(rows)

    def plot(
        self,
        path: str | PathLike[str],
        layer: str | int = 0,
        direction: int = 0,
        *,
        call: int = 0,
        others: Mapping[str, GradientFlow] | None = None,
    ) -> None:
        """Draw the norms over the steps, one line per part; needs matplotlib.

        Beside it a heat map of ``|dc|`` by step and update, if several updates were recorded, with
        ``others`` ``|dc|`` of each flow in one picture, and of a layer with attention a line for
        each step of the first sample (and head) over the steps that attend it: long ones are
        retained. Of a RelevancyAttention ``|value|`` takes the place of ``|dc|``, without a map.

        Args:
            path: of the picture; its suffix is its format.
            layer: as in :meth:`gradients`.
            direction: as in :meth:`gradients`.
            call: as in :meth:`gradients`.
            others: flows to compare with, by the names that they get in the legend.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
            RuntimeError: if no backward pass was recorded, or an input was changed since.
            TypeError: if one of ``others`` is no GradientFlow.
            ValueError: if there is no such call, or another flow has a layer of another kind there.
        """
        try:  # matplotlib comes with the first picture
            from throughtime.diagnostics import plotting
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "plot: pictures need matplotlib: pip install matplotlib"
            ) from error
        found = self._updates.call(layer, direction, call)
        compared = {}
        for name, other in (others or {}).items():
            its = _compared(name, other)._updates.call(layer, direction, call)
            if its.recurrent != found.recurrent:
                raise ValueError(
                    f"plot: others[{name!r}] has a layer of another kind there, {its.name}, than "
                    f"{found.name}; compare recurrent layers, or those of RelevancyAttention"
                )
            compared[name] = plotting.Lines(
                its.steps, statistics.columns(its, other._updates.parts(its))
            )
        parts = self._updates.parts(found)
        plotting.draw(
            path,
            _title(found),
            plotting.Lines(found.steps, statistics.columns(found, parts)),
            self._updates.history(found) if found.recurrent else None,
            compared,
            parts.attended(),
        )

    def verdict(self) -> str:
        """Say in a sentence what the layer needs whose gradient grows or falls most.

        h-detach is recommended only where the path through h grows and the cell path carries
        something. From a sample's last step to its first, with medians of the batch: "the h path"
        is ``rest`` of :meth:`table` at the first step by ``dc`` at the last; "the cell path" is no
        column, but what the cell alone would leave of any gradient, the root mean square over the
        units of the product of the forget gates. Of a RelLSTM it says how much of the gradient by h
        the farthest step gets, and which share of that attention brings; of a RelevancyAttention,
        which a sentence on another layer replaces, over how many keys its weights are spread.

        Returns:
            The sentence.

        Raises:
            RuntimeError: if no backward pass was recorded, or an input was changed since.
        """
        return sentence([(call, self._updates.parts(call)) for call in self._updates.calls()])


def _compared(name: str, other: object) -> GradientFlow:
    if not isinstance(other, GradientFlow):
        got = type(other).__name__
        raise TypeError(f"plot: others[{name!r}] should be a GradientFlow, got {got}")
    return other


def _place(call: Call) -> Row:
    return {"layer": call.layer, "call": call.number, "direction": call.direction}


def _title(call: Call) -> str:
    return f"{call.layer}, direction {call.direction}" + f", call {call.number}" * bool(call.number)
