"""Recurrent networks, small: what carries hidden units in taggers, classifiers and translators."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
