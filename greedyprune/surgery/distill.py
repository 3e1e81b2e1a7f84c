"""All layers of a pruned network trained together, towards the outputs of the dense one's layers.

Least squares fits one layer to the inputs that it receives, and can't change these. `distill` uses
gradients through the whole pruned network, to lower

    sum over layers of  |a - a_dense|^2 / |a_dense|^2

a is a layer's output after the linear operations that follow it: its normalisation and its sum with
a shortcut. Where a ReLU follows, a is only the positive part (graph/executor.py). The dense
network's values are the only targets. This is the regression of intermediate layers in knowledge
distillation (Romero et al. 2015, arXiv:1412.6550), for all layers at once. A tenth of the samples
is held out. The weights of the epoch with the lowest error there are kept, or those from before the
first epoch if no epoch has a lower error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.batches import Batch, Batches, samples_of
from ..data.forward import evaluating, is_separate
from ..data.halves import held_out
from ..data.padding import Padding, counted
from ..graph.executors import GraphExecutors
from ..graph.names import module_of_layer
from ..graph.networks import tensors_of
from ..graph.tracing import Layer
from ..graph.windows import CONVOLUTION_TYPES
from ..runtime.progress import Bar
from .remaining import entries_left
from .selection import Selection

RATE = 1e-3  # Adam's (Kingma and Ba 2015), falling to 0 along a cosine
SAMPLES = 128  # in one step of Adam
SEED = 0  # of the order of the samples
TINY = 1e-12  # the least |a_dense|^2 to divide by


def distill(
    model: nn.Module, small: nn.Module, selection: Selection, layers: Sequence[Layer],
    batches: Batches, epochs: int, bar: Bar,
) -> None:  # fmt: skip
    """Changes the weights of `small`, in place.

    Args:
        model: the dense model
        small: the pruned model
        selection: the selection that `small` was cut by
        layers: the layers whose outputs are compared
        epochs: passes over the batches
        bar: draws a progress bar
    """
    kept_outputs = _kept_outputs(model, selection, layers)
    dense, pruned = GraphExecutors(model), GraphExecutors(small)
    trained = {id(p): p.detach().clone().requires_grad_() for p in small.parameters()}
    dense_tensors = tensors_of(model)
    tensors = {name: trained.get(id(t), t) for name, t in tensors_of(small).items()}
    optimiser = torch.optim.Adam(trained.values(), RATE)

    def errors(part: Batch) -> list[Tensor]:
        """Each layer's relative squared error on some samples."""
        with torch.no_grad():
            targets = dense.of(part).path_ends(part, dense_tensors, kept_outputs)
        outputs = pruned.of(part).path_ends(part, tensors, kept_outputs)
        found = list[Tensor]()
        for name, output in outputs.items():
            of_convolution = isinstance(module_of_layer(model, name), CONVOLUTION_TYPES)
            kept, mask = kept_outputs[name], part.padding.of(name)
            found.append(
                _relative_error(output, targets[name], kept, mask, 1 if of_convolution else -1)
            )
        return found

    def held_out_error() -> float:
        """The mean error on the held-out samples; inf where there are none."""
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                for part in _parts(batch, held_out(batch), separate):
                    samples = samples_of(part) or 1
                    total += float(torch.stack(errors(part)).sum()) * samples
                    count += samples
        return total / count if count else math.inf

    with evaluating(model):
        separate = is_separate(model, batches.first())
    count = len(batches) or sum(1 for _ in batches)
    torch.manual_seed(SEED)  # `evaluating` restores torch's random state
    with evaluating(small):
        best, lowest = dict[int, Tensor](), held_out_error()
        for epoch in bar(range(epochs), "distilling"):
            for i, batch in enumerate(batches):
                parts = _parts(batch, ~held_out(batch), separate)
                for j, part in enumerate(parts):
                    done = (epoch + (i + j / len(parts)) / count) / epochs
                    optimiser.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * done)) / 2
                    with torch.enable_grad():
                        optimiser.zero_grad()
                        torch.stack(errors(part)).sum().backward()
                    optimiser.step()
            error = held_out_error()
            if error < lowest or error == math.inf:
                lowest, best = error, {key: p.detach().clone() for key, p in trained.items()}
    for parameter in small.parameters() if best else ():
        parameter.data.copy_(best[id(parameter)])


