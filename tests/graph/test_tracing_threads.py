"""torch.export in several threads: one trace at a time."""

from __future__ import annotations

import threading

import torch
from torch import nn

import greedyprune


def network(seed: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(128, 9)).eval(), torch.randn(16, 3, 8, 8)


def test_threads_select_on_models_of_their_own() -> None:
    models = [network(seed) for seed in range(4)]
    expected = [greedyprune.select(*model, progress=False) for model in models]
    again = [network(seed) for seed in range(4)]
    selected: dict[int, greedyprune.Selection] = {}
    together = threading.Barrier(len(models))

    def select(i: int) -> None:
        together.wait(10)
        selected[i] = greedyprune.select(*again[i], progress=False)

    threads = [threading.Thread(target=select, args=[i]) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, selection in enumerate(expected):
        for name, layer in selection.layers.items():
            assert selected[i].layers[name].order.equal(layer.order)
