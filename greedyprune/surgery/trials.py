"""Trial cuts: some units of groups are cut from a copy of the model, and the outputs compared.

A trial cut removes about half of the units. The smaller model has to give the outputs that the
model gives with these units masked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..data.batches import Batch
from ..data.forward import run_model, same_outputs
from ..data.random_state import preserving_random_state, seed_all
from ..graph.executor import GraphExecutor
from ..graph.export import without_cache
from ..graph.groups import Group
from ..graph.networks import tensors_of
from ..graph.queries import Given, visit_queries
from ..graph.refusals import without_layer
from ..graph.slices import Entries, NotPrunableError
from ..graph.structure import Structure
from ..graph.trace_errors import place_of
from ..graph.tracing import Graph
from ..runtime.errors import first_line
from .copying import check_functions
from .cut import cut, mask, selection_of_units
from .proof import holding, same_with_norms
from .remaining import entries_left
from .spare import Spare

# The dense model's executors, by whether they are for float64 (proof.same_with_norms).
Executors = dict[bool, GraphExecutor]
Units = tuple[tuple[str, int], ...]  # how many units of each group are kept, by its name
Trial = tuple[Units, tuple[object, ...]]  # and the attributes that are set with them
Shares = Mapping[str, float]  # of the units that groups keep, by their names
FEW_TOKENS = 64  # whose scores are measured
# Words in the messages of errors about a tensor's shape.
_SHAPE = re.compile(
    r"shape|size|dimension|\bdims?\b|channel|element|feature|length|\bheads?\b|to unpack", re.I
)


class FailedTrialError(NotPrunableError):
    """A ValueError: a group's units seem to be separate, but the model does not work without some.

    The message names the layer and says what goes wrong.
    """


class Trials:
    """Trial cuts of one model on one batch, which share the traces of the dense model."""

    def __init__(self, model: nn.Module, batch: Batch, graph: Graph | None = None) -> None:
        check_functions(model)
        kwargs = without_cache(model, batch.kwargs)
        self._model, self._batch = model, replace(batch, kwargs=kwargs, targets=None)
        try:
            self._spare = Spare(model)
        except ValueError:  # the trace may have left tensors without numbers in the model
            run_model(model, self._batch)
            self._spare = Spare(model)
        self._executors = Executors()
        if graph is not None:
            self._executors[False] = GraphExecutor(model, self._batch, graph=graph)
        self._fewest = list[set[str]]()  # of attributes with which groups could be cut
        self._factors = dict[str, float]()  # of parameters, by name
        self._known = dict[tuple[Trial, bool], ValueError | None]()  # how trials have ended
        self._ran = dict[Trial, object]()  # the last smaller model's outputs
        self._expected = dict[Units, object]()  # the dense model's, with units masked
        self.gave_other_outputs = False  # has a smaller model run since this was set to False?

    def sharpen(self, groups: Sequence[Group]) -> None:
        """Makes the attention of these groups' query-key units sharp in all trials.

        With the small random weights of an untrained network, attention is nearly the mean of all
        values, whatever the scores are. Then no trial could see whether they are right. So queries
        and keys are multiplied until the scores' standard deviation is 3 times the root of the
        size of heads, which most code divides by.
        """
        if False not in self._executors:
            self._executors[False] = GraphExecutor(self._model, self._batch)
        executor, spread = self._executors[False], dict[str, float]()

        def measure(name: str, query: Given, key: Given) -> None:
            scores = (query.tensor[..., :FEW_TOKENS, :] @ key.tensor.mT).float()
            size = query.tensor.shape[-1]
            spread[name] = float(scores.std(-1, correction=0).mean()) / size**0.5

        names = {name for group in groups for name in group.scores}
        tensors = tensors_of(self._model)
        visit_queries(executor, self._batch, tensors, names, measure)
        for group in groups:
            least = min((spread[name] for name in group.scores), default=math.inf)
            factor = max(1.0, math.sqrt(3 / max(least, 1e-6)))
            self._factors |= dict.fromkeys(group.tied if group.scores else (), factor)
        self._known.clear()
        self._expected.clear()

    def cut(self, groups: Sequence[Group]) -> None:
        """Raises an error about the first group unless the smaller model gives the right outputs.

        Each group keeps another share of its units, so that groups that the model needs in one
        share are found.
        """
        if error := self._error_of(groups):
            raise error

    def _passes(
        self, groups: Sequence[Group], shares: Shares | None = None, *, compare: bool = True
    ) -> bool:
        error = self._error_of(groups, shares, compare)
        self.gave_other_outputs |= "gives other outputs" in str(error)
        return error is None

    def _error_of(
        self, groups: Sequence[Group], shares: Shares | None = None, compare: bool = True
    ) -> ValueError | None:
        """What is wrong with the smaller model, in an error about the first group; None: nothing.

        No trial is made twice.

        shares: of the units that each group keeps; None: another one for each group
        compare: does the smaller model have to give the right outputs, too? If not, it has to run
        """
        counts = _different(groups)
        if shares is not None:
            counts = [round(shares[each.producer] * each.units) for each in groups]
        units = tuple(zip((each.producer for each in groups), counts, strict=True))
        trial = units, tuple((tuple(each.sizes), tuple(each.rescaled)) for each in groups)
        known = self._known
        if (trial, compare) not in known:
            try:
                self._try(groups, trial, compare)
                known[trial, False] = known[trial, compare] = None
            except ValueError as error:
                # A new one: the frames of its traceback would keep the model alive.
                known[trial, compare] = type(error)(str(error))
        return known[trial, compare]

    def _try(self, groups: Sequence[Group], trial: Trial, compare: bool) -> None:
        """Raises what is wrong with the smaller model."""
        model, batch, units = self._model, self._batch, trial[0]
        has_run = compare and trial in self._ran and units in self._expected
        if has_run and same_outputs(self._expected[units], self._ran[trial], batch.padding):
            return
        small, weights, left = self._smaller(groups, [count for _, count in units])
        with preserving_random_state([]), _WithoutDropout():
            seed_all()
            try:
                outputs = small(*batch.args, **batch.kwargs)
            except Exception as error:
                raise _failure(groups[0], small, error) from error
            self._ran = {trial: outputs}
            if not compare:
                return
            if units not in self._expected:
                with holding(model, weights):
                    seed_all()
                    self._expected = {units: run_model(model, batch)}
        expected = self._expected[units]
        if same_outputs(expected, outputs, batch.padding) or same_with_norms(
            model, weights, small, batch, left, self._executors
        ):
            return
        reason = f"something between it and {groups[0].takers} mixes them"
        raise FailedTrialError(
            f"layer {groups[0].producer!r}: cutting units gives other outputs than masking them: "
            f"{_constants_of(groups[0]) or reason}"
        )

    def _smaller(
        self, groups: Sequence[Group], counts: Sequence[int]
    ) -> tuple[nn.Module, dict[str, Tensor], Entries]:
        """The smaller model, the dense one's tensors with these units masked, and what is left.

        The smaller model is valid until the next call.
        """
        kept = [
            (each, torch.arange(count) * each.units // count)
            for each, count in zip(groups, counts, strict=True)
        ]
        selection = selection_of_units(self._model, kept)
        cut_tensors = {name for each in groups for name in each.slices} | self._factors.keys()
        full = self._spare.restored(cut_tensors)
        mask(full, selection)
        for name, factor in self._factors.items():
            parameter = full.get_parameter(name)
            parameter.data = parameter.data * factor
        weights = {n: t.data for n, t in tensors_of(full).items() if n in cut_tensors}
        return cut(full, selection), weights, entries_left(selection.layers.values())

    def cuttable(
        self, groups: Sequence[Group], shares: Shares | None = None, few: bool | None = None
    ) -> list[Group]:
        """The groups with the fewest `sizes` with which they can be cut together; else none.

        few: as for `_with_fewest_sizes`; None: where more trials, of fewer groups, follow
        """
        plain = _with_sizes(groups, set())
        if self._passes(plain, shares):
            return plain
        if few is None:  # where several fail in different shares, trials of fewer groups follow
            few = len(groups) > 1 and shares is None
        return self._with_fewest_sizes(groups, shares, few=few)

    def _with_fewest_sizes(
        self, groups: Sequence[Group], shares: Shares | None, *, few: bool
    ) -> list[Group]:
        """The same for groups that can't be cut without `sizes`.

        Attributes of the same modules of several blocks are set together or not at all.

        few: try only all of them at once
        """
        names = {general(name): None for group in groups for name in group.sizes}
        for known in sorted(self._fewest, key=len):  # of groups that were cut before
            if known <= names.keys() and self._passes(_with_sizes(groups, known), shares):
                return _with_sizes(groups, known)
        sets = [tuple(names)]
        if not few:
            sets += [*(tuple(n for n in names if n != out) for out in names), *zip(names)]
        for tried in filter(None, dict.fromkeys(sets)):
            if self._passes(_with_sizes(groups, {*tried}), shares):
                fewest = {*tried}
                if len(tried) > 1:
                    fewest = self._needed(groups, tried, shares, compare=False)
                    if not self._passes(_with_sizes(groups, fewest), shares):
                        fewest = self._needed(groups, tried, shares, compare=True)
                if fewest not in self._fewest:
                    self._fewest.append(fewest)
                return _with_sizes(groups, fewest)
        return []

    def _needed(
        self, groups: Sequence[Group], names: Sequence[str], shares: Shares | None, *, compare: bool
    ) -> set[str]:
        """Those of the names without which the smaller model fails; or gives other outputs."""
        needed = {*names}
        for name in names if len(names) > 1 else ():
            if self._passes(_with_sizes(groups, needed - {name}), shares, compare=compare):
                needed.remove(name)
        return needed

    def cuttable_alone(self, group: Group) -> Group | NotPrunableError:
        """The group with the fewest `sizes`; or why it can't be cut without any."""
        [plain] = _with_sizes([group], set())
        reason = self.failure_of(plain)
        if reason is None:
            return plain
        return next(iter(self._with_fewest_sizes([group], None, few=False)), reason)

    def failure_of(self, group: Group) -> FailedTrialError | None:
        """Why a group can't be cut alone; None: it can."""
        error = self._error_of([group])
        if error is None or isinstance(error, FailedTrialError):
            return error
        raise error

    def each_cuttable(self, groups: Sequence[Group]) -> Structure:
        """The same for each of several groups that the same code cuts, by its first producer.

        Once two can't be cut with any of their `sizes`, the others are tried with all of theirs:
        together, and if that fails one by one.
        """
        result: dict[str, Group | NotPrunableError] = {}
        rest = [*groups]
        while rest and sum(isinstance(each, NotPrunableError) for each in result.values()) < 2:
            group = rest.pop(0)
            result[group.producer] = self.cuttable_alone(group)
        if len(rest) > 1 and (found := self.cuttable(rest)):
            return result | {group.producer: group for group in found}
        failed = [each for each in result.items() if isinstance(each[1], NotPrunableError)]
        for group in rest:
            [plain] = _with_sizes([group], set())
            if self._passes([plain]):
                result[group.producer] = plain
            elif found := self._with_fewest_sizes([group], None, few=True):
                result[group.producer] = found[0]
            else:  # for the same reason, in the same code
                result[group.producer] = for_layer(group.producer, *failed[0])
        return result

    def cuttable_in_one_share(self, *sets: Sequence[Group], few: bool | None = None) -> list[Group]:
        """The groups, if those of each set can be cut to one share of their units; else none."""
        groups, shares = list[Group](), dict[str, float]()
        for i, one_set in enumerate(sets):
            parts = math.gcd(*(group.units for group in one_set))
            if parts == 1:
                return []
            names = tuple(group.producer for group in one_set)
            groups += [replace(group, share=names) for group in one_set]
            left = (parts + 1) // 2 + (i % 2 if parts > 3 else 0)  # neighbours keep different ones
            shares |= dict.fromkeys(names, left / parts)
        return self.cuttable(groups, shares, few)


