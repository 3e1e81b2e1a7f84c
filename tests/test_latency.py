"""Latency budgets: what is measured, and how the sizes follow it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from networks import Block, network
from test_budget import count
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import greedyprune
from greedyprune import Budget, latency
from greedyprune.data.batches import Batch
from greedyprune.graph.structure import analyse, find_groups


class Clock:
    """In place of timing: a model takes its FLOPs in nanoseconds, and what no width changes."""

    def __init__(self, rest: float, wrong: float = 0.0) -> None:
        self.rest, self.wrong, self.asked = rest, wrong, 0

    def __call__(
        self,
        models: Sequence[nn.Module],
        batch: Batch,
        modules: Sequence[str] = (),
        deploy: object = None,
    ) -> list[dict[str, float]]:
        self.asked += 1
        by_model = []
        for model in models:
            with FlopCounterMode(display=False) as counter:
                model(*batch.args, **batch.kwargs)
            flops = {name.partition(".")[2]: sum(counts.values())
                     for name, counts in counter.get_flop_counts().items()}  # fmt: skip
            times = {name: float(flops.get(name, 0)) for name in modules}
            small = len(by_model) == 1 and len(models) == 2
            times[""] = counter.get_total_flops() + self.rest + small * self.wrong
            by_model.append(times)
        return by_model


def test_a_latency_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = network("vgg")
    flops = count(model, inputs)["flops"]
    clock = Clock(rest=flops / 4)  # 0.8 of the time is 0.75 of the FLOPs
    monkeypatch.setattr(latency, "medians", clock)
    options = {"objective": "imitation", "weights": "counts"}
    by_time = greedyprune.select(model, [inputs], **options, size=Budget(latency=0.8))
    by_count = greedyprune.select(model, [inputs], **options, size=Budget(flops=0.75))
    assert clock.asked == 3
    for name, layer in by_count.layers.items():
        assert len(layer.kept) == len(by_time.layers[name].kept)
    assert by_time.budget.reached == pytest.approx((4 * by_count.budget.reached + 1) / 5)

    monkeypatch.setattr(latency, "medians", clock := Clock(flops / 4, wrong=0.05 * flops))
    corrected = greedyprune.select(model, [inputs], **options, size=Budget(latency=0.8))
    assert clock.asked > 3  # the whole model gains less than its layers say
    assert corrected.budget.reached <= 0.8
    assert corrected.change("flops")[1] < by_count.change("flops")[1]

    monkeypatch.setattr(latency, "medians", Clock(flops / 4, wrong=flops))
    with pytest.warns(UserWarning, match=r"latency: found .* of the dense model's, above the 0.8"):
        greedyprune.select(model, [inputs], **options, size=Budget(latency=0.8))
    with pytest.raises(ValueError, match=r"latency: found 0.2, but the smallest sizes"):
        greedyprune.select(model, [inputs], **options, size=Budget(latency=0.2))


def test_a_latency_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.2)
    model, inputs = nn.Sequential(Block(8, 8), nn.Conv2d(8, 8, 1)).eval(), torch.randn(2, 8, 6, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    times = latency.medians([model, nn.Identity()], Batch((inputs,), {}, None), [""])
    assert times[0][""] > times[1][""] > 0
    batch = Batch((inputs,), {}, None)
    kinds = [[group] for group in find_groups(model, analyse(model, batch), None)]
    cost = latency.latency_of(model, kinds, batch)
    assert cost.dense > 0
    assert all(part >= 0 for part in cost.parts.values())
    assert cost.at({"0.conv1": 1}) <= cost.dense
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_latency_as_the_model_is_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function gets copies, and torch.compile and autocast work in what it returns."""
    monkeypatch.setattr(latency, "SECONDS", 0.05)
    model, inputs = network("vgg")
    compiled, dtypes, given = [], set(), []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        compiled.append(graph)
        return graph.forward

    def deploy(model: nn.Module) -> Any:
        given.append(model)
        run = torch.compile(model.to(memory_format=torch.channels_last), backend=backend)

        def deployed(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out = run(x)
            dtypes.add(out.dtype)
            return out

        return deployed

    before = {name: value.clone() for name, value in model.state_dict().items()}
    budget = Budget(latency=0.99, deploy=deploy)
    with warnings.catch_warnings():  # so small a model may take any time
        warnings.simplefilter("ignore")
        selection = greedyprune.select(model, [inputs], objective="imitation", size=budget)
    assert selection.budget.what == "latency"
    assert compiled
    assert dtypes == {torch.bfloat16}
    assert all(copy is not model for copy in given)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    with pytest.raises(TypeError, match="deploy: your function returned NoneType"):
        greedyprune.select(model, [inputs], size=Budget(latency=0.9, deploy=lambda model: None))


def test_latency_of_a_layer_that_takes_three_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Branches()
    x = torch.randn(20, 4)
    monkeypatch.setattr(latency, "medians", Clock(rest=0.0))
    by_time = greedyprune.select(model, x, size=Budget(latency=0.7))
    assert by_time.budget.left["latency"] <= 0.7
    cost, flops = by_time.curves.costs["latency"][0], by_time.costs["flops"]
    assert cost.at({"a": 3, "b": 5}) == pytest.approx(flops.at({"a": 3, "b": 5}), rel=0.05)


class Branches(nn.Module):
    """A Linear takes three others side by side, and its own units are cut, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 8) for _ in range(3))
        self.join, self.last = nn.Linear(24, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.a(x).relu(), self.b(x).relu(), self.c(x).relu()]
        return self.last(self.join(torch.cat(parts, 1)).relu())
