"""Networks and data for the monitor."""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

NAMED = {"0": "2"}  # the layers of `problem`, named so that select need not search for them


class Augmented(Dataset):
    """Images that every access augments, with random numbers from torch, Python and NumPy."""

    def __init__(self, samples: int = 48) -> None:
        sampler = torch.Generator().manual_seed(3)
        self.images = torch.randn(samples, 1, 8, 8, generator=sampler)
        self.labels = torch.randint(3, (samples,), generator=sampler)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = self.images[i] + 0.1 * torch.randn(1, 8, 8)
        if random.random() < 0.5:
            image = image.flip(-1)
        return image.roll(int(np.random.randint(-1, 2)), -1), self.labels[i]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 3)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2),
        nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def problem(loss: str = "cross_entropy", units: int = 16) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, units), nn.ReLU(), nn.Linear(units, 3))
        x = torch.randn(80, 5)
        y = {
            "cross_entropy": torch.randint(3, (80,)),
            "mse": torch.randn(80, 3),
            "bce_with_logits": torch.randint(2, (80, 3)).float(),
        }[loss]
        return model, x, y