def for_layer(other: str, layer: str, error: object) -> FailedTrialError:
    """The error about a layer for one of the same code in another block."""
    blocks = (re.match(r"(.*?\d+\.)?", name) for name in (layer, other))
    first, second = (block[0] if block else "" for block in blocks)
    reason = without_layer(error)
    if first:
        reason = reason.replace(f"'{first}", f"'{second}")
    return FailedTrialError(f"layer {other!r}: {reason}")


def general(name: str) -> str:
    """A name without its numbers: the same for all blocks. The "[i]" of an entry stays."""
    return re.sub(r"\d+(?!\d*\]$)", "*", name)


def _with_sizes(groups: Sequence[Group], names: Set[str]) -> list[Group]:
    """The groups with those of their `sizes` that have these names in general."""
    return [
        replace(group, sizes={n: at for n, at in group.sizes.items() if general(n) in names})
        for group in groups
    ]


def _different(groups: Sequence[Group]) -> list[int]:
    """How many units each group keeps: about a third to three quarters.

    Where they can, groups of different numbers of units keep different shares, and neighbours of
    equal numbers of units different numbers. So groups that need one share are found. Groups of few
    units, which have the fewest shares, come first.
    """
    counts, last, used = dict[int, int](), dict[int, int](), dict[Fraction, int]()
    for i, group in sorted(enumerate(groups), key=lambda numbered: numbered[1].units):
        units = group.units
        wanted = (1 / 3 + 5 / 12 * ((0.4 + i * 0.618) % 1)) * units
        around = range(max(1, int(wanted) - 4), max(2, min(units, int(wanted) + 5)))
        nearest = sorted(around, key=lambda count: abs(count - wanted))
        free = [
            count for count in nearest
            if count != last.get(units) and used.get(Fraction(count, units), units) == units
        ]  # fmt: skip
        counts[i] = last[units] = (free or nearest)[0]
        used.setdefault(Fraction(counts[i], units), units)
    return [counts[i] for i in range(len(groups))]


def _constants_of(group: Group) -> str:
    """What is known of operations that may have the number of units as a constant."""
    places = " or ".join(dict.fromkeys(group.may_hold_size))
    return f"{places} may have their number as a constant" if places else ""


def _failure(group: Group, small: nn.Module, error: Exception) -> ValueError:
    """The error for a smaller model that raises."""
    what = first_line(error) + place_of(small, error)
    kinds = RuntimeError, ValueError, IndexError
    if isinstance(error, AssertionError) or (
        isinstance(error, kinds) and _SHAPE.search(str(error))
    ):
        reason = ": ".join(filter(None, (_constants_of(group), what)))
        return FailedTrialError(
            f"layer {group.producer!r}: with fewer units the model fails: {reason}"
        )
    return ValueError(
        f"model: with half of the units of layer {group.producer!r} it raises "
        f"{type(error).__name__} ({what}), expected a forward that runs with any number of units, "
        "or other layers named in `layers`"
    )


class _WithoutDropout(TorchFunctionMode):
    """Inside, dropout keeps everything: what it draws depends on the number of units.

    Only dropout that a forward applies in eval mode, too, is left.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if "dropout" in getattr(function, "__name__", ""):
            return args[0] if args else options["input"]
        return function(*args, **options)
