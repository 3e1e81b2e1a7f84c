"""An optimizer of the dense model goes on with the pruned one, with its state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import NETWORKS, data_of, network
from torch import nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import greedyprune
from greedyprune.surgery.cut import cut, masked

X, Y = torch.randn(64, 6), torch.randint(3, (64,))
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam": lambda p: Adam(p, 1e-2, betas=(0.8, 0.9)),
    "AdamW": lambda p: AdamW(p, 1e-2, amsgrad=True, weight_decay=0.1),
    "RMSprop": lambda p: RMSprop(p, 1e-3, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "named": lambda p: AdamW(p, torch.tensor(1e-2)),
}


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(),
        nn.Linear(12, 3),
    )  # fmt: skip


def train(model: nn.Module, optimizer: Optimizer, masks: dict[str, torch.Tensor]) -> None:
    """Six steps; what the masks hide gets no gradient and stays 0."""
    for i in range(6):
        batch = slice(10 * i, 10 * i + 10)
        optimizer.zero_grad()
        functional.cross_entropy(model(X[batch]), Y[batch]).backward()
        for name, mask in masks.items():
            model.get_parameter(name).grad.mul_(mask)
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("weights", ["counts", "refit"])
def test_training_goes_on_as_in_the_masked_model(name: str, weights: str) -> None:
    model = model_of()
    groups = [
        {"params": [*model[0].parameters(), *model[1].parameters()], "lr": 2e-2},
        {"params": [*model[3].parameters(), model[5].bias]},
        {"params": [model[5].weight], "initial_lr": 0.1},
    ]
    optimizer = OPTIMIZERS[name](groups)
    train(model, optimizer, {})
    selection = greedyprune.select(model, (X, Y), size={"0": 5, "3": 4}, weights=weights)
    small = greedyprune.prune(model, selection).train()
    pruned = greedyprune.prune_optimizer(optimizer, model, small, selection)
    assert type(pruned) is type(optimizer)
    assert [len(group["params"]) for group in pruned.param_groups] == [4, 3, 1]
    for new, old in zip(pruned.param_groups, optimizer.param_groups, strict=True):
        assert {**new, "params": 0} == {**old, "params": 0}
    # The same weights and masks in the dense model, whose optimizer has its whole state.
    full = masked(model, selection).train()
    with torch.no_grad():
        for old, value in zip(model.parameters(), full.parameters(), strict=True):
            old.copy_(value)
    masks = {
        f"{consumer}.weight": torch.zeros(size).index_fill_(0, layer.kept, 1)
        for layer, consumer, size in (
            (selection.layers["0"], "3", 16), (selection.layers["3"], "5", 12),
        )
    }  # fmt: skip
    train(model, optimizer, masks)
    train(small, pruned, {})
    kept = {"0": selection.layers["0"].kept, "3": selection.layers["3"].kept}
    torch.testing.assert_close(small[0].weight, model[0].weight[kept["0"]])
    torch.testing.assert_close(small[1].bias, model[1].bias[kept["0"]])
    torch.testing.assert_close(small[3].weight, model[3].weight[kept["3"]][:, kept["0"]])
    torch.testing.assert_close(small[3].bias, model[3].bias[kept["3"]])
    torch.testing.assert_close(small[5].weight, model[5].weight[:, kept["3"]])
    torch.testing.assert_close(small[5].bias, model[5].bias)


def test_the_state_is_the_pruned_model_s_own() -> None:
    model = model_of().to(torch.float32)
    optimizer = Adam(model.parameters(), 1e-2)
    train(model, optimizer, {})
    selection = greedyprune.select(model, (X, Y), size=4)
    small = greedyprune.prune(model, selection)
    before = {name: p.clone() for name, p in model.named_parameters()}
    moments = optimizer.state[model[0].weight]["exp_avg"].clone()
    pruned = greedyprune.prune_optimizer(optimizer, model, small, selection)
    kept = selection.layers["0"].kept
    assert pruned.state[small[0].weight]["exp_avg"].equal(moments[kept])
    assert pruned.state[small[0].weight]["step"] == 6
    train(small, pruned, {})
    assert optimizer.state[model[0].weight]["exp_avg"].equal(moments)
    assert optimizer.state[model[0].weight]["step"] == 6
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(pruned, 2)
    scheduler.step()
    loaded = Adam(small.parameters(), 1e-2)
    loaded.load_state_dict(pruned.state_dict())
    refitted = greedyprune.refit(model, selection, (X,))
    again = greedyprune.prune_optimizer(optimizer, model, refitted, selection)
    assert again.state[refitted[0].weight]["exp_avg"].equal(moments[kept])


def test_factored_state_and_a_new_optimizer() -> None:
    model = model_of()
    optimizer = torch.optim.Adafactor(model.parameters())
    selection = greedyprune.select(model, (X, Y), size=4)
    small = greedyprune.prune(model, selection)
    assert not greedyprune.prune_optimizer(optimizer, model, small, selection).state
    train(model, optimizer, {})
    pruned = greedyprune.prune_optimizer(optimizer, model, small, selection)
    old, new = optimizer.state[model[3].weight], pruned.state[small[3].weight]
    rows, columns = selection.layers["3"].kept, selection.layers["0"].kept
    assert new["row_var"].equal(old["row_var"][rows])
    assert new["col_var"].equal(old["col_var"][:, columns])
    train(small.train(), pruned, {})


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_every_kind(name: str) -> None:
    model, inputs = network(name)
    optimizer = Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    selection = greedyprune.select(model, data_of(inputs), objective="imitation", weights="none")
    numbers = copy.deepcopy(model)
    with torch.no_grad():  # a model whose weights are Adam's moments is cut as the moments are
        for mine, its in zip(numbers.parameters(), model.parameters(), strict=True):
            mine.copy_(optimizer.state[its]["exp_avg"])
    cut_moments = cut(numbers, selection)
    small = greedyprune.prune(model, selection)
    pruned = greedyprune.prune_optimizer(optimizer, model, small, selection)
    for key, parameter in small.named_parameters():
        moments = pruned.state[parameter]["exp_avg"]
        assert moments.equal(cut_moments.get_parameter(key))
        assert moments.stride() == parameter.stride()


def test_compiled_and_wrapped_models() -> None:
    model = model_of()
    compiled = torch.compile(model, backend="eager")
    optimizer = Adam(compiled.parameters(), 1e-2)
    selection = greedyprune.select(compiled, (X, Y), size=4)
    small = torch.compile(greedyprune.prune(compiled, selection), backend="eager")
    assert greedyprune.prune_optimizer(optimizer, compiled, small, selection).param_groups


def test_wrong_arguments() -> None:
    model, other = model_of(), model_of()
    optimizer = Adam(model.parameters(), 1e-2)
    selection = greedyprune.select(model, (X, Y), size=4)
    small = greedyprune.prune(model, selection)
    prune = greedyprune.prune_optimizer
    with pytest.raises(TypeError, match=r"optimizer: found int, expected a torch.optim one"):
        prune(3, model, small, selection)
    with pytest.raises(TypeError, match="small: found int"):
        prune(optimizer, model, 3, selection)
    with pytest.raises(ValueError, match=r"optimizer: found a parameter of shape \(16, 6\) that"):
        prune(optimizer, other, small, selection)
    with pytest.raises(ValueError, match=r"small: found shape \(16, 6\) for '0.weight', expected"):
        prune(optimizer, model, model, selection)
    lbfgs = torch.optim.LBFGS(model.parameters())

    def closure() -> torch.Tensor:
        lbfgs.zero_grad()
        loss = functional.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    lbfgs.step(closure)
    with pytest.raises(ValueError, match=r"optimizer: its state 'd' has shape \(\d+,\), expected"):
        prune(lbfgs, model, small, selection)

    class Named(SGD):
        def __init__(self, params: object, name: str, lr: float) -> None:
            super().__init__(params, lr=lr)

    with pytest.raises(ValueError, match="optimizer: Named can't be made from its groups"):
        prune(Named(model.parameters(), "mine", 0.1), model, small, selection)
