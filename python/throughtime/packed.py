"""Between PackedSequence and padded [T, B, ...] with lengths, in the order of the packed batch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def unpack(sequence: PackedSequence) -> tuple[Tensor, Tensor]:
    """Pad a packed sequence without undoing its sorting.

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
    # Without indices pad_packed_sequence leaves the batch as it is sorted, and so does not copy it.
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
