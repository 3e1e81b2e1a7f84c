"""Recurrent networks, small: what carries hidden units in taggers, classifiers and translators."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Tagger(nn.Module):
    """A label for each token: two layers in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 12), nn.Linear(24, 5)
        self.lstm = nn.LSTM(12, 12, 2, bidirectional=True, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


class Reader(nn.Module):
    """A class for each sequence, from the last states; the sequence comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(30, 12), nn.GRU(12, 12, 2, bias=False)
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        _, states = self.gru(self.embed(tokens).transpose(0, 1))
        return self.last(self.first(states[-1]).relu())


class Recurrent(nn.Module):
    """An encoder that passes its states on to a decoder, which runs once for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(30, 12), nn.Embedding(30, 10)
        self.encoder = nn.LSTM(12, 14, 2, batch_first=True)
        self.decoder = nn.LSTM(10, 14, 2, batch_first=True)
        self.cell, self.head = nn.GRUCell(14, 12), nn.Linear(12, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        _, states = self.encoder(self.source(tokens[:, :4]))
        hidden, outputs = None, []
        for token in self.target(tokens[:, 4:]).split(1, 1):
            output, states = self.decoder(token, states)
            hidden = self.cell(output[:, 0], hidden)
            outputs.append(self.head(hidden))
        return torch.stack(outputs, 1)


class StateSpace(nn.Module):
    """Mamba: a depthwise convolution whose weight is a view, and a scan of states for each unit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.head = nn.Embedding(30, 8), nn.Linear(8, 32), nn.Linear(16, 5)
        self.conv = nn.Conv1d(16, 16, 3, groups=16)
        self.steps, self.states = nn.Linear(2, 16), nn.Linear(16, 2 + 2 * 3, bias=False)
        self.log_rates, self.skip = nn.Parameter(torch.rand(16, 3)), nn.Parameter(torch.rand(16))

    def forward(self, tokens: Tensor) -> Tensor:
        x, gate = self.first(self.embed(tokens)).transpose(1, 2).chunk(2, 1)
        weight = self.conv.weight.view(self.conv.weight.shape[0], 3)
        x = functional.conv1d(
            functional.pad(x, (2, 0)), weight.unsqueeze(1), self.conv.bias, groups=x.shape[1]
        )
        x = functional.silu(x)
        step, taken, given = self.states(x.transpose(1, 2)).split([2, 3, 3], -1)
        step = functional.softplus(self.steps(step)).transpose(1, 2)
        kept = torch.exp(-torch.exp(self.log_rates)[None, :, None] * step[..., None])
        added = step[..., None] * taken[:, None] * x[..., None]
        state, outputs = x.new_zeros(x.shape[0], x.shape[1], 3), []
        for t in range(x.shape[2]):
            state = kept[:, :, t] * state + added[:, :, t]
            outputs.append(torch.matmul(state, given[:, t, :, None])[..., 0])
        y = torch.stack(outputs, -1) + x * self.skip[None, :, None]
        return self.head((y * functional.silu(gate)).transpose(1, 2))
