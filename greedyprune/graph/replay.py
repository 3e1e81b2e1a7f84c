"""Two copies of a network run side by side, the dense one and the one pruned so far.

Both go through torch.export's graph a piece at a time (program.py), so that a whole network is
selected layer by layer in one pass of each: between two layers every batch's live values are kept,
or, where those do not fit in memory, computed again from the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..data.batches import Batch, Batches
from ..runtime.resume import Pass
from .executor import Ahead, Program, Programs, Values, bytes_held, tensors_of
from .propagate import Layer


class _State:
    """One batch in both networks, run up to the same node; `pruned` is None while they agree."""

    def __init__(self, batch: Batch, program: Program) -> None:
        self.program, self.at, self.mark = program, 0, batch.mark
        self.dense = program.inputs(batch)
        self.pruned: Values | None = None

    @property
    def bytes(self) -> int:
        return bytes_held([self.dense, self.pruned or {}])

    def advance(self, to: int, dense: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> None:
        if self.pruned is not None:
            self.program.run(self.pruned, pruned, self.at, to)
        self.program.run(self.dense, dense, self.at, to)
        self.at = to


class Replay:
    """All batches, advanced from layer to layer."""

    def __init__(self, model: nn.Module, batches: Batches, limit: int) -> None:
        self._batches, self._limit, self.ranks = batches, limit, batches.ranks
        self._dense = tensors_of(model)
        self._changed: dict[str, Tensor] = {}
        self._first_change: str | None = None
        self._programs = Programs(model)
        self._states: list[_State] | None = None  # None: computed from the inputs in every pass

    def order(self, names: Sequence[str]) -> dict[str, int]:
        """Where in the graph each of these layers runs."""
        place = self._programs.of(self._batches.first()).place
        return {name: place[name] for name in names}

    def after_changes(self) -> list[Layer]:
        """The layers with weights of their own that run once something has changed, in order."""
        program, first = self._programs.of(self._batches.first()), self._first_change
        return [
            layer for i, layer in program.refittable.items()
            if first is not None and i >= program.place[first]
        ]  # fmt: skip

    def ahead(self, layer: str) -> Ahead:
        return self._programs.of(self._batches.first()).ahead[layer]

    def change(self, layer: str, **tensors: Tensor) -> None:
        """The pruned network has this weight or bias from here on; in the order of the graph."""
        self._changed |= {f"{layer}.{name}": tensor for name, tensor in tensors.items()}
        self._first_change = self._first_change or layer
        for state in self._states or []:
            if state.pruned is None:
                state.pruned = dict(state.dense)

    def visit(
        self, layers: Sequence[str], add: Callable[[str, Tensor, Tensor], None], bar: Any,
        resumed: Pass,
    ) -> None:  # fmt: skip
        """add(layer, its input in the pruned network, what it should give) for each batch.

        That is its output in the dense network, and where it is added to a shortcut, what the
        pruned network's shortcut lacks.

        Leaves both networks just before the first of the layers.

        resumed: knows the batches that are added already
        """
        layers = sorted(layers, key=self.order(layers).__getitem__)
        for state in self._all(bar):
            place = state.program.place
            pruned = self._dense | self._changed
            state.advance(place[layers[0]], self._dense, pruned)
            if resumed.contains(state.mark):
                continue
            dense_values, at = dict(state.dense), state.at
            other = dict(state.dense if state.pruned is None else state.pruned)
            for layer in layers:
                state.program.run(other, pruned, at, place[layer])
                state.program.run(dense_values, self._dense, at, place[layer])
                found = state.program.operands(other, layer)
                node_values = dict(dense_values)
                state.program.run(node_values, self._dense, place[layer], place[layer] + 1)
                wanted = state.program.output(node_values, layer)
                if state.pruned is not None:
                    weights = self._dense, pruned
                    lack = state.program.missing(layer, dense_values, other, weights)
                    wanted = wanted if lack is None else wanted + lack
                add(layer, found, wanted)
                at = place[layer]
            resumed.added()
        resumed.end()

    def errors(self, layer: str, bar: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """A layer's input in the pruned network and its output's error there, for each batch."""
        for state in self._all(bar):
            program, pruned = state.program, self._dense | self._changed
            state.advance(program.place[layer], self._dense, pruned)
            values = state.pruned or state.dense
            error = program.error(layer, state.dense, values, (self._dense, pruned))
            yield program.operands(values, layer), error

    def _all(self, bar: Any) -> Iterator[_State]:
        """Every batch where it was left, or from its inputs."""
        if self._states is not None:
            yield from self._held(bar)
            return
        fresh, held, kept = not self._changed, 0, list[_State]()
        for batch in bar(self._batches, "activations"):
            state = _State(batch, self._programs.of(batch))
            if not fresh:
                first = self._first_change
                assert first is not None
                state.advance(state.program.place[first], self._dense, self._dense)
                state.pruned = dict(state.dense)
            yield state
            held += state.bytes
            if held > self._limit:
                kept.clear()
            else:
                kept.append(state)
        if held <= self._limit:
            self._states = kept

    def _held(self, bar: Any) -> Iterator[_State]:
        """Every batch where it was left; none are kept once they grow too large on the way."""
        assert self._states is not None
        states: list[_State | None] = [*self._states]
        held, fits = sum(state.bytes for state in self._states), True
        self._states = None
        for i, state in enumerate(bar(states, "activations")):
            held -= state.bytes
            yield state
            held += state.bytes
            fits = fits and held <= self._limit
            if not fits:
                states[: i + 1] = [None] * (i + 1)
        if fits:
            self._states = [state for state in states if state is not None]
