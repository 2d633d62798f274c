"""RelLSTM with the structure of its authors' code: a Python loop over steps, and over samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import throughtime


class AuthorsRelLSTM(throughtime.RelLSTM):
    """``throughtime.RelLSTM``: one LSTM layer that starts from zeros, ``retain="relevant"``.

    Window and retained set are lists of tensors. Every step computes the keys of all of them, and
    every sample updates its retained set by itself.

    Source: Kerg, Kanuparthi et al., NeurIPS 2020 (arXiv 2006.09471), the structure of their code.
    """

    def forward(self, input: Tensor, *, detach_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """Input ``[T, B, I]``, mask bool ``[T]`` -> output ``[T, B, H]``."""
        steps, batch, _ = input.shape
        detached = [False] * steps if detach_mask is None else detach_mask.tolist()
        h = c = s = input.new_zeros(batch, self.hidden_size)
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
            gates = F.linear(x, self.weight_ih_l0, self.bias_ih_l0) + F.linear(
                s, self.weight_hh_l0, self.bias_hh_l0
            )
            i, f, g, o = gates.chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            window.append(h)
            relevance.append(h.new_zeros(batch))
            outputs.append(h)
        return torch.stack(outputs), None

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
        self, state: Tensor, relevance: Tensor,
        kept: list[list[Tensor]], kept_relevance: list[list[float]],
    ) -> None:  # fmt: skip
        """Keep a state that leaves the window if there is room or a less relevant one."""
        top_k = self.top_k
        for sample, value in enumerate(relevance.tolist()):
            own, values = kept[sample], kept_relevance[sample]
            if top_k is not None and len(own) == top_k:
                # The least relevant; among equals the newest.
                least = min(range(top_k), key=lambda k: (values[k], -k), default=None)
                if least is None or value <= values[least]:
                    continue
                del own[least], values[least]
            own.append(state[sample])
            values.append(value)
