"""``throughtime.RelLSTM``: an LSTM that attends its own screened past."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from throughtime import functional, masks
from throughtime.backends.backend import BackendName, Request
from throughtime.functional.carried import check_state_sizes
from throughtime.functional.checks import (
    check_choice,
    check_flag,
    check_pair,
    check_sequence,
    check_size,
    check_weight_dtype,
)
from throughtime.functional.rel_lstm import Cell
from throughtime.functional.relevancy_call import Retain
from throughtime.nn.backend import BackendChoice
from throughtime.nn.episodes import Sizes, episodes
from throughtime.nn.h_detach import HDetach
from throughtime.packed import check_packed, dropout, repack, unpack
from throughtime.states import RelState

States = tuple[Tensor, Tensor]


class RelLSTM(BackendChoice, HDetach, nn.Module):
    r"""A multi-layer LSTM whose state is mixed with attention over its own screened past.

    At every step the state that enters the gates is ``s_t = (h_{t-1} + o_{t-1}) / 2``. Here
    ``o_{t-1}`` is attention over the last ``window_size`` hidden states and the ``top_k`` most
    relevant ones before them; :func:`throughtime.functional.rel_lstm` has the equations. A gradient
    reaches a retained state in one hop, and the cost per step does not grow with the length.

    Arguments, shapes and conventions are those of :class:`torch.nn.LSTM` where they mean the same.
    The outputs differ. Parameters of layer k: ``weight_ih_lk [4H, I]``, ``weight_hh_lk [4H, H]``,
    ``bias_ih_lk``, ``bias_hh_lk [4H]``, ``weight_query_lk [A, H]``, ``weight_key_lk [A, H]``,
    ``weight_score_lk [A]``.

    Args:
        input_size: I, features of the input, > 0.
        hidden_size: H, features of the hidden state, > 0.
        num_layers: number of stacked layers L.
        bias: False leaves out both bias vectors.
        batch_first: input, output and masks have the batch first, ``[B, T, *]``; states stay as
            they are.
        dropout: probability in [0, 1] of zeroing an output of each layer but the last, in training.
        device: device of the parameters.
        dtype: floating point type of the parameters.
        window_size: number of steps that attend a state before it competes for the retained set,
            >= 1.
        top_k: size of the retained set, >= 0; None keeps every state (MemLSTM, O(T^2) time).
        attention_size: A, units of the score; H by default.
        cell: ``"lstm"``, or ``"tanh"`` for a plain recurrent cell (RelRNN, MemRNN; reference only).
        retain: ``"relevant"``, or the baseline ``"first"``, which keeps the first ``top_k`` states.
        detach_prob: probability in [0, 1] of detaching ``h_{t-1}`` in ``s_t`` at a step, in
            training.
        detach_shared: True draws one mask for all layers, instead of one each.
        backend: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``. Any name but ``"auto"``
            runs or raises.

    Raises:
        RuntimeError: if the chosen backend can never run this layer.
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.

    Example:
        >>> import torch, throughtime
        >>> layer = throughtime.RelLSTM(10, 20, num_layers=2, window_size=5, top_k=3)
        >>> output, state = layer(torch.randn(50, 3, 10))
        >>> assert output.shape == (50, 3, 20) and state.memory.shape == (2, 7, 3, 20)
        >>> output, state = layer(torch.randn(50, 3, 10), state.detach())  # goes on from there

    Source: Kerg, Kanuparthi et al., NeurIPS 2020, arXiv 2006.09471.
    """

    weight_hh_l0: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        window_size: int = 10,
        top_k: int | None = 15,
        attention_size: int | None = None,
        cell: Cell = "lstm",
        retain: Retain = "relevant",
        detach_prob: float = 0.0,
        detach_shared: bool = False,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
        for name, size in {**sizes, "window_size": window_size}.items():
            check_size("RelLSTM", name, size, least=1)
        if top_k is not None:
            check_size("RelLSTM", "top_k", top_k, least=0)
        if attention_size is not None:
            check_size("RelLSTM", "attention_size", attention_size, least=1)
        for name, flag in {
            "bias": bias,
            "batch_first": batch_first,
            "detach_shared": detach_shared,
        }.items():
            check_flag(name, flag)
        check_choice("RelLSTM", "cell", cell, ("lstm", "tanh"))
        check_choice("RelLSTM", "retain", retain, ("relevant", "first"))
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.attention_size = hidden_size if attention_size is None else attention_size
        self.bias, self.batch_first = bias, batch_first
        self.dropout = masks.check_probability(dropout, "dropout")
        if dropout > 0 and num_layers == 1:
            warnings.warn(  # in the words of nn.LSTM
                "dropout option adds dropout after all but last recurrent layer, so non-zero "
                f"dropout expects num_layers greater than 1, but got dropout={dropout} and "
                f"num_layers={num_layers}",
                stacklevel=2,
            )
        self.window_size, self.top_k = window_size, top_k
        self.cell, self.retain = cell, retain
        self.detach_prob = detach_prob
        self.detach_shared = detach_shared
        gates = (4 if cell == "lstm" else 1) * hidden_size
        for layer in range(num_layers):
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (gates, input_size if layer == 0 else hidden_size),
                "weight_hh": (gates, hidden_size),
            }
            if bias:
                shapes |= {"bias_ih": (gates,), "bias_hh": (gates,)}
            shapes |= {
                "weight_query": (self.attention_size, hidden_size),
                "weight_key": (self.attention_size, hidden_size),
                "weight_score": (self.attention_size,),
            }
            for name, shape in shapes.items():
                empty = torch.empty(shape, device=device, dtype=dtype)
                self.register_parameter(f"{name}_l{layer}", nn.Parameter(empty))
        self.backend = backend
        self.reset_parameters()

    def backend_request(self) -> Request:
        weight = self.weight_hh_l0
        return Request(
            "rel_lstm",
            self.hidden_size,
            device=weight.device,
            dtype=weight.dtype,
            cell=self.cell,
        )

    def reset_parameters(self) -> None:
        """Draw new weights: Xavier-normal, with gain 2 for query and key; the score's are normal.

        Biases are zero. ``nn.LSTM``'s small uniform weights leave attention nearly flat: on the
        copying task they learned many times more slowly.
        """
        for name, weight in self.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(weight)
            elif name.startswith("weight_score"):
                nn.init.normal_(weight)
            elif name.startswith(("weight_query", "weight_key")):
                nn.init.xavier_normal_(weight, gain=2.0)
            else:
                for gate in torch.split(weight, self.hidden_size):
                    nn.init.xavier_normal_(gate)

    @overload
    def forward(
        self,
        input: Tensor,
        hx: RelState | States | None = None,
        *,
        detach_mask: Tensor | None = None,
        reset: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, RelState]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: RelState | States | None = None,
        *,
        detach_mask: Tensor | None = None,
        reset: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[PackedSequence, RelState]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: RelState | States | None = None,
        *,
        detach_mask: Tensor | None = None,
        reset: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor | PackedSequence, RelState]:
        """Run all layers.

        Args:
            input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, ``[T, I]``, or packed.
            hx: None (zeros), ``(h_0, c_0)`` each ``[L, B, H]`` (``[L, H]`` if the input has no
                batch), or the state of an earlier call.
            reset: ``[T, B]`` or ``[T, B, 1]``; with ``batch_first`` ``[B, T]`` or ``[B, T, 1]``;
                for unbatched input ``[T]``. True, or 1 in any other dtype, where an episode starts:
                state, window and retained set are emptied before that step.
            detach_mask: bool ``[T]`` or ``[T, B]`` for all layers, or ``[L, T, 1 or B]``; with
                ``batch_first`` ``[B, T]`` or ``[L, 1 or B, T]``. It is used as given, also in
                ``eval()``. None: the layer draws one if ``detach_prob`` asks for it.
            generator: random generator for the mask, on the input's device.

        Returns:
            ``(output, state)``. The output is shaped like that of ``nn.LSTM``. The state always
            has a batch dimension.

        Raises:
            RuntimeError: if a size or a device does not fit, or the chosen backend cannot run.
            TypeError: if an argument has the wrong type.
            ValueError: if a dtype or the number of dimensions of the input is wrong.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, detach_mask, reset, generator)
        check_sequence("RelLSTM", input)
        if input.dim() not in (2, 3):
            raise ValueError(f"RelLSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        _check_kind(hx)
        if not batched:
            input = input.unsqueeze(1)
            if isinstance(hx, (tuple, list)) and all(x.dim() == 2 for x in hx):
                hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        first = batched and self.batch_first
        if first:
            input = input.transpose(0, 1)
        self._check_input(input)
        length, batch, _ = input.shape
        self._check_states(hx, batch)
        detach_masks = self._masks(
            detach_mask, self.num_layers, length, batch, training=self.training,
            device=input.device, generator=generator, batch_first=first,
        )  # fmt: skip
        sizes = Sizes("RelLSTM", self.num_layers, length, batch, ())
        starts = episodes(reset, None, sizes, batch_first=first, batched=batched)
        output, state = self._run(input, self._per_layer(hx), detach_masks, starts.reset, None)
        if not batched:
            return output.squeeze(1), state
        return output.transpose(0, 1) if first else output, state

    if TYPE_CHECKING:  # a call has forward's types; nn.Module declares Any
        __call__ = forward

    def _forward_packed(
        self,
        packed: PackedSequence,
        hx: RelState | States | None,
        detach_mask: Tensor | None,
        reset: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[PackedSequence, RelState]:
        check_packed("RelLSTM", packed)
        self._check_input(packed.data.unsqueeze(1))
        length, batch = packed.batch_sizes.size(0), int(packed.batch_sizes[0])
        _check_kind(hx)
        self._check_states(hx, batch)  # before sorting, which would hide a batch that is too large
        order = packed.sorted_indices
        detach_masks = self._masks(
            detach_mask, self.num_layers, length, batch, training=self.training,
            device=packed.data.device, generator=generator, order=order,
        )  # fmt: skip
        starts = episodes(reset, None, Sizes("RelLSTM", self.num_layers, length, batch, ()))
        if order is not None:
            if isinstance(hx, RelState):
                hx = hx.index_select(order)
            elif hx is not None:
                hx = (hx[0].index_select(1, order), hx[1].index_select(1, order))
            starts = starts.index_select(order)
        padded, lengths = unpack(packed)
        output, state = self._run(padded, self._per_layer(hx), detach_masks, starts.reset, lengths)
        if packed.unsorted_indices is not None:
            state = state.index_select(packed.unsorted_indices)
        return repack(output, lengths, like=packed), state

    def _run(
        self,
        x: Tensor,
        hx: Sequence[RelState | States | None],
        detach_masks: Sequence[Tensor | None],
        reset: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, RelState]:
        states = []
        for layer in range(self.num_layers):
            # Every call reads the attributes: functional_call and parametrizations replace them.
            x, state = functional.rel_lstm(
                x,
                hx[layer],
                getattr(self, f"weight_ih_l{layer}"),
                getattr(self, f"weight_hh_l{layer}"),
                getattr(self, f"bias_ih_l{layer}") if self.bias else None,
                getattr(self, f"bias_hh_l{layer}") if self.bias else None,
                getattr(self, f"weight_query_l{layer}"),
                getattr(self, f"weight_key_l{layer}"),
                getattr(self, f"weight_score_l{layer}"),
                self.window_size,
                self.top_k,
                cell=self.cell,
                retain=self.retain,
                detach_mask=detach_masks[layer],
                lengths=lengths,
                reset=reset,
                backend=self.backend,
            )
            states.append(state)
            if self.training and self.dropout > 0 and layer < self.num_layers - 1:
                x = dropout(x, self.dropout, lengths)
        return x, RelState.stack(states)

    def _per_layer(self, hx: RelState | States | None) -> Sequence[RelState | States | None]:
        if hx is None:
            return [None] * self.num_layers
        if isinstance(hx, RelState):
            return hx.unstack()
        return list(zip(hx[0], hx[1], strict=True))

    def _check_states(self, hx: RelState | States | None, batch: int) -> None:
        """Check the sizes; the rest is checked per layer."""
        if isinstance(hx, RelState):
            check_state_sizes("RelLSTM", hx, (self.num_layers,), batch, self.hidden_size)
        elif hx is not None:
            wanted = (self.num_layers, batch, self.hidden_size)
            for k, x in enumerate(hx):
                if tuple(x.shape) != wanted:
                    raise RuntimeError(f"Expected hidden[{k}] size {wanted}, got {list(x.shape)}")

    def _check_input(self, input: Tensor) -> None:
        weight = self.weight_hh_l0
        if functional.autocast_dtype(input) is None:
            check_weight_dtype(input, weight)
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "window_size": None,
            "top_k": 0,
            "attention_size": self.hidden_size,
            "cell": "lstm",
            "retain": "relevant",
            "detach_prob": 0.0,
            "detach_shared": False,
            "backend": "auto",
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default or name == "top_k":
                text += f", {name}={value!r}"
        return text


def _check_kind(hx: object) -> None:
    """Check that ``hx`` is None, a RelState or a pair of tensors."""
    if not isinstance(hx, RelState):
        check_pair("RelLSTM", hx, "a RelState, ")