def _parts(batch: Batch, chosen: Tensor, separate: bool) -> list[Batch]:
    """The chosen samples in parts of at most SAMPLES, which are drawn anew in every call.

    Samples all of whose positions are hidden are left out.

    chosen:   (m,) bool. A batch without a dimension of samples is used whole if chosen[0] is true
    separate: can samples run without the others? If not, as the nodes of a graph, the whole batch
        is the part, with the other samples hidden as padding is
    """
    if samples_of(batch) != len(chosen):
        return [batch] if bool(chosen[0]) else []
    if not separate:
        return [replace(batch, padding=_shown_only(batch.padding, chosen))] if chosen.any() else []
    shown = counted(batch.padding.mask, chosen.shape)
    samples = (chosen if shown is None else chosen & shown.cpu()).nonzero().flatten()
    drawn = samples[torch.randperm(len(samples))]
    return [batch.take(part) for part in drawn.split(SAMPLES) if len(part)]


def _shown_only(padding: Padding, samples: Tensor) -> Padding:
    """The padding that also hides all but these samples, (m,) bool."""

    def hidden(mask: Tensor | None) -> Tensor:
        column = samples[:, None] if mask is None else samples[:, None].to(mask.device)
        return column if mask is None else mask & column

    return replace(padding, mask=hidden(padding.mask), decoder_mask=hidden(padding.decoder_mask))


class _KeptOutputs(NamedTuple):
    """The entries (K,) int64 that are kept of a layer's outputs, of which there were `size`."""

    entries: Tensor
    size: int

    def of(self, target: Tensor, channels: int) -> Tensor:
        """The dense network's values of the outputs that are kept, in the target's shape.

        channels: the dimension of the layer's outputs: 1 or the last one. A reshape may have made
            several of it, such as heads and their entries
        """
        first, last = 1, 2
        if channels < 0:
            first, last = target.dim() - 1, target.dim()
        while math.prod(target.shape[first:last]) < self.size:
            first, last = (first - 1, last) if channels < 0 else (first, last + 1)
        kept = torch.zeros(self.size, dtype=torch.bool)
        kept[self.entries] = True
        kept = kept.view(target.shape[first:last])
        for dim in range(first, last):
            others = tuple(other - first for other in range(first, last) if other != dim)
            left = kept.any(others) if others else kept
            if not left.all():
                target = target.index_select(dim, left.nonzero().flatten().to(target.device))
        return target


def _kept_outputs(
    model: nn.Module, selection: Selection, layers: Sequence[Layer]
) -> dict[str, _KeptOutputs | None]:
    """The kept outputs of each layer, by its name in the dense model; None: all."""
    left = entries_left(selection.layers.values())
    kept_outputs: dict[str, _KeptOutputs | None] = {}
    for layer in layers:
        entries = left.get((layer.weight, layer.out_dim))
        size = model.get_parameter(layer.weight).shape[layer.out_dim]
        kept_outputs[layer.name] = None if entries is None else _KeptOutputs(entries, size)
    return kept_outputs


def _relative_error(
    output: Tensor, target: Tensor, kept: _KeptOutputs | None, mask: Tensor | None, channels: int
) -> Tensor:
    """|output - target|^2 / |target|^2, a scalar, over the positions that the mask shows.

    channels: the outputs' dimension that is none of the positions
    """
    target = target if kept is None else kept.of(target, channels)
    at = channels % output.dim()
    rows = counted(mask, output.shape[:at] + output.shape[at + 1 :])
    if rows is not None:
        output, target = (value.movedim(channels, -1)[rows] for value in (output, target))
    if not output.numel():
        return output.sum()
    return (output - target).square().mean() / target.square().mean().clamp(min=TINY)
