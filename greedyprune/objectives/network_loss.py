"""`objective="loss"` inside a network: equation (1) with the loss of the whole network.

No kernel stands behind a layer whose consumers are not the output: its candidates are scored by
running the network (Ye et al. 2020, arXiv:2003.01794). What comes before the consumer runs once;
its output for a candidate is the sum of those of the units picked so far and the candidate's own;
only what follows it (tail.py) runs for each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, Batches, samples_of
from ..data.forward import alike, main_output, run_model, target_of
from ..data.losses import Criterion, Target, loss_of_function, slope_in
from ..graph.executor import (
    GraphExecutor,
    GraphExecutors,
    OverwrittenError,
    bytes_held,
    tensors_of,
)
from ..graph.groups import Group
from ..runtime.checkpoint import Steps
from ..runtime.distributed import Ranks
from ..surgery.cut import masked_weight, scaled_weight
from ..surgery.selection import LayerSelection
from .network_suffix import Tail
from .options import Batched

PART = 32  # samples that run together on a CPU: more leave its caches
SAMPLES = {"cpu": PART, "cuda": 8192}  # candidates times samples that run together
LAYERS = 16  # as large as the layer's output whose values are in memory at once, at most
NEAR = 1e-5  # relative: losses so close are computed again in float64 (float32's differ by 1e-7)


class _State:
    """A batch in the network, run up to a node; without a program, to be run from its inputs."""

    def __init__(self, batch: Batch, programs: GraphExecutors | None) -> None:
        self.batch, self.at = batch, 0
        self.program = None if programs is None else programs.find(batch)
        self.values = {} if self.program is None else self.program.inputs(batch)
        self._target: Target | None = None

    def advance(self, layer: str, tensors: Mapping[str, Tensor]) -> None:
        if self.program is not None:
            self.program.run(self.values, tensors, self.at, self.program.place[layer])
            self.at = self.program.place[layer]

    def outputs(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        if self.program is not None:
            return main_output(self.program.outputs(self.values, tensors, self.at))
        args, kwargs = self.batch.args, self.batch.kwargs
        return main_output(torch.func.functional_call(model, dict(tensors), args, kwargs))

    def target(self, criterion: Criterion, outputs: Tensor) -> Target:
        if self._target is None:
            self._target = target_of(criterion, outputs, self.batch.targets)
        return self._target


class _Loss:
    """The loss of outputs that come batch by batch, each rank's own.

    nothing: outputs (in the model's type) and targets of no samples, for a loss of the user's own
    """

    def __init__(self, criterion: Criterion, nothing: tuple[Tensor, Tensor | None]) -> None:
        self._criterion, self._outputs, self._targets = criterion, [nothing[0]], list[Tensor]()
        if nothing[1] is not None:
            self._targets.append(nothing[1])
        self.sum = torch.zeros((), dtype=torch.float64)
        self.mass = 0.0

    def add(self, state: _State, outputs: Tensor) -> None:
        if self._criterion.kind == "custom" and state.batch.targets is not None:
            self._outputs.append(outputs.to(self._outputs[0].dtype))
            self._targets.append(state.batch.targets)
            return
        target = state.target(self._criterion, outputs)
        columns = outputs.double().reshape(-1, target.outputs).T
        self.sum = self.sum.to(columns.device) + target.loss_sum(columns)
        self.mass += target.mass

    def of_function(self, ranks: Ranks) -> Tensor:
        """() of a function of the user's own; its derivatives are those in this rank's outputs."""
        own = torch.cat(self._outputs)
        outputs = ranks.parts("outputs", own.detach())
        outputs[ranks.rank] = own
        targets = ranks.parts("targets", torch.cat(self._targets))
        return loss_of_function(self._criterion.function, torch.cat(outputs), torch.cat(targets))


def _values(totals: Sequence[_Loss], criterion: Criterion, ranks: Ranks) -> Tensor:
    """The losses of all ranks' samples: (len(totals),) float64."""
    if criterion.kind == "custom":
        return torch.stack([total.of_function(ranks).detach().double().cpu() for total in totals])
    sums = torch.tensor([[float(total.sum), total.mass] for total in totals], dtype=torch.float64)
    ranks.sum("losses", sums)
    if not sums[:, 1].all():
        raise ValueError("data: every label is ignored, expected at least one that counts")
    return sums[:, 0] / sums[:, 1]


class Network:
    """A network whose layers get other weights, one after the other, and its loss on the data.

    traced: can torch.export's graph be asked for? Else the model runs from its inputs every time
    """

    def __init__(
        self, model: nn.Module, batches: Batches, criterion: Criterion, limit: int, bar: Any,
        traced: bool,
    ) -> None:  # fmt: skip
        self.model, self.criterion = model, criterion
        self._batches, self._limit, self._bar = batches, limit, bar
        self._tensors = tensors_of(model)
        self._programs: GraphExecutors | None = GraphExecutors(model) if traced else None
        self._layer: str | None = None
        self._tails: dict[GraphExecutor, Tail] = {}
        self._states: list[_State] | None = None  # None: run from the inputs every time
        self._changed: dict[str, Tensor] = {}
        self._traced, self._vmaps = traced, True
        self._exact: Network | None = None
        self._runs_exactly = True
        self.ranks, self.peers, first = batches.ranks, batches.peers, batches.first()
        outputs = main_output(run_model(model, first))
        targets = first.targets
        self._nothing = outputs[:0], None if targets is None else targets[:0]
        on_cpu = traced and batches.device.type == "cpu"
        self._splits = on_cpu and _is_separate(model, first, outputs)
        if self._programs is not None:
            try:
                self._programs.of(self._parts(first)[0])
            except OverwrittenError:
                self._programs, self._splits = None, False

    def exact(self) -> Network | None:
        """The same in float64; None where the model can't run in it: it has a `.float()`, say."""
        if self._exact is None and self._runs_exactly:
            model = copy.deepcopy(self.model).double()
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
        """Which of these layers runs first, and where that is."""
        if self._programs is None:
            return 0, layers[0]
        place = self._programs.of(self._parts(self._batches.first())[0]).place
        return min((place[name], name) for name in layers)

    def stop_before(self, layer: str) -> None:
        """What runs before this layer is computed once from here on; in the order of the graph."""
        self._layer, self._tails = layer, {}
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
        return self._tensors[f"{layer}.weight"]

    def weights_of(self, layer: LayerSelection) -> dict[str, Tensor]:
        """A layer's consumers' weights, once it is pruned."""
        return {name: masked_weight(self.weight(name), layer, name) for name in layer.outputs}

    def change(self, weights: Mapping[str, Tensor]) -> None:
        """The network has these weights from here on."""
        self._changed |= weights
        for name, weight in weights.items():
            self._tensors[f"{name}.weight"] = weight.to(self.weight(name))
        if self._exact is not None:
            self._exact.change(weights)

    def states_of(self, batch: Batch) -> list[_State]:
        """Samples up to the layer."""
        states = [_State(part, self._programs) for part in self._parts(batch)]
        for state in states:
            assert self._layer is not None
            state.advance(self._layer, self._tensors)
        return states

    def loss(self, weights: Mapping[str, Tensor], criterion: Criterion | None = None) -> float:
        """The loss on all data with these weights of some layers; criterion: another one."""
        tensors = self._tensors | {f"{name}.weight": each for name, each in weights.items()}
        criterion = criterion or self.criterion
        total = _Loss(criterion, self._nothing)
        for state in self._all():
            total.add(state, state.outputs(self.model, tensors))
        return float(_values([total], criterion, self.ranks))

    def losses(
        self, group: Group, factors: Tensor, candidates: Sequence[int | None], one: float,
        states: Iterable[_State] | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss with the units' outgoing weights times `factors`, and for each candidate with
        `one` more for it (None: as it is): (candidates,) float64; on all data, or some.
        """
        found = [_Loss(self.criterion, self._nothing) for _ in candidates]
        for state in self._all() if states is None else states:
            outputs = self._outputs(state, group, factors, candidates, one)
            for total, each in zip(found, outputs, strict=True):
                total.add(state, each)
        return _values(found, self.criterion, self.ranks)

    def slopes(
        self, group: Group, factors: Tensor, states: Iterable[_State] | None = None
    ) -> Tensor:
        """The loss's derivatives in the factors: (N,) float64."""
        leaf, total = factors.clone().requires_grad_(), _Loss(self.criterion, self._nothing)
        slopes, any_here = torch.zeros_like(factors), False
        for state in self._all() if states is None else states:
            any_here = True
            with torch.enable_grad():
                weights = self._scaled(group, leaf)
                total.add(state, state.outputs(self.model, self._tensors | weights))
            if total.sum.requires_grad:  # else the function of all outputs comes last
                slopes += torch.autograd.grad(total.sum, leaf)[0]
                total.sum = total.sum.detach()
        if self.criterion.kind == "custom":
            with torch.enable_grad():
                loss = total.of_function(self.ranks)
            if any_here:
                slopes = slope_in(leaf, loss)
            total.mass = 1 / self.ranks.size
        [mass] = self.ranks.sum_numbers("mass", total.mass)
        self.ranks.sum("slopes", slopes)
        return slopes / mass

    def _scaled(self, group: Group, factors: Tensor) -> dict[str, Tensor]:
        slices = ((name, group.slices[f"{name}.weight"]) for name in group.consumers)
        return {
            f"{name}.weight": scaled_weight(self.weight(name), at, factors) for name, at in slices
        }

    def _outputs(
        self, state: _State, group: Group, factors: Tensor, candidates: Sequence[int | None],
        one: float,
    ) -> Iterator[Tensor]:  # fmt: skip
        if state.program is not None and len(group.consumers) == 1:
            yield from self._through_tail(state, group, factors, candidates, one)
            return
        for unit in candidates:
            each = factors.clone()
            if unit is not None:
                each[unit] += one
            yield state.outputs(self.model, self._tensors | self._scaled(group, each))

    def _through_tail(
        self, state: _State, group: Group, factors: Tensor, candidates: Sequence[int | None],
        one: float,
    ) -> Iterator[Tensor]:  # fmt: skip
        program, name = state.program, group.consumer
        assert program is not None
        if program not in self._tails:
            self._tails[program] = Tail(program, name, self._tensors)
        tail, layer = self._tails[program], program.layers[name]
        at = group.slices[layer.weight]
        weight, bias = self.weight(name), self._tensors.get(layer.bias or "")
        prepared, inputs = tail.prepare(state.values), program.input_of(name, state.values, True)
        weight, bias = tail.scaled(weight, bias, layer.out_dim)
        base = program.linear_map(name, inputs, scaled_weight(weight, at, factors), bias)

        def output_of(unit: int | None) -> Tensor:
            if unit is None:
                return base.clone()
            own = at.entries(torch.tensor([unit]), group.units).to(inputs.device)
            more = program.linear_map(
                name, inputs.index_select(layer.channel_dim, own),
                weight.index_select(at.dim, own) * one, None,
            )  # fmt: skip
            return base + more

        def rest(output: Tensor) -> Tensor:
            return main_output(tail(output, prepared))

        together = self._together(base)
        for i in range(0, len(candidates), together):
            outputs = [output_of(unit) for unit in candidates[i : i + together]]
            if self._vmaps and len(outputs) > 1:
                try:
                    yield from torch.func.vmap(rest)(torch.stack(outputs))
                    continue
                except RuntimeError:  # vmap has no rule for one of the operations
                    self._vmaps = False
            yield from (rest(tail.laid_out(output)) for output in outputs)

    def _together(self, output: Tensor) -> int:
        """Candidates that run at once, with a layer's output as large as this."""
        fit = self._limit // (LAYERS * output.numel() * output.element_size())
        return max(1, min(fit, SAMPLES[output.device.type] // len(output)))

    def _all(self) -> Iterator[_State]:
        if self._states is not None:
            yield from self._states
            return
        held, kept = 0, list[_State]()
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


def _is_separate(model: nn.Module, batch: Batch, outputs: Tensor) -> bool:
    """Does the model give for parts of a batch what it gives for all of it?

    Not where it has no batch dimension, normalises over the batch, or takes more than a tensor with
    an entry a sample.
    """
    try:
        halves = [run_model(model, part) for part in batch.split(-(-(samples_of(batch) or 1) // 2))]
        return alike(outputs, torch.cat([main_output(half) for half in halves]))
    except (ValueError, RuntimeError):
        return False


class NetworkObjective:
    """README eq. 1 for a layer of a network, whose loss need not be convex in what it gives.

    scaled: the picked units' outgoing weights are times N c / k; else as they are
    batched: mini-batches of the data's samples, of which step k scores on one
    screen: only so many candidates, whose derivatives are the lowest; None: all
    """

    def __init__(
        self, network: Network, group: Group, scaled: bool, batched: Batched | None,
        samples: Batch | None, screen: int | None, steps: Steps,
    ) -> None:  # fmt: skip
        self.units, self._steps = group.units, steps
        self._network, self._group, self._scaled = network, group, scaled
        self._batched, self._samples, self._screen = batched, samples, screen
        self._counts = torch.zeros(group.units, dtype=torch.float64)
        self._loss = math.nan
        self._seen: dict[Network, tuple[int, list[_State]]] = {}

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        label = f"scores {k} {everywhere}"
        return self._steps.once(label, lambda: self._scores(k, candidates, everywhere))

    def _scores(self, k: int, candidates: Tensor, everywhere: bool) -> Tensor:
        found = torch.full((len(candidates),), math.inf, dtype=torch.float64)
        run = torch.arange(len(candidates))
        if self._screen is not None and self._screen < len(candidates):
            slopes = self._network.slopes(
                self._group, self._counts * self._one(k), self._states(self._network, k, everywhere)
            )
            run = slopes[candidates].argsort(stable=True)[: self._screen]
        found[run] = self._losses(self._network, k, candidates[run].tolist(), everywhere)
        near = found <= found.min() + NEAR * found.min().abs()
        dtype = self._network.weight(self._group.consumer).dtype
        tied = int(near.sum()) > 1 and dtype == torch.float32
        if tied and (exact := self._network.exact()) is not None:
            found[near] = self._losses(exact, k, candidates[near].tolist(), everywhere)
        return found

    def add(self, k: int, unit: int) -> None:
        self._counts[unit] += 1
        loss = self._steps.once(
            f"loss {k} {unit}", lambda: self._losses(self._network, k, [None], everywhere=True)
        )
        self._loss = float(loss)

    def loss(self, k: int) -> float:
        return self._loss

    def gap(self, k: int) -> float | None:
        return None  # nothing says that it is convex

    def _losses(
        self, network: Network, k: int, candidates: Sequence[int | None], everywhere: bool
    ) -> Tensor:
        one, states = self._one(k), self._states(network, k, everywhere)
        own = candidates[network.peers.part(len(candidates))]
        found = torch.zeros(0, dtype=torch.float64)
        if own:
            found = network.losses(self._group, self._counts * one, own, one, states)
        found = network.peers.joined("candidates", found)
        return found.nan_to_num(nan=math.inf, posinf=math.inf)  # inf - inf of what overflowed

    def _one(self, k: int) -> float:
        """What a pick counts for, in step k."""
        return self.units / k if self._scaled else 1.0

    def _states(self, network: Network, k: int, everywhere: bool) -> list[_State] | None:
        """The mini-batch of step k, up to the layer; None: all data."""
        if everywhere or self._batched is None or self._samples is None:
            return None
        if network not in self._seen or self._seen[network][0] != k:
            here = slice(int(self._batched.starts[k - 1]), int(self._batched.stops[k - 1]))
            batch = self._samples.take(self._batched.order[here])
            if network is not self._network:
                batch = batch.to(torch.float64)
            states = network.states_of(batch) if here.start < here.stop else []
            self._seen[network] = k, states
        return self._seen[network][1]
