"""``throughtime.LSTM``: ``torch.nn.LSTM`` with h-detach, episode resets and a choice of backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import LSTM as TorchLSTM  # nn.LSTM, whatever a program made of that name
from torch.nn.utils.rnn import PackedSequence

from throughtime import functional, masks
from throughtime.backends.backend import BackendName, Request
from throughtime.backends.selection import check_name
from throughtime.functional.checks import check_flag, check_pair, check_sequence, check_weight_dtype
from throughtime.functional.lstm import Weights
from throughtime.init import forget_bias_
from throughtime.nn.backend import BackendChoice
from throughtime.nn.episodes import Episodes, Sizes, episodes
from throughtime.nn.h_detach import HDetach
from throughtime.nn.stacked import States, run, run_thin
from throughtime.packed import check_packed, repack, unpack

_Layer = TypeVar("_Layer", bound=nn.RNNBase)
_Sequence = TypeVar("_Sequence", Tensor, PackedSequence)


class LSTM(BackendChoice, HDetach, nn.RNNBase):
    r"""A multi-layer LSTM with h-detach: at random steps no gradient passes through ``h``.

    Constructor, parameters, shapes, states, outputs, errors and ``state_dict`` are those of
    :class:`torch.nn.LSTM`. Only the gradient can differ. In training, each step is detached with
    probability ``detach_prob``: no gradient passes through ``h_{t-1}`` into the gates of a detached
    step. The gradient through the cell state always passes.

    The layer draws one mask ``[T]`` per layer and direction, and the batch shares it. It draws
    none, and leaves the random state alone, if ``detach_prob`` is 0, in ``eval()``, under
    ``no_grad``, or if a mask is given. Inside ``torch.utils.checkpoint`` use
    ``use_reentrant=False``: the reentrant form draws the same mask at every call.

    Args:
        input_size: I, features of the input, > 0.
        hidden_size: H, features of the hidden state, > 0.
        num_layers: number of stacked layers L.
        bias: False leaves out both bias vectors.
        batch_first: input, output, masks and resets have the batch first, ``[B, T, *]``; states
            stay as they are.
        dropout: probability in [0, 1] of zeroing an output of each layer but the last, in training.
        bidirectional: adds a second direction (D = 2, otherwise 1).
        proj_size: P > 0 projects the hidden state to P < H features.
        device: device of the parameters.
        dtype: floating point type of the parameters.
        detach_prob: probability in [0, 1] of detaching a step. It may change at any time, for
            example by :class:`throughtime.DetachSchedule`.
        detach_shared: True draws one mask for all layers and directions, instead of one each.
        forget_bias: the bias of new forget gates, a finite number; None leaves ``nn.LSTM``'s. See
            :func:`throughtime.init.forget_bias_`.
        recompute: True computes the gates again in the backward pass, for less memory; see
            :func:`throughtime.functional.lstm`. It may change at any time.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``. Any name but
            ``"auto"`` runs or raises.

    Raises:
        RuntimeError: if the chosen backend can never run this layer.
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.

    Example:
        >>> import torch, throughtime
        >>> lstm = throughtime.LSTM(10, 20, num_layers=2, detach_prob=0.25)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> assert output.shape == (5, 3, 20) and h_n.shape == c_n.shape == (2, 3, 20)
        >>> mask = torch.tensor([True, False, True, False, False])
        >>> output, _ = lstm(torch.randn(5, 3, 10), detach_mask=mask)
        >>> output.sum().backward()

    Source: Kanuparthi et al., ICLR 2019, arXiv 1810.03023, Algorithm 1.
    """

    detach_shared: bool
    forget_bias: float | None = None
    recompute = False
    weight_ih_l0: Tensor
    weight_hh_l0: Tensor

    # Subclasses of nn.LSTM call these; they need no more than an RNNBase has.
    get_expected_cell_size = TorchLSTM.get_expected_cell_size
    check_forward_args = TorchLSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = TorchLSTM.permute_hidden  # type: ignore[assignment]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        detach_prob: float = 0.0,
        detach_shared: bool = False,
        forget_bias: float | None = None,
        recompute: bool = False,
        backend: BackendName = "auto",
    ) -> None:
        masks.check_probability(detach_prob, "detach_prob")
        check_flag("detach_shared", detach_shared)
        check_flag("recompute", recompute)
        check_name(backend)
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.detach_prob = detach_prob
        self.detach_shared = detach_shared
        self.recompute = recompute
        self.backend = backend
        if forget_bias is not None:
            self.forget_bias = forget_bias
            forget_bias_(self, forget_bias)

    def reset_parameters(self) -> None:
        """Draw new weights as ``nn.LSTM`` does, but with ``forget_bias`` where it is given."""
        super().reset_parameters()
        if self.forget_bias is not None:
            forget_bias_(self, self.forget_bias)

    def backend_request(self) -> Request:
        weight = self.weight_hh_l0
        return Request("lstm", self.hidden_size, self.proj_size, weight.device, weight.dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # Pickles of an older version lack these attributes.
        added = {"_detach_prob": 0.0, "detach_shared": False, "_backend": "auto"}
        for name, default in added.items():
            self.__dict__.setdefault(name, default)

    @classmethod
    def from_torch(
        cls,
        module: nn.LSTM,
        *,
        detach_prob: float = 0.0,
        detach_shared: bool = False,
        recompute: bool = False,
        backend: BackendName = "auto",
    ) -> LSTM:
        """Make an independent LSTM with the options and a copy of the weights of an ``nn.LSTM``.

        The copy has the same device, dtype, ``requires_grad`` and training flag, but no hooks. It
        needs a new optimizer; :func:`throughtime.replace` converts a layer without a copy.

        Args:
            module: the layer to copy.
            detach_prob: as in the constructor.
            detach_shared: as in the constructor.
            recompute: as in the constructor.
            backend: as in the constructor.

        Returns:
            A new layer.

        Raises:
            TypeError: if ``module`` is no ``nn.LSTM``.

        Example:
            >>> import torch, throughtime
            >>> old = torch.nn.LSTM(3, 4)
            >>> new = throughtime.LSTM.from_torch(old, detach_prob=0.5)
            >>> new.load_state_dict(old.state_dict())
            <All keys matched successfully>
        """
        if not isinstance(module, TorchLSTM):
            raise TypeError(f"module should be a torch.nn.LSTM, got {type(module).__name__}")
        made = cls(
            **_options(module),
            device="meta",
            detach_prob=detach_prob,
            detach_shared=detach_shared,
            recompute=recompute,
            backend=backend,
        )
        return _copy_weights(module, made)

    def to_torch(self) -> nn.LSTM:
        """Make an independent ``nn.LSTM`` with the options and a copy of the weights of this layer.

        Returns:
            A new layer with the same device, dtype, ``requires_grad`` and training flag. It has no
            h-detach.

        Example:
            >>> import torch, throughtime
            >>> lstm = throughtime.LSTM(3, 4).eval()
            >>> assert torch.equal(lstm.to_torch().weight_hh_l0, lstm.weight_hh_l0)
        """
        return _copy_weights(self, TorchLSTM(**_options(self), device="meta"))

    @overload
    def forward(
        self,
        input: _Sequence,
        hx: States | None = None,
        *,
        detach_mask: Tensor | None = None,
        reset: Tensor | None = None,
        reset_hx: States | None = None,
        generator: torch.Generator | None = None,
        return_cells: Literal[False] = False,
    ) -> tuple[_Sequence, States]: ...

    @overload
    def forward(
        self,
        input: _Sequence,
        hx: States | None = None,
        *,
        detach_mask: Tensor | None = None,
        reset: Tensor | None = None,
        reset_hx: States | None = None,
        generator: torch.Generator | None = None,
        return_cells: Literal[True],
    ) -> tuple[_Sequence, States, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        detach_mask: Tensor | None = None,
        reset: Tensor | None = None,
        reset_hx: States | None = None,
        generator: torch.Generator | None = None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]:
        """Run all layers.

        Masks and resets have the layout of the input: with ``batch_first`` the batch comes before
        the steps. For a PackedSequence the steps come first, t is the position in the sample's own
        sequence and T the longest length; the batch order of masks, resets and states is the order
        in which ``pack_sequence`` got the sequences.

        Args:
            input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, ``[T, I]``, or packed.
            hx: ``(h_0 [L * D, B, H or P], c_0 [L * D, B, H])``, without B if the input has none;
                zeros if None.
            detach_mask: bool ``[T]`` or ``[T, B]`` for all layers and directions, or
                ``[L * D, T, 1 or B]``; with ``batch_first`` ``[B, T]`` or ``[L * D, 1 or B, T]``.
                It is used as given, also in ``eval()``. None: the layer draws one if
                ``detach_prob`` asks for it.
            reset: ``[T, B]`` or ``[T, B, 1]``; with ``batch_first`` ``[B, T]`` or ``[B, T, 1]``;
                for unbatched input ``[T]``. True, or 1 in any other dtype, where a new episode
                starts. The state starts anew before that step, and in the reverse direction after
                it, so neither direction carries state from one episode into another.
            reset_hx: ``(h, c)``, from which the state starts anew; zeros if None. Each is
                broadcastable to ``[L * D, T, B, H or P]`` and ``[L * D, T, B, H]``, with
                ``batch_first`` ``[L * D, B, T, *]``, without B if the input has none. Entry t is
                read where ``reset`` is set at t. It has a gradient.
            generator: random generator for the mask, on the input's device.
            return_cells: True gives the cell state of every step too, with its gradient. Backends
                ``"cpu"`` and ``"reference"`` do.

        Returns:
            ``(output, (h_n, c_n))``, shaped like those of ``nn.LSTM``. With ``return_cells`` a
            third, ``cells [L * D, T, B, H]``, with ``batch_first`` ``[L * D, B, T, H]``, without B
            if the input has none. For a PackedSequence it is padded: ``[L * D, T, B, H]``, zero
            past a sample's length, in the batch order of the states.

        Raises:
            RuntimeError: if a size or a device does not fit, or the chosen backend cannot run.
            TypeError: if the input, a state or a mask is no tensor.
            ValueError: if a dtype or the number of dimensions of the input is wrong.
        """
        check_flag("return_cells", return_cells)
        cells: list[Tensor] | None = [] if return_cells else None
        if hx is not None and detach_mask is None and reset_hx is None and cells is None:
            found = run_thin(self, input, hx, reset)
            if found is not None:
                return found
        check_pair("LSTM", hx)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, detach_mask, reset, reset_hx, generator, cells)
        check_sequence("LSTM", input)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if hx is not None:
            _check_state_dims(hx, batched)
        if not batched:
            input = input.unsqueeze(1)
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        first = batched and self.batch_first
        if first:
            input = input.transpose(0, 1)
        self._check_input(input, 3)
        length, batch, _ = input.shape
        self._check_states(hx, batch)
        starts = self._episodes(reset, reset_hx, length, batch, batch_first=first, batched=batched)
        detach_masks = self._masks(
            detach_mask, self._count, length, batch, training=self.training,
            device=input.device, generator=generator, batch_first=first,
        )  # fmt: skip
        output, (h_n, c_n) = run(self, input, hx, detach_masks, starts, None, cells)
        more = [] if cells is None else [torch.stack(cells)]
        if not batched:
            more = [x.squeeze(2) for x in more]
            return output.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1)), *more
        if first:
            output, more = output.transpose(0, 1), [x.transpose(1, 2) for x in more]
        return output, (h_n, c_n), *more

    if TYPE_CHECKING:  # a call has forward's types; nn.Module declares Any
        __call__ = forward

    def _forward_packed(
        self,
        packed: PackedSequence,
        hx: States | None,
        detach_mask: Tensor | None,
        reset: Tensor | None,
        reset_hx: States | None,
        generator: torch.Generator | None,
        cells: list[Tensor] | None,
    ) -> tuple[Any, ...]:
        check_packed("LSTM", packed)
        self._check_input(packed.data, 2)
        length, batch = packed.batch_sizes.size(0), int(packed.batch_sizes[0])
        self._check_states(hx, batch)
        starts = self._episodes(reset, reset_hx, length, batch)
        order = packed.sorted_indices
        detach_masks = self._masks(
            detach_mask, self._count, length, batch, training=self.training,
            device=packed.data.device, generator=generator, order=order,
        )  # fmt: skip
        if order is not None:
            hx = None if hx is None else _permute(hx, order)
            starts = starts.index_select(order)
        padded, lengths = unpack(packed)
        starts = starts.within(lengths)
        output, states = run(self, padded, hx, detach_masks, starts, lengths, cells)
        more = [] if cells is None else [torch.stack(cells)]
        if packed.unsorted_indices is not None:
            states = _permute(states, packed.unsorted_indices)
            more = [x.index_select(2, packed.unsorted_indices) for x in more]
        return repack(output, lengths, like=packed), states, *more

    @property
    def _count(self) -> int:
        """Layers times directions."""
        return self.num_layers * (2 if self.bidirectional else 1)

    def _weights(self, layer: int, direction: int) -> Weights:
        """The weights of one layer and direction, in the order of ``functional.lstm``.

        Every call reads the attributes: functional_call, parametrizations and weight-drop replace
        them, and do not update RNNBase's cached list.
        """
        suffix = f"l{layer}_reverse" if direction else f"l{layer}"
        return (
            getattr(self, f"weight_ih_{suffix}"),
            getattr(self, f"weight_hh_{suffix}"),
            getattr(self, f"bias_ih_{suffix}") if self.bias else None,
            getattr(self, f"bias_hh_{suffix}") if self.bias else None,
            getattr(self, f"weight_hr_{suffix}") if self.proj_size > 0 else None,
        )

    def _episodes(
        self,
        reset: Tensor | None,
        reset_hx: States | None,
        length: int,
        batch: int,
        *,
        batch_first: bool = False,
        batched: bool = True,
    ) -> Episodes:
        features = (self.proj_size or self.hidden_size, self.hidden_size)
        sizes = Sizes("LSTM", self._count, length, batch, features)
        return episodes(reset, reset_hx, sizes, batch_first=batch_first, batched=batched)

    def _check_input(self, input: Tensor, dims: int) -> None:
        weight = self.weight_ih_l0
        if functional.autocast_dtype(input) is None:
            check_weight_dtype(input, weight)
        if input.dim() != dims:
            raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )

    def _check_states(self, hx: States | None, batch: int) -> None:
        if hx is None:
            return
        for k, size in enumerate((self.proj_size or self.hidden_size, self.hidden_size)):
            self.check_hidden_size(
                hx[k], (self._count, batch, size), f"Expected hidden[{k}] size {{}}, got {{}}"
            )

    def extra_repr(self) -> str:
        text: str = super().extra_repr()
        if self.detach_prob != 0:
            text += f", detach_prob={self.detach_prob}"
        if self.detach_shared:
            text += ", detach_shared=True"
        if self.recompute:
            text += ", recompute=True"
        if self.backend != "auto":
            text += f", backend={self.backend!r}"
        return text


def _check_state_dims(hx: States, batched: bool) -> None:
    dims = 3 if batched else 2
    if hx[0].dim() != dims or hx[1].dim() != dims:
        raise RuntimeError(
            f"For {'batched' if batched else 'unbatched'} {dims}-D input, hx and cx should "
            f"also be {dims}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
        )


def _permute(states: States, order: Tensor) -> States:
    return states[0].index_select(1, order), states[1].index_select(1, order)


def _options(module: nn.RNNBase) -> dict[str, Any]:
    """The constructor arguments that nn.LSTM and LSTM share, except device and dtype."""
    names = (
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    )
    return {name: getattr(module, name) for name in names}


def _copy_weights(source: nn.RNNBase, target: _Layer) -> _Layer:
    for name in target.state_dict():
        weight = getattr(source, name)
        copied = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        setattr(target, name, copied)
    return target.train(source.training)
