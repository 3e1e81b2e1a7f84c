"""Sequences of different lengths, padded or by themselves, and a small network that masks them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LENGTHS = (3, 7, 5, 8, 4, 6, 8, 3, 5, 7, 6, 4)
WIDTH, CLASSES = 12, 5


class Tagger(nn.Module):
    """Attention over the shown positions, a feed-forward layer, and outputs for each position.

    pooled: outputs for each sequence instead
    """

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        self.embed, self.pooled = nn.Embedding(50, WIDTH), pooled
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.hidden, self.head = nn.Linear(WIDTH, 14), nn.Linear(14, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        shown = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        scores = scores + torch.where(shown[:, None, :] > 0, 0.0, -1e9)
        x = x + scores.softmax(-1) @ x
        x = x + self.down(self.up(x).relu())
        if self.pooled:
            total = (x * shown[..., None]).sum(1)
            x = total / shown.sum(1, keepdim=True).clamp(min=1)
        return self.head(self.hidden(x).relu())


def tagger(*, pooled: bool = False) -> Tagger:
    torch.manual_seed(0)
    model = Tagger(pooled=pooled).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def sequences(classes: int = CLASSES) -> list[dict[str, Tensor]]:
    """Each sequence by itself, unpadded, with a label for each of its tokens."""
    torch.manual_seed(1)
    return [
        {
            "input_ids": torch.randint(1, 50, (1, n)),
            "attention_mask": torch.ones(1, n, dtype=torch.int64),
            "labels": torch.randint(classes, (1, n)),
        }
        for n in LENGTHS
    ]


def padded(
    alone: list[dict[str, Tensor]], fill: str, *, left: bool = False, length: int = 10
) -> list[dict[str, Tensor]]:
    """The same sequences at one length, each in a batch of its own.

    fill: what stands in hidden positions: "zeros" or "noise"; their labels are noise, too
    """
    torch.manual_seed(2)
    batches = []
    for sequence in alone:
        count = sequence["input_ids"].shape[1]
        at = slice(length - count, length) if left else slice(0, count)
        ids = torch.zeros(1, length, dtype=torch.int64)
        if fill == "noise":
            ids = torch.randint(1, 50, (1, length))
        mask, labels = torch.zeros_like(ids), torch.randint(CLASSES, (1, length))
        ids[:, at], mask[:, at], labels[:, at] = sequence["input_ids"], 1, sequence["labels"]
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def together(batches: list[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    """Padded sequences, `count` in a batch."""
    return [
        {name: torch.cat([b[name] for b in batches[i : i + count]]) for name in batches[0]}
        for i in range(0, len(batches), count)
    ]


def hidden_batch() -> dict[str, Tensor]:
    """Four sequences without any token."""
    batch = together(padded(sequences(), "noise"), 4)[0]
    return batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}
