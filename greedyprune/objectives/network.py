"""A network some of whose layers get other weights, and its loss on the data.

The layers before the one being selected run once. Its consumer's output for a candidate is the sum
of the output for the units picked so far and the candidate's own. Only the layers that follow
(network_suffix.py) run for each candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, Batches
from ..data.compared import Compared, compared
from ..data.forward import is_separate, main_output, run_model
from ..data.losses import Criterion, loss_of_function, slope_in
from ..data.padding import NO_LABEL
from ..data.targets import joined, joined_over, part_of
from ..graph.executor import GraphExecutor
from ..graph.executors import GraphExecutors
from ..graph.groups import Group
from ..graph.names import slice_of, weight_name
from ..graph.networks import Network as GraphNetwork
from ..graph.networks import bytes_held, tensors_of
from ..runtime.distributed import Ranks
from ..runtime.progress import Bar
from ..surgery.copying import copied
from ..surgery.cut import masked_tied, masked_weight, scaled_weight
from ..surgery.layer_selection import LayerSelection
from .network_suffix import NetworkSuffix

PART = 32  # samples that run together on a CPU; the values of more do not fit in its caches
SAMPLES = {"cpu": PART, "cuda": 8192}  # candidates times samples that run together
LAYERS = 16  # at most so many values as large as the layer's output are in memory at once


class NetworkState:
    """A batch in the network, run up to a node; without an executor it is run from its inputs."""

    def __init__(self, batch: Batch, executors: GraphExecutors | None) -> None:
        self.batch, self.at = batch, 0
        self.executor = None if executors is None else executors.find(batch)
        self.values = {} if self.executor is None else self.executor.inputs(batch)
        self._compared: Compared | None = None

    def advance(self, layer: str, tensors: Mapping[str, Tensor]) -> None:
        if self.executor is not None:
            place = self.executor.place[layer]
            self.executor.run(self.values, GraphNetwork(tensors), self.at, place)
            self.at = place

    def outputs(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        if self.executor is not None:
            return main_output(self.executor.outputs(self.values, tensors, self.at))
        args, kwargs = self.batch.args, self.batch.kwargs
        return main_output(torch.func.functional_call(model, dict(tensors), args, kwargs))

    def compared(self, criterion: Criterion, outputs: Tensor) -> Compared:
        if self._compared is None:
            self._compared = compared(criterion, outputs, self.batch)
        return self._compared


class _Loss:
    """The loss of outputs that come batch by batch, on this rank.

    nothing: outputs (in the model's dtype) and targets of no samples, for a custom loss
    """

    def __init__(self, criterion: Criterion, nothing: tuple[Tensor, Any]) -> None:
        self._criterion, self._outputs, self._targets = criterion, [nothing[0]], list[Any]()
        if nothing[1] is not None:
            self._targets.append(nothing[1])
        self.sum = torch.zeros((), dtype=torch.float64)
        self.mass = 0.0

    def add(self, state: NetworkState, outputs: Tensor) -> None:
        if self._criterion.kind == "custom" and state.batch.targets is not None:
            self._outputs.append(outputs.to(self._outputs[0].dtype))
            self._targets.append(state.batch.targets)
            return
        found = state.compared(self._criterion, outputs)
        columns = found.columns(outputs)
        self.sum = self.sum.to(columns.device) + found.target.loss_sum(columns)
        self.mass += found.target.mass

    def of_function(self, ranks: Ranks) -> Tensor:
        """() of a user's function; it has derivatives in this rank's outputs."""
        local = joined(self._outputs, "outputs")
        outputs = ranks.parts("outputs", local.detach())
        outputs[ranks.rank] = local
        targets = joined_over(ranks, joined(self._targets))
        return loss_of_function(self._criterion.function, torch.cat(outputs), targets)


def _values(totals: Sequence[_Loss], criterion: Criterion, ranks: Ranks) -> Tensor:
    """The losses of all ranks' samples: (len(totals),) float64."""
    if criterion.kind == "custom":
        return torch.stack([total.of_function(ranks).detach().double().cpu() for total in totals])
    sums = torch.tensor([[float(total.sum), total.mass] for total in totals], dtype=torch.float64)
    ranks.sum("losses", sums)
    if not sums[:, 1].all():
        raise ValueError(NO_LABEL)
    return sums[:, 0] if criterion.reduction == "sum" else sums[:, 0] / sums[:, 1]


class Network:
    """A network whose layers get other weights, one after the other, and its loss on the data.

    limit:  bytes for values between layers
    traced: may torch.export's graph be used? Else the model runs from its inputs every time
    """

    def __init__(
        self, model: nn.Module, batches: Batches, criterion: Criterion, limit: int, bar: Bar,
        traced: bool,
    ) -> None:  # fmt: skip
        self.model, self.criterion = model, criterion
        self._batches, self._limit, self._bar = batches, limit, bar
        self._tensors = tensors_of(model)
        self._executors: GraphExecutors | None = GraphExecutors(model) if traced else None
        self._layer: str | None = None
        self._suffixes: dict[GraphExecutor, NetworkSuffix] = {}
        self._states: list[NetworkState] | None = None  # None: run from the inputs every time
        self._changed: dict[str, Tensor] = {}
        self._traced, self._vmaps = traced, True
        self._exact: Network | None = None
        self._runs_exactly = True
        self.ranks, first = batches.ranks, batches.first()
        outputs = main_output(run_model(model, first))
        self._nothing = outputs[:0], part_of(first.targets, slice(0, 0))
        on_cpu = traced and batches.device.type == "cpu"
        self._splits = on_cpu and is_separate(model, first, outputs)
        if self._executors is not None:
            self._executors.of(self._parts(first)[0])

    def exact(self) -> Network | None:
        """The same in float64; None where the model cannot run in float64, as with a `.float()`."""
        if self._exact is None and self._runs_exactly:
            model = copied(self.model).double()
            batches = self._batches.of(model)
            try:
                run_model(model, batches.first())
            except ValueError:
                self._runs_exactly = False
                return None
            self._exact = Network(
                model, batches, self.criterion, self._limit - self._bytes_held(), self._bar,
                self._traced,
            )  # fmt: skip
            self._exact._nothing = self._nothing
            self._exact.change(self._changed)
            if self._layer is not None:
                self._exact.stop_before(self._layer)
        return self._exact

    def first_of(self, layers: Sequence[str]) -> tuple[int, str]:
        """The place and name of the layer that runs first."""
        if self._executors is None:
            return 0, layers[0]
        place = self._places()
        return min((place[name], name) for name in layers)

    def _places(self) -> Mapping[str, int]:
        """At which place in the graph each layer runs, if there is a graph."""
        if self._executors is None:
            return {}
        return self._executors.of(self._parts(self._batches.first())[0]).place

    def stop_before(self, layer: str) -> None:
        """Runs the network up to this layer once; layers come in the order of the graph."""
        self._layer, self._suffixes = layer, {}
        held = self._bytes_held()
        for state in self._states or []:
            held -= bytes_held([state.values])
            state.advance(layer, self._tensors)
            held += bytes_held([state.values])
            if held > self._limit:
                self._states = None
                break
        if self._exact is not None:
            self._exact.stop_before(layer)

    def _bytes_held(self) -> int:
        return sum(bytes_held([state.values]) for state in self._states or [])

    def weight(self, layer: str) -> Tensor:
        return self._tensors[weight_name(self.model, layer)]

    def weights_of(self, layer: LayerSelection) -> dict[str, Tensor]:
        """The weights that take a layer's units, once it is pruned, by layer or by their names."""
        stay = {name: masked_tied(self.weight(name), layer, name) for name in layer.tied}
        return stay | {n: masked_weight(self.weight(n), layer, n) for n in layer.outputs}

    def change(self, weights: Mapping[str, Tensor]) -> None:
        """Gives the network these weights from now on.

        Weights that are no layer's, as the `weight_hh` of recurrent layers, may be used before the
        layer that the network has run up to.
        """
        self._changed |= weights
        if not weights.keys() <= self._places().keys():
            self._states = None
        for name, weight in weights.items():
            self._tensors[weight_name(self.model, name)] = weight.to(self.weight(name))
        if self._exact is not None:
            self._exact.change(weights)

    def states_of(self, batch: Batch) -> list[NetworkState]:
        """The samples of a batch, run up to the layer."""
        states = [NetworkState(part, self._executors) for part in self._parts(batch)]
        for state in states:
            assert self._layer is not None
            state.advance(self._layer, self._tensors)
        return states

    def loss(self, weights: Mapping[str, Tensor], criterion: Criterion | None = None) -> float:
        """The loss (or another criterion) on all data, with these weights of some layers."""
        tensors = self._tensors | {
            weight_name(self.model, name): value for name, value in weights.items()
        }
        criterion = criterion or self.criterion
        total = _Loss(criterion, self._nothing)
        for state in self._all():
            total.add(state, state.outputs(self.model, tensors))
        return float(_values([total], criterion, self.ranks))

    def losses(
        self, group: Group, factors: Tensor, candidates: Sequence[int | None], one: float,
        states: Iterable[NetworkState] | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss for each candidate: (candidates,) float64.

        The units' outgoing weights are times `factors`, and the candidate's factor is `one` more;
        None is no candidate.

        states: the samples; None: all data
        """
        totals = [_Loss(self.criterion, self._nothing) for _ in candidates]
        for state in self._all() if states is None else states:
            outputs = self._outputs(state, group, factors, candidates, one)
            for total, output in zip(totals, outputs, strict=True):
                total.add(state, output)
        return _values(totals, self.criterion, self.ranks)

    def slopes(
        self, group: Group, factors: Tensor, states: Iterable[NetworkState] | None = None
    ) -> Tensor:
        """The loss's derivatives in the factors: (N,) float64."""
        leaf, total = factors.clone().requires_grad_(), _Loss(self.criterion, self._nothing)
        slopes, has_samples = torch.zeros_like(factors), False
        for state in self._all() if states is None else states:
            has_samples = True
            with torch.enable_grad():
                weights = self._scaled(group, leaf)
                total.add(state, state.outputs(self.model, self._tensors | weights))
            if total.sum.requires_grad:  # not for a function of all outputs, which comes last
                slopes += torch.autograd.grad(total.sum, leaf)[0]
                total.sum = total.sum.detach()
        if self.criterion.kind == "custom":
            with torch.enable_grad():
                loss = total.of_function(self.ranks)
            if has_samples:
                slopes = slope_in(leaf, loss)
            total.mass = 1 / self.ranks.size
        [mass] = self.ranks.sum_numbers("mass", total.mass)
        self.ranks.sum("slopes", slopes)
        return slopes / mass

    def _scaled(self, group: Group, factors: Tensor) -> dict[str, Tensor]:
        return {
            weight_name(self.model, name): scaled_weight(
                self.weight(name), slice_of(group.slices, name), factors
            )
            for name in group.consumers
        }

    def _outputs(
        self, state: NetworkState, group: Group, factors: Tensor, candidates: Sequence[int | None],
        one: float,
    ) -> Iterator[Tensor]:  # fmt: skip
        if state.executor is not None and len(group.consumers) == 1 and not group.repeated:
            yield from self._through_suffix(state, group, factors, candidates, one)
            return
        for unit in candidates:
            changed = factors.clone()
            if unit is not None:
                changed[unit] += one
            yield state.outputs(self.model, self._tensors | self._scaled(group, changed))

    def _through_suffix(
        self, state: NetworkState, group: Group, factors: Tensor, candidates: Sequence[int | None],
        one: float,
    ) -> Iterator[Tensor]:  # fmt: skip
        executor, name = state.executor, group.consumer
        assert executor is not None
        if executor not in self._suffixes:
            self._suffixes[executor] = NetworkSuffix(executor, name, self._tensors)
        suffix, layer = self._suffixes[executor], executor.layers[name]
        at = group.slices[layer.weight]
        weight, bias = self.weight(name), self._tensors.get(layer.bias or "")
        prepared, inputs = suffix.prepare(state.values), executor.input_of(name, state.values, True)
        weight, bias = suffix.scaled(weight, bias, layer.out_dim)
        base = executor.linear_map(name, inputs, scaled_weight(weight, at, factors), bias)

        def output_of(unit: int | None) -> Tensor:
            if unit is None:
                return base.clone()
            entries = at.entries(torch.tensor([unit])).to(inputs.device)
            added = executor.linear_map(
                name, inputs.index_select(layer.channel_dim, entries),
                weight.index_select(at.dim, entries) * one, None,
            )  # fmt: skip
            return base + added

        def rest(output: Tensor) -> Tensor:
            return main_output(suffix(output, prepared))

        together = self._together(base)
        for i in range(0, len(candidates), together):
            outputs = [output_of(unit) for unit in candidates[i : i + together]]
            if self._vmaps and len(outputs) > 1:
                try:
                    yield from torch.func.vmap(rest)(torch.stack(outputs))
                    continue
                except RuntimeError:  # vmap has no rule for one of the operations
                    self._vmaps = False
            yield from (rest(suffix.laid_out(output)) for output in outputs)

    def _together(self, output: Tensor) -> int:
        """How many candidates run at once, for a layer's output as large as this."""
        fit = self._limit // (LAYERS * output.numel() * output.element_size())
        return max(1, min(fit, SAMPLES[output.device.type] // len(output)))

    def _all(self) -> Iterator[NetworkState]:
        if self._states is not None:
            yield from self._states
            return
        held, kept = 0, list[NetworkState]()
        for batch in self._bar(self._batches, "activations"):
            states = self.states_of(batch)
            yield from states
            held += bytes_held([state.values for state in states])
            if held <= self._limit:
                kept += states
            else:
                kept.clear()
        if held <= self._limit:
            self._states = kept

    def _parts(self, batch: Batch) -> list[Batch]:
        return batch.split(PART) if self._splits else [batch]
