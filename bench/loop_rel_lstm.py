"""RelLSTM as its authors wrote it, in our words: a Python loop over steps, and over samples.

Window and retained set are lists of tensors; at every step the keys of all of them are computed
anew, and every sample's retained set is updated by itself. The peer of ``bench rel-lstm``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import throughtime


class LoopRelLSTM(throughtime.RelLSTM):
    """``throughtime.RelLSTM`` with the forward pass of the authors' code.

    One LSTM layer, a fresh start from zeros, ``retain="relevant"``. Parameters are those of
    ``throughtime.RelLSTM``.

    Source: Kerg, Kanuparthi et al., NeurIPS 2020 (arXiv 2006.09471), the structure of their code.

    Example:
        >>> layer = LoopRelLSTM(3, 4, window_size=2, top_k=2)
        >>> layer(torch.zeros(5, 2, 3))[0].shape
        torch.Size([5, 2, 4])
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    weight_query_l0: Tensor
    weight_key_l0: Tensor
    weight_score_l0: Tensor

    def forward(  # type: ignore[override]
        self, input: Tensor, *, detach_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Input ``[T, B, I]``, mask bool ``[T]`` -> output ``[T, B, H]``."""
        steps, batch, _ = input.shape
        hidden = self.hidden_size
        detached = [False] * steps if detach_mask is None else detach_mask.tolist()
        h = c = s = input.new_zeros(batch, hidden)
        window: list[Tensor] = []  # h of the last steps, [B, H] each
        relevance: list[Tensor] = []  # of the window, [B] each, without gradient
        kept: list[list[Tensor]] = [[] for _ in range(batch)]  # of every sample, [H] each
        kept_relevance: list[list[float]] = [[] for _ in range(batch)]
        outputs = []
        for step, x in enumerate(input.unbind(0)):
            if step > 0:
                context, attention = self._attend(s, window, kept)
                for slot in range(len(window)):
                    relevance[slot] = relevance[slot] + attention[:, slot].detach()
                if len(window) == self.window_size:
                    self._retain(window.pop(0), relevance.pop(0), kept, kept_relevance)
                s = 0.5 * ((h.detach() if detached[step] else h) + context)
            gates = F.linear(x, self.weight_ih_l0, self._bias("ih")) + F.linear(
                s, self.weight_hh_l0, self._bias("hh")
            )
            i, f, g, o = gates.chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            window.append(h)
            relevance.append(h.new_zeros(batch))
            outputs.append(h)
        return torch.stack(outputs), None

    def _bias(self, name: str) -> Tensor | None:
        return getattr(self, f"bias_{name}_l0") if self.bias else None

    def _attend(
        self, s: Tensor, window: list[Tensor], kept: list[list[Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Context ``[B, H]`` and weights ``[B, C]``, the window first."""
        states = torch.stack(window, dim=1)  # [B, W, H]
        if kept[0]:
            retained = torch.stack([torch.stack(own) for own in kept])  # [B, R, H]
            states = torch.cat([states, retained], dim=1)
        query = F.linear(s, self.weight_query_l0).unsqueeze(1)
        scores = torch.tanh(query + F.linear(states, self.weight_key_l0)) @ self.weight_score_l0
        attention = torch.softmax(scores, dim=1)
        return (attention.unsqueeze(2) * states).sum(1), attention

    def _retain(
        self,
        state: Tensor,
        relevance: Tensor,
        kept: list[list[Tensor]],
        kept_relevance: list[list[float]],
    ) -> None:
        """A state that leaves the window joins, replaces the least relevant, or is forgotten."""
        top_k = self.top_k
        for sample, value in enumerate(relevance.tolist()):
            own, values = kept[sample], kept_relevance[sample]
            if top_k is None or len(own) < top_k:
                own.append(state[sample])
                values.append(value)
                continue
            least = min(range(top_k), key=lambda k: (values[k], -k), default=None)
            if least is not None and value > values[least]:
                del own[least], values[least]
                own.append(state[sample])
                values.append(value)
