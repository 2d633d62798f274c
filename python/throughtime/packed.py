"""PackedSequence to padded ``[T, B, ...]`` with lengths and back, in the packed batch's order."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def check_packed(op: str, sequence: PackedSequence) -> None:
    """Check the parts of a PackedSequence, which a caller may have made by hand.

    The values of a tensor on another device are not checked: reading them would stall the device.

    Raises:
        RuntimeError: if ``batch_sizes`` or an order of the samples cannot belong to ``data``.
        TypeError: if one of them is no tensor.
    """
    data, batch_sizes, there, back = sequence
    for name, tensor in (("data", data), ("batch_sizes", batch_sizes)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} should be a Tensor, got {type(tensor).__name__}")
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or not batch_sizes.is_cpu:
        raise RuntimeError(
            f"{op}: batch_sizes of a packed sequence should be int64 [T] on the CPU, got "
            f"{batch_sizes.dtype} {list(batch_sizes.shape)} on {batch_sizes.device}"
        )
    rows = data.shape[0] if data.dim() > 0 else 0
    if batch_sizes.numel() > rows:  # one is not positive, or the tensor is expanded
        raise RuntimeError(
            f"{op}: batch_sizes of a packed sequence should be positive and sum up to the {rows} "
            f"rows of data, got {batch_sizes.numel()} of them"
        )
    sizes = batch_sizes.tolist()
    falling = all(size >= after for size, after in pairwise(sizes))
    if not sizes or sizes[-1] < 1 or not falling or sum(sizes) != rows:
        raise RuntimeError(
            f"{op}: batch_sizes of a packed sequence should be positive, never rise, and sum up to "
            f"the {rows} rows of data, got {_shown(sizes)}; make it by "
            "pack_padded_sequence or pack_sequence"
        )
    for name, order in (("sorted_indices", there), ("unsorted_indices", back)):
        if order is not None:
            _check_order(op, name, order, sizes[0])
    if there is None or back is None or not (there.is_cpu and back.is_cpu):
        return
    if there[back].tolist() != list(range(sizes[0])):
        raise RuntimeError(
            f"{op}: unsorted_indices of a packed sequence should undo sorted_indices, got "
            f"{_shown(back.tolist())} after {_shown(there.tolist())}"
        )


def _check_order(op: str, name: str, order: Tensor, batch: int) -> None:
    if not isinstance(order, Tensor):
        raise TypeError(f"{op}: {name} should be a Tensor, got {type(order).__name__}")
    got = f"{order.dtype} {list(order.shape)}"
    if order.dtype == torch.int64 and tuple(order.shape) == (batch,):
        if not order.is_cpu or sorted(order.tolist()) == list(range(batch)):
            return
        got = _shown(order.tolist())
    raise RuntimeError(
        f"{op}: {name} of a packed sequence should be int64 [{batch}], a permutation of its "
        f"{batch} samples, got {got}"
    )


def _shown(values: list[int]) -> str:
    return f"[{', '.join(map(str, values[:8]))}{', ...' if len(values) > 8 else ''}]"


def unpack(sequence: PackedSequence) -> tuple[Tensor, Tensor]:
    """Pad a packed sequence and keep its batch sorted.

    Args:
        sequence: packed batch of B sequences, the longest of length T.

    Returns:
        ``(padded [T, B, ...], lengths int64 [B])``, longest sequence first, lengths on the CPU.

    Example:
        >>> import torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> packed = pack_sequence([torch.ones(1, 2), torch.ones(3, 2)], enforce_sorted=False)
        >>> padded, lengths = unpack(packed)
        >>> assert padded.shape == (3, 2, 2) and lengths.tolist() == [3, 1]
    """
    # Without indices pad_packed_sequence keeps the batch sorted, and so makes no second copy.
    return pad_packed_sequence(PackedSequence(sequence.data, sequence.batch_sizes))


def repack(padded: Tensor, lengths: Tensor, like: PackedSequence) -> PackedSequence:
    """Pack ``padded [T, B, ...]``, longest sequence first, into the layout of ``like``.

    Example:
        >>> import torch
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> packed = pack_sequence([torch.ones(1, 2), torch.ones(3, 2)], enforce_sorted=False)
        >>> again = repack(*unpack(packed), like=packed)
        >>> assert torch.equal(again.data, packed.data)
    """
    data = pack_padded_sequence(padded, lengths).data
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)


def dropout(padded: Tensor, probability: float, lengths: Tensor | None) -> Tensor:
    """Dropout of ``[T, B, ...]`` that draws what ``nn.LSTM`` draws for the same input.

    A packed sequence has no padding, so nothing is drawn for it.

    Args:
        padded: ``[T, B, ...]``, longest sequence first if there are lengths.
        probability: of zeroing a number.
        lengths: int64 ``[B]`` on the CPU, of which the first is T; None if the input is not packed.

    Example:
        >>> import torch
        >>> padded, lengths = torch.ones(3, 2, 1), torch.tensor([3, 1])
        >>> dropped = dropout(padded, 0.5, lengths)
        >>> assert set(dropped.flatten().tolist()) <= {0.0, 2.0} and not dropped[1:, 1].any()
    """
    if lengths is None:
        return F.dropout(padded, probability)
    packed = pack_padded_sequence(padded, lengths)
    data = F.dropout(packed.data, probability)
    return unpack(PackedSequence(data, packed.batch_sizes))[0]
