"""Candidates scored by the loss of a whole network, as `objective="loss"` does in inner layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from cifar import resnet20
from harness import Bench
from torch import Tensor, nn
from torch.nn import functional

from greedyprune.data.batches import Batches
from greedyprune.data.losses import Criterion
from greedyprune.graph.group_reader import groups_in
from greedyprune.graph.groups import Group
from greedyprune.graph.tracing import Graph
from greedyprune.objectives.network import Network
from greedyprune.surgery.cut import scaled_weight

SHARE = 0.5  # the share of a layer's units that is already picked


@dataclass(frozen=True)
class Case:
    layer: str
    images: int = 128
    candidates: int = 8
    table: str = "network"

    def __str__(self) -> str:
        return f"ResNet-20 {self.layer} images={self.images} candidates={self.candidates}"

    @property
    def hows(self) -> list[str]:
        return ["greedyprune", "plain loop"]


CASES = [Case(f"{block}.conv1") for block in (3, 5, 7, 9, 11)]
QUICK = [Case("7.conv1", images=8, candidates=2)]


@lru_cache(maxsize=1)
def problem_of(case: Case) -> tuple[nn.Sequential, Group, tuple[Tensor, Tensor], Network, Tensor]:
    """The model, the layer's group, the data, the network to score with, and the units' factors.

    One forward pass in training mode gives the batch norms their statistics.
    """
    torch.manual_seed(0)
    model = resnet20()
    data = torch.randn(case.images, 3, 32, 32), torch.randint(10, (case.images,))
    model(data[0])
    model.eval().requires_grad_(False)
    graph = Graph(model, (data[0][:2],), {})
    group = groups_in(graph)[case.layer]
    assert isinstance(group, Group)
    batches, criterion = Batches(data, model), Criterion("cross_entropy")
    network = Network(model, batches, criterion, 2**32, lambda source, _: source, traced=True)
    network.stop_before(group.consumer)
    factors = torch.zeros(group.units, dtype=torch.float64)
    factors[: int(SHARE * group.units)] = 1 / SHARE
    return model, group, data, network, factors


def plain_losses(
    model: nn.Module, group: Group, data: tuple[Tensor, Tensor], factors: Tensor, units: list[int]
) -> Tensor:
    """As a user would write it: runs the whole masked network for each candidate."""
    weight = model.get_parameter(f"{group.consumer}.weight")
    dense, at, losses = weight.clone(), group.slices[f"{group.consumer}.weight"], []
    for unit in units:
        each = factors.clone()
        each[unit] += 1 / SHARE
        weight.copy_(scaled_weight(dense, at, each))
        losses.append(functional.cross_entropy(model(data[0]), data[1]))
    weight.copy_(dense)
    return torch.stack(losses)


@pytest.mark.cases(full=CASES, quick=QUICK)
def test_network(bench: Bench, case: Case, how: str) -> None:
    model, group, data, network, factors = problem_of(case)
    units = list(range(group.units - case.candidates, group.units))

    def ours() -> Tensor:
        return network.losses(group, factors, units, 1 / SHARE)

    def plain() -> Tensor:
        return plain_losses(model, group, data, factors, units)

    other, work = (plain, ours) if how == "greedyprune" else (ours, plain)
    expected = other().double()
    bench.time(
        work,
        lambda found: torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0),
    )
