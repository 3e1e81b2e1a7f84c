"""Two copies of a network run side by side: the dense one and the one pruned so far.

Both run through the exported graph from layer to layer (executor.py), so that a whole network is
selected in one pass through each copy. Between two layers the values of the batches are kept; those
that do not fit in memory are computed again from the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..data.batches import Batch, Batches
from ..data.forward import not_run
from ..data.parts import Parts
from ..data.positions import Draws
from ..runtime.progress import Bar
from ..runtime.resume import Pass
from .executor import GraphExecutor
from .executors import GraphExecutors
from .groups import Group
from .linear_paths import LinearPath
from .names import layer_name, weight_name
from .networks import Network, Values, bytes_held, tensors_of
from .slices import Entries
from .tracing import Layer


class BothInputs(NamedTuple):
    """What a layer receives in both networks, and what is added to its output.

    shortcuts: of the dense network and the pruned one, in the shape of the layer's output; empty
        where nothing is added, or the same in both
    path: what the output goes through before the shortcut is added
    """

    dense: Tensor
    pruned: Tensor
    shortcuts: list[Tensor]
    path: LinearPath


class PathValues(NamedTuple):
    """What a layer and its linear path receive of one batch.

    inputs: the layer's; shortcuts are among them where no ReLU follows the path
    ends:   where a ReLU follows: the values at the path's end in the dense network and in the
        pruned one, in the shape of the layer's output; empty where something is `known`
    known:  what the caller keeps of the batch from one round to the next of the same layer. It is
        empty in the first one, and where the batch did not fit in memory
    draws, mask: of the samples, and which positions (m, T) count; None: all
    """

    inputs: BothInputs
    ends: list[Tensor]
    known: list[Tensor]
    draws: Draws
    mask: Tensor | None


Add = Callable[[str, BothInputs, Draws, Tensor | None], None]


class _State:
    """One batch in both networks, run up to the same node; `pruned` is None while they agree."""

    def __init__(self, batch: Batch, executor: GraphExecutor) -> None:
        self.executor, self.at, self.mark = executor, 0, batch.mark
        self.draws, self.padding = Draws.of(batch), batch.padding
        self.dense = executor.inputs(batch)
        self.pruned: Values | None = None
        self.known = list[Tensor]()  # what a caller keeps of the layer that the networks are at

    @property
    def bytes(self) -> int:
        known = sum(tensor.nbytes for tensor in self.known)
        return bytes_held([self.dense, self.pruned or {}]) + known

    def advance(self, to: int, dense: Network, pruned: Network) -> None:
        """Runs both networks up to node `to`."""
        if to != self.at:
            self.known.clear()
        if self.pruned is not None:
            self.executor.run(self.pruned, pruned, self.at, to)
        self.executor.run(self.dense, dense, self.at, to)
        self.at = to

    def separate(self) -> None:
        """From here on the two networks differ."""
        if self.pruned is None:
            self.pruned = dict(self.dense)


class Replay:
    """All batches in both networks, advanced from layer to layer.

    limit: bytes that the values between two layers may take, of all batches together

    Raises ValueError for too many shapes.
    """

    def __init__(self, model: nn.Module, batches: Batches, limit: int) -> None:
        self._model, self._batches, self._limit = model, batches, limit
        self.ranks = batches.ranks
        self._parts = Parts(model, batches)
        self._dense = Network(tensors_of(model))
        self._pruned: Network | None = None  # None: it has changed
        self._changed: dict[str, Tensor] = {}
        self._used: dict[str, Tensor] = {}
        self._left: Entries = {}
        self._first_layer: str | None = None  # that was changed
        self._differs_from_start = False
        self._executors = GraphExecutors(model)
        self._states: list[_State | None] = []  # by batch; None: computed again in every pass

    def _first_executor(self) -> GraphExecutor:
        return self._executors.of(self._parts.first())

    def order(self, names: Sequence[str]) -> dict[str, int]:
        """At which place in the graph each of these layers runs."""
        place = self._first_executor().place
        return {name: place[name] for name in names}

    def in_order(
        self, changes: Iterable[Mapping[str, Tensor]]
    ) -> list[tuple[str, Mapping[str, Tensor]]]:
        """Changed tensors by the first layer that they concern, in the order that these run in."""
        place, result = self._first_executor().place, list[tuple[str, Mapping[str, Tensor]]]()
        for tensors in changes:
            layers = [layer_name(name) for name in tensors if layer_name(name) in place]
            result.append((min(layers, key=place.__getitem__, default=next(iter(place))), tensors))
        return sorted(result, key=lambda change: place[change[0]])

    def start_of(self, group: Group) -> int:
        """The place of the first node that does something else without units of a group."""
        return self._first_executor().start_of(group.consumers, group.without_units)

    def after_changes(self) -> list[Layer]:
        """The layers from the first changed one on, in order, whose weights nothing else uses."""
        if self._first_layer is None:
            return []
        executor = self._first_executor()
        first = self._first_change(executor)
        return [
            layer for i, layer in executor.refittable.items()
            if i >= first and not executor.goes_over(layer, self._left)
        ]  # fmt: skip

    def _first_change(self, executor: GraphExecutor) -> int:
        """The place from which on the two networks differ."""
        if self._differs_from_start:
            return 0
        layers = [] if self._first_layer is None else [self._first_layer]
        return executor.start_of(layers, self._left)

    def linear_path(self, layer: str) -> LinearPath:
        return self._first_executor().linear_paths[layer]

    def change(self, layer: str, tensors: Mapping[str, Tensor]) -> None:
        """Gives a layer of the pruned network these weights and biases, by their names.

        Layers are changed in the order in which they run.
        """
        self._changed |= tensors
        self._pruned, self._first_layer = None, self._first_layer or layer
        self._used |= self._first_executor().inputs_used(tensors)
        for state in self._states:
            if state is not None:
                state.separate()

    def keep_only(self, left: Entries) -> None:
        """Only these entries have a part in the pruned network's norms and recurrences.

        A layer is changed next. The networks have not run beyond the first of the norms and
        recurrences that this concerns.
        """
        self._left, self._pruned = left, None

    def change_all(self, tensors: Mapping[str, Tensor]) -> None:
        """Gives layers anywhere in the pruned network these tensors, before any has run."""
        self._changed |= tensors
        self._differs_from_start, self._pruned = True, None

    def maps(self, layer: Layer) -> list[tuple[Tensor, Tensor | None]]:
        """A layer's weight and bias, if it has one, in the dense network and the pruned one."""
        return [
            (tensors[layer.weight], None if layer.bias is None else tensors[layer.bias])
            for tensors, *_ in self._networks()
        ]

    def weight(self, layer: str) -> Tensor:
        """A layer's weight in the pruned network."""
        name = weight_name(self._model, layer)
        return self._changed.get(name, self._dense.tensors[name])

    def _networks(self) -> tuple[Network, Network]:
        """The dense network and the pruned one."""
        if self._pruned is None:
            tensors = {**self._dense.tensors, **self._changed}
            self._pruned = Network(tensors, self._left, self._used)
        return self._dense, self._pruned

    @property
    def samples(self) -> int:
        """How many samples the data have; 0: it is unknown."""
        return self._batches.samples

    @property
    def changed(self) -> list[str]:
        """The names of the tensors that have changed."""
        return list(self._changed)

    def visit(
        self, layers: Sequence[str], add: Add, bar: Bar, resumed: Pass, left: Entries | None = None
    ) -> None:
        """Calls add(layer, inputs, draws, mask) for all these layers and batches.

        The draws are those of the samples. The mask (m, T) says which positions count; None: all.

        Leaves both networks just before the first of the layers, and of the norms and recurrences
        over units that would not be `left`.

        resumed: the pass over the data; its batches that were added before are left out
        """
        layers = sorted(layers, key=self.order(layers).__getitem__)
        networks = self._networks()
        for state in self._all(bar):
            state.advance(state.executor.start_of(layers, left or {}), *networks)
            if resumed.contains(state.mark):
                continue
            self._visit_batch(state, layers, networks, add)
            resumed.added()
        resumed.end()

    def _visit_batch(
        self, state: _State, layers: Sequence[str], networks: tuple[Network, Network], add: Add
    ) -> None:
        executor, at = state.executor, state.at
        dense_network, pruned_network = networks
        dense = dict(state.dense)
        pruned = dict(state.dense if state.pruned is None else state.pruned)
        for layer in layers:
            place = _place(executor, layer)
            executor.run(pruned, pruned_network, at, place)
            executor.run(dense, dense_network, at, place)
            inputs = self._inputs(executor, layer, dense, pruned, state.pruned is not None)
            add(layer, inputs, state.draws, executor.mask_of(layer, state.padding))
            at = place

    def visit_path(self, layer: str, bar: Bar) -> Iterator[PathValues]:
        """What a layer and its linear path receive, of every batch."""
        for state in self._all(bar):
            networks, executor = self._networks(), state.executor
            state.advance(_place(executor, layer), *networks)
            dense, pruned = state.dense, state.pruned or state.dense
            path, ends = executor.linear_paths[layer], list[Tensor]()
            if path.rectified and not state.known:
                ends = executor.ends(layer, dense, pruned, networks)
            inputs = self._inputs(executor, layer, dense, pruned, not path.rectified)
            mask = executor.mask_of(layer, state.padding)
            yield PathValues(inputs, ends, state.known, state.draws, mask)

    def _inputs(
        self, executor: GraphExecutor, layer: str, dense: Values, pruned: Values, shortcuts: bool
    ) -> BothInputs:
        """A layer's inputs, from the networks' values before it, with or without the shortcuts."""
        return BothInputs(
            executor.input_of(layer, dense), executor.input_of(layer, pruned),
            executor.shortcuts(layer, dense, pruned, self._networks()) if shortcuts else [],
            executor.linear_paths[layer],
        )  # fmt: skip

    def _all(self, bar: Bar) -> Iterator[_State]:
        """Every part of a batch, at the layer where the last pass left it or at the first change.

        As many parts as `limit` allows are held from one pass to the next.
        """
        held = sum(state.bytes for state in self._states if state is not None)
        whole = bool(self._states) and None not in self._states
        unchanged, states = not self._changed, list[_State | None]()
        source: Iterable[Batch | None] = (
            [None] * len(self._states) if whole else self._parts.all(bar)
        )
        for i, batch in enumerate(bar(source, "activations") if whole else source):
            state = self._states[i] if i < len(self._states) else None
            if state is not None:
                self._states[i] = None
                held -= state.bytes
            if batch is not None and (state is None or state.mark != batch.mark):
                state = _State(batch, self._executors.of(batch))
                if not unchanged:
                    state.advance(self._first_change(state.executor), self._dense, self._dense)
                    state.separate()
            assert state is not None
            yield state
            fits = held + state.bytes <= self._limit
            held += state.bytes * fits
            states.append(state if fits else None)
        self._states = states


def _place(executor: GraphExecutor, layer: str) -> int:
    """At which place in the graph a layer runs; ValueError where the batch does not run it."""
    if layer not in executor.place:
        raise not_run(layer)
    return executor.place[layer]
