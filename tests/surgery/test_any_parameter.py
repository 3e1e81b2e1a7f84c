"""Linear maps by parameters of any name, and what modules with such parameters do afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import close
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune.surgery.cut import masked

Forward = Callable[["Maps", Tensor], Tensor]


class Maps(nn.Module):
    """Parameters of many names, and any forward."""

    def __init__(self, run: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run, self.first, self.last = run, nn.Linear(8, 16), nn.Linear(12, 3)
        self.weight = nn.Parameter(torch.randn(12, 16))
        self.table, self.shift = nn.Parameter(torch.randn(16, 12)), nn.Parameter(torch.randn(12))
        self.twin = self.weight
        self.several = nn.ParameterList([nn.Parameter(torch.randn(12, 16))])
        self.kernel = nn.Parameter(torch.randn(12, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self, self.first(x).relu()).relu())


MAPS: dict[str, tuple[Forward, str]] = {
    "weight of the root": (lambda m, h: functional.linear(h, m.weight), "weight"),
    "inputs first": (lambda m, h: h @ m.table + m.shift, "table"),
    "a bias of another name": (lambda m, h: functional.linear(h, m.weight, m.shift), "weight"),
    "two names": (lambda m, h: functional.linear(h, m.twin), "weight"),
    "in a list": (lambda m, h: functional.linear(h, m.several[0]), "several.0"),
    "rows": (
        lambda m, h: torch.cat([functional.linear(h, m.weight[:6], m.shift[:6]),
                                functional.linear(h, m.weight[6:])], -1),
        "weight",
    ),
    "a kernel": (
        lambda m, h: functional.conv1d(h.transpose(1, 2), m.kernel, m.shift).transpose(1, 2),
        "kernel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAPS)
def test_a_layer_has_its_parameters_name(kind: str, tmp_path: Path) -> None:
    run, name = MAPS[kind]
    model, x = Maps(run).double().eval(), torch.randn(64, 5, 8).double()
    assert name in greedyprune.layers(model, x) or kind == "rows"  # its sizes are in the code
    selection = greedyprune.select(
        model, x, size=0.5, weights="none", objective="imitation", progress=False
    )
    small = greedyprune.prune(model, selection)
    assert close(small(x), masked(model, selection)(x), 1e-12)
    greedyprune.save_pruned(small, tmp_path / "small.safetensors")
    again = greedyprune.load_pruned(tmp_path / "small.safetensors", lambda: Maps(run).double())
    assert again(x).equal(small(x))
    refitted = greedyprune.refit(model, selection, x, progress=False)
    assert (refitted(x) - model(x)).norm() < (small(x) - model(x)).norm()


def test_a_permutation_that_changes_nothing_is_no_transposition() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Turned(), nn.Linear(8, 3))
    reason = greedyprune.layers(model, torch.randn(30, 8)).refused["0"]
    assert reason == "aten.matmul.default sums over its units"


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.permute(0, 1)


def test_one_sample_through_a_depthwise_kernel_is_refused() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 1)
            self.kernel = nn.Parameter(torch.randn(8, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x[0]).relu()
            return self.last(functional.conv2d(hidden, self.kernel[:, None], groups=8))

    refused = greedyprune.layers(Single(), torch.randn(1, 3, 9, 9)).refused
    assert refused["first"].endswith("its weight is no parameter")


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.last = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        hidden[:, :2] = self.other(x)[:, :2]
        hidden[:, -1].mul_(2)
        return self.last(hidden)


def test_the_pruned_network_is_trained_through_tensors_that_are_written_in_part() -> None:
    torch.manual_seed(0)
    model, x = Written().eval(), torch.randn(200, 5, 8)
    selection = greedyprune.select(model, x, size=8, objective="imitation", progress=False)
    small = greedyprune.prune(model, selection)
    trained = greedyprune.refit(model, selection, x, epochs=3, progress=False)
    assert (trained(x) - model(x)).norm() < (small(x) - model(x)).norm()
