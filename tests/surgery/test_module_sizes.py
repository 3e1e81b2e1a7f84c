"""Attributes with sizes, memory formats and states of tensors, in pruned and loaded models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import greedyprune
from greedyprune.surgery.cut import masked
from greedyprune.surgery.module_sizes import sizes_after, sizes_of

IMAGES, LABELS = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))


class OwnNorm(nn.Module):
    """A user's normalisation, whose forward uses its size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_channels, self.kernel_size, self.groups_of = channels, channels, channels
        self.scale = nn.Parameter(torch.rand(channels, 1, 1))
        self.register_buffer("shift", torch.rand(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.num_channels
        return x * self.scale + self.shift


class MyBatchNorm(nn.BatchNorm2d):
    pass


NORMS = {
    "batch": nn.BatchNorm2d, "sync": nn.SyncBatchNorm, "subclass": MyBatchNorm, "own": OwnNorm,
    "instance": nn.InstanceNorm2d,
    "affine instance": lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
}  # fmt: skip


def network(norm: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), NORMS[norm](16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), NORMS[norm](16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return model.eval()


@pytest.mark.parametrize("norm", NORMS)
def test_norms_hold_their_new_size(norm: str, tmp_path: Path) -> None:
    model = network(norm)
    selection = greedyprune.select(model, (IMAGES, LABELS), size={"0": 5, "3": 7})
    small = greedyprune.prune(model, selection)
    torch.testing.assert_close(small(IMAGES), masked(model, selection)(IMAGES))
    for i, size in ((1, 5), (4, 7)):
        attribute = "num_channels" if norm == "own" else "num_features"
        tensors = [*small[i].parameters(), *small[i].buffers()]
        assert all(len(tensor) == size for tensor in tensors if tensor.dim())
        if tensors:  # a norm without tensors is none of the owners of the units
            assert getattr(small[i], attribute) == size
    if norm == "own":
        assert small[1].kernel_size == small[1].groups_of == 16  # no names of sizes
    assert (small[3].in_channels, small[3].out_channels) == (5, 7)
    greedyprune.save_pruned(small, tmp_path / "small")
    loaded = greedyprune.load_pruned(tmp_path / "small", lambda: network(norm)).eval()
    assert loaded(IMAGES).equal(small(IMAGES))
    assert repr(loaded) == repr(small)
    assert greedyprune.refit(model, selection, (IMAGES,))[3].in_channels == 5


def test_sizes_of_layers_with_equal_dimensions() -> None:
    outputs, linear = {("weight", 0): 3, ("bias", 0): 3}, nn.Linear(8, 8)
    assert sizes_after(linear, {("weight", 1): 3}) == {"in_features": 3}
    assert sizes_after(linear, outputs) == {"out_features": 3}
    both = {"out_features": 3, "in_features": 5}
    assert sizes_after(linear, outputs | {("weight", 1): 5}) == both
    assert sizes_after(nn.Conv2d(3, 3, 3), {("weight", 1): 2}) == {"in_channels": 2}
    assert sizes_after(nn.ConvTranspose2d(8, 8, 3), {("weight", 0): 3}) == {"in_channels": 3}
    deep = nn.Conv2d(8, 16, 3, groups=8)
    assert sizes_after(deep, {("weight", 0): 6, ("bias", 0): 6}) == {
        "in_channels": 3, "out_channels": 6, "groups": 3
    }  # fmt: skip
    assert sizes_after(nn.LayerNorm(8), outputs) == {"normalized_shape": (3,)}
    assert sizes_after(nn.GroupNorm(1, 8), outputs) == {"num_channels": 3}
    half = {("weight", 0): 4, ("bias", 0): 4}  # one of two groups
    assert sizes_after(nn.GroupNorm(2, 8), half) == {"num_channels": 4, "num_groups": 1}
    assert sizes_of(nn.GroupNorm(2, 8)) == {"num_channels": 8, "num_groups": 2}
    assert sizes_of(nn.ReLU()) == {}


def test_formats_and_states_stay() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4),
    )  # fmt: skip
    nn.utils.parametrizations.weight_norm(model[6])
    model = model.eval().to(memory_format=torch.channels_last).to(torch.bfloat16)
    model[0].bias.requires_grad_(False)
    model[1].requires_grad_(False)
    calls: list[object] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model[3].register_forward_pre_hook(lambda *_: calls.append(2))
    selection = greedyprune.select(model, (IMAGES, LABELS), size={"0": 5})
    for small in (
        greedyprune.prune(model, selection), greedyprune.refit(model, selection, (IMAGES,)),
    ):  # fmt: skip
        assert [name for name, _ in small.named_parameters()] == [
            name for name, _ in model.named_parameters()
        ]
        for name, parameter in model.named_parameters():
            new = small.get_parameter(name)
            assert (new.dtype, new.requires_grad) == (torch.bfloat16, parameter.requires_grad)
        for i in (0, 3):
            assert small[i].weight.is_contiguous(memory_format=torch.channels_last)
            assert not small[i].weight.is_contiguous()
        assert type(small[6]) is not nn.Linear
        assert small[6].weight.shape == (4, 288)
        calls.clear()
        small(IMAGES.bfloat16())
        assert calls == [1, 2]


@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm,
             nn.utils.parametrizations.spectral_norm],
    ids=["weight_norm", "spectral_norm", "new weight_norm", "new spectral_norm"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_computed_weights(norm: object) -> None:
    """They stay where they are not cut, and a layer that would be cut is refused by name."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip
    model[4] = norm(model[4])
    model.eval()
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    model(x).sum().backward()
    table = greedyprune.layers(model, x)
    assert set(table) == {"0"}
    assert "its weight is computed" in table.refused["4"]
    selection = greedyprune.select(model, (x, y), size=4)
    small = greedyprune.prune(model, selection)
    torch.testing.assert_close(small(x), masked(model, selection)(x))
    assert small.state_dict().keys() == model.state_dict().keys()
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters()]
    for name, tensor in model[4].state_dict().items():
        assert small[4].state_dict()[name].equal(tensor)
    small.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    for named in ({"2": "4"}, {"4": "6"}):
        with pytest.raises(ValueError, match="'4'"):
            greedyprune.select(model, (x, y), size=4, layers=named)
