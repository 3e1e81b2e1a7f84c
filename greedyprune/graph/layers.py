"""What of a model can be pruned: a table of its layers, from one trace and one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from .costs import Cost, costs_of, counted
from .groups import LAYERS, Group, analyse, why_not

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Prunable:
    """One group of units that can be removed by themselves.

    units:      how many there are
    features:   numbers of each unit that the first consumer weighs, a convolution's taps included
    producers:  the layers whose outputs they are
    consumers:  the layers that take them
    parameters: in all of these layers and between them, that belong to the units
    flops:      of these layers and of products of the units (attention's), on the example; two for
                a multiplication with an addition
    """

    units: int
    features: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    parameters: int
    flops: int


class Layers(Mapping[str, Prunable]):
    """The layers that `select` can prune, by the name of their first producer.

    refused: the other layers, and why each can't be pruned
    """

    def __init__(self, found: Mapping[str, Prunable], refused: Mapping[str, str]) -> None:
        self._found, self.refused = dict(found), dict(refused)

    def __getitem__(self, name: str) -> Prunable:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def summary(self) -> Table:
        """A rich table, a row a layer: `rich.print(layers.summary())`."""
        from rich.table import Table

        table = Table(title=f"{len(self)} of {len(self) + len(self.refused)} layers can be pruned")
        for column in ("layer", "units", "features", "with", "taken by", "parameters", "FLOPs"):
            left = column in ("layer", "with", "taken by")
            table.add_column(column, justify="left" if left else "right")
        for name, layer in self.items():
            table.add_row(
                name, f"{layer.units}", f"{layer.features}", ", ".join(layer.producers[1:]),
                ", ".join(layer.consumers), f"{layer.parameters:,}", f"{layer.flops:,}",
            )  # fmt: skip
        for name, reason in self.refused.items():
            table.add_row(name, "-", "-", reason, style="dim")
        return table

    def __repr__(self) -> str:
        names = ", ".join(f"{name!r}: {layer.units} units" for name, layer in self.items())
        return f"Layers({{{names}}}, {len(self.refused)} refused)"


def layers(model: nn.Module, example: object) -> Layers:
    """What `select` can prune in a model, and why not the rest.

    Whether sizes of the dense model are written into its code shows only on data, in `select`.

    Args:
        model: any nn.Module that torch.export can trace, also on the meta device
        example: inputs for one forward pass: a tensor, a tuple of them, or a dict of keyword
            arguments

    Raises:
        TypeError: no nn.Module; ValueError: it can't be traced or run on the example

    Example:
        >>> model = torch.nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> greedyprune.layers(model, torch.randn(1, 3, 9, 9))["0"].features
        9
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, expected an nn.Module")
    batch = _batch(example)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            found = analyse(model, batch)
            _, total, flops = counted(lambda: model(*batch.args, **batch.kwargs))
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"model: torch.export can't trace it ({first[0]})") from error
    finally:
        for module, training in modes.items():
            module.training = training
    groups = {group.producer: group for group in found.values() if isinstance(group, Group)}
    costs = costs_of(model, list(groups.values()), total, flops)
    prunable = {name: _described(model, group, costs) for name, group in groups.items()}
    refused = {
        name: str(reason).removeprefix(f"layer {name!r}: ")
        for name, reason in found.items()
        if not isinstance(reason, Group)
    }
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and name not in found:
            refused[name] = why_not(module)
    return Layers(prunable, refused)


def _described(model: nn.Module, group: Group, costs: Mapping[str, Cost]) -> Prunable:
    at = group.slices[f"{group.consumer}.weight"]
    weight = model.get_parameter(f"{group.consumer}.weight")
    return Prunable(
        units=group.units,
        features=weight.numel() // weight.shape[1 - at.dim] // group.units,
        producers=group.producers,
        consumers=group.consumers,
        parameters=costs["params"].of(group.producer),
        flops=costs["flops"].of(group.producer),
    )


def _batch(example: object) -> Batch:
    if isinstance(example, Tensor):
        return Batch((example,), {}, None)
    if isinstance(example, Mapping):
        return Batch((), {str(name): value for name, value in example.items()}, None)
    if isinstance(example, (tuple, list)):
        args: tuple[Any, ...] = tuple(example)
        return Batch(args, {}, None)
    raise TypeError(
        f"example: found {type(example).__name__}, expected a tensor, a tuple of the forward's "
        "arguments or a dict of keyword arguments"
    )
