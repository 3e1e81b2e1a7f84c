"""The public table of what can be pruned in a model: `greedyprune.layers`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import nn

from ..data.batches import Batch, example_batch, placed
from ..data.forward import evaluating
from ..graph.costs import Cost, costs_of, count_flops, in_samples_of
from ..graph.groups import Group
from ..graph.names import slice_of, weight_of
from ..graph.pretrained import before_selection
from ..graph.refusals import refused_in
from ..graph.structure import analyse
from ..graph.trace_errors import place_of
from ..graph.unfold import out_dim_of
from ..graph.unrun import UsedTensors, warn_of_unrun
from ..runtime.arguments import ByName
from ..runtime.errors import first_line
from ..runtime.modules import module_of
from .proof import SAMPLES
from .trial_cut import check_cuts

if TYPE_CHECKING:
    from rich.table import Table

TEXTS = ("layer", "kind", "with", "taken by", "why not")
COLUMNS = (
    "layer", "kind", "units", "features", "with", "taken by", "parameters", "FLOPs", "why not",
)  # fmt: skip


@dataclass(frozen=True)
class Prunable:
    """A group: units of the same layers (hidden units, channels or attention heads).

    units:      the number of units
    features:   the number of features of a unit: inputs of the first consumer, times the positions
                of the kernel if that is a convolution
    producers:  the layers whose outputs are the units
    consumers:  the layers that take the units as inputs
    parameters: how many of the model's parameters belong to the units, in these layers and between
                them
    flops:      the FLOPs of these layers and of the units' matrix products (attention's) on the
                example; a multiplication with an addition counts as two
    stream:     the units are sums of several layers' outputs, as along residual connections.
                `select` takes such a layer where it is named, in `layers` or `size`, or with
                layers="all"
    norms:      the norms over the units, by torch's operation. Without some units the others
                change, so that a pruned model differs from the masked one. `select` takes such a
                layer where a stream is taken
    share:      the layers, with this one, that have to keep one share of their units, because the
                model's code needs it. Attention often needs it of the heads and the stream: `x =
                x.reshape(B, N, C)`, with the C of its input. `select` takes all of them together,
                or none. () for any share
    part:       "" or, of dimensions inside attention's heads, "[query-key]" or "[value]", with
                which the layer's name ends. The scores of attention are sums over query-key
                dimensions: no layer takes these, so `consumers` is ()
    """

    units: int
    features: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    parameters: int
    flops: int
    stream: bool = False
    norms: tuple[str, ...] = ()
    share: tuple[str, ...] = ()
    part: str = ""

    @property
    def kind(self) -> str:
        """What sets the units apart: "residual stream", "under a norm" or nothing, "".

        "inside heads" are the dimensions of attention's heads. Where the layer has a `share`, "in
        one share" follows.
        """
        kind = "residual stream" if self.stream else "under a norm" if self.norms else ""
        kind = "inside heads" if self.part else kind
        return f"{kind} in one share".strip() if self.share else kind


class Layers(Mapping[str, Prunable]):
    """The layers that `select` can prune, by the name of their first producer.

    inside_heads: dimensions inside attention's heads, by names such as "attn.qkv[value]", which
             `select` prunes only where they are named
    refused: the other layers, and why each can't be pruned
    saving:  for a Hugging Face model: which layers `save_pretrained` takes in any sizes, which in
             one size for all, and which not; else None
    """

    def __init__(
        self, prunable: Mapping[str, Prunable], refused: Mapping[str, str],
        saving: str | None = None, inside_heads: Mapping[str, Prunable] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self._prunable, self.refused, self.saving = ByName(prunable), dict(refused), saving
        self.inside_heads: Mapping[str, Prunable] = ByName(inside_heads)

    def __getitem__(self, name: str) -> Prunable:
        return self._prunable[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._prunable)

    def __len__(self) -> int:
        return len(self._prunable)

    def summary(self) -> Table:
        """A rich table with a row for each layer: `rich.print(layers.summary())`.

        with: the other layers that give these units, too
        why not: the reason why a layer can't be pruned

        Columns that would be empty are left out.
        """
        from rich.table import Table

        table = Table(title=f"{len(self)} of {len(self) + len(self.refused)} layers can be pruned")
        rows = [
            {
                "layer": name, "units": f"{layer.units}", "features": f"{layer.features}",
                "kind": layer.kind,
                "with": ", ".join(layer.producers[1:]), "taken by": ", ".join(layer.consumers),
                "parameters": f"{layer.parameters:,}", "FLOPs": f"{layer.flops:,}",
            }
            for name, layer in (*self.items(), *self.inside_heads.items())
        ]  # fmt: skip
        rows += [{"layer": name, "why not": reason} for name, reason in self.refused.items()]
        columns = [column for column in COLUMNS if any(row.get(column) for row in rows)]
        for column in columns:
            table.add_column(column, justify="left" if column in TEXTS else "right")
        for row in rows:
            texts = [row.get(column, "") for column in columns]
            table.add_row(*texts, style="dim" if "why not" in row else "")
        table.caption = self.saving
        return table

    def __repr__(self) -> str:
        names = ", ".join(f"{name!r}: {layer.units} units" for name, layer in self.items())
        return f"Layers({{{names}}}, {len(self.refused)} refused)"


def layers(model: nn.Module, example: object) -> Layers:
    """Which layers of a model `select` can prune, and why not the others.

    The model is traced once and run on the first two samples of the example, and run on one. If its
    FLOPs are not in proportion to the samples, or it does not run on so few, all samples are used.
    If an operation may have a layer's size as a constant, such as a `view`, the model is also run
    with half of that layer's units, unless its parameters are on the meta device. `select` prunes
    the same layers for the same example: all of them with layers="all", else those whose `kind` is
    "".

    Args:
        model: any nn.Module that torch.export can trace; its parameters may be on the meta device
        example: inputs for one forward pass: a tensor, a tuple of tensors, or a dict of keyword
            arguments. It is moved to the model's device, and floats are cast to its dtype

    Raises:
        TypeError: `model` is not an nn.Module, or `example` has another type
        ValueError: the model can't be run on the example, or can't be traced; or, with fewer units,
            it fails for another reason than its shapes

    Example:
        >>> import torch, greedyprune
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> table = greedyprune.layers(model, torch.randn(1, 3, 9, 9))
        >>> table
        Layers({'0': 8 units}, 1 refused)
        >>> table["0"].features  # each channel enters 3 * 3 taps of the next convolution
        9
        >>> table.refused
        {'2': "its units are the model's output"}
    """
    model = module_of(model)
    batch = example_batch(example)
    if not any(parameter.is_meta for parameter in model.parameters()):
        batch = placed(batch, model)
    with evaluating(model):
        try:
            few, used, total, flops = _counted(model, batch)
        except Exception as error:
            reason = first_line(error) + place_of(model, error)
            raise ValueError(f"example: the model can't run on it ({reason})") from error
        structure = analyse(model, few, check_cuts, heads=True)
    times = in_samples_of(few, batch)
    total, flops = int(total * times), {name: int(each * times) for name, each in flops.items()}
    known = {
        group.producer: group.times(times)
        for group in structure.values() if isinstance(group, Group)
    }  # fmt: skip
    groups = {name: group for name, group in known.items() if not group.part}
    inside = {name: group for name, group in known.items() if group.part}
    inner = [group for group in groups.values() if not group.left_out]
    warn_of_unrun(model, used, inner, "example")
    costs = costs_of(model, list(groups.values()), total, flops)
    prunable = {name: _prunable(model, group, costs) for name, group in groups.items()}
    costs = costs_of(model, list(inside.values()), total, flops)
    inside_heads = {name: _prunable(model, group, costs) for name, group in inside.items()}
    saving = before_selection(model, groups)
    return Layers(prunable, refused_in(model, structure), saving, inside_heads)


def _counted(model: nn.Module, batch: Batch) -> tuple[Batch, UsedTensors, int, dict[str, int]]:
    """The samples to analyse a model with, the tensors that they use, and their FLOPs.

    These are the first few samples of the batch if the FLOPs are in proportion to their number.
    """

    def counted(inputs: Batch) -> tuple[Batch, UsedTensors, int, dict[str, int]]:
        used = UsedTensors()

        def run() -> object:
            with used:
                return model(*inputs.args, **inputs.kwargs)

        return inputs, used, *count_flops(model, run)[1:]

    few = batch.few(SAMPLES)
    if few is not batch:
        with suppress(Exception):  # the model runs on no part of the batch
            result, (_, _, one, _) = counted(few), counted(batch.few(1))
            if result[2] == SAMPLES * one:
                return result
    return counted(batch)


def _prunable(model: nn.Module, group: Group, costs: Mapping[str, Cost]) -> Prunable:
    if group.scores:
        features = next(iter(group.scores.values())).places.shape[1] * group.heads
    else:
        at = slice_of(group.slices, group.consumer)
        weight = weight_of(model, group.consumer)
        features = weight.numel() // weight.shape[out_dim_of(at.dim)] // group.units
    return Prunable(
        units=group.units,
        features=features,
        producers=group.producers,
        consumers=group.consumers,
        parameters=costs["params"].of(group.producer),
        flops=costs["flops"].of(group.producer),
        stream=group.stream,
        norms=group.norms,
        share=group.share,
        part=group.part,
    )
