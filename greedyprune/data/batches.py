"""Any data that a training loop can use, as batches on the model's device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..runtime.distributed import ALONE, Ranks
from ..runtime.sparse import held_tensors
from .batch import Batch as Batch
from .batch import samples_of as samples_of
from .padding import AUTO, Padding, padding_of, visible
from .sequence_models import (
    IGNORED,
    LABELS,
    accepts,
    decoder_layers,
    inputs_of_labels,
    is_encoder_decoder,
    shifted,
    shifts_labels,
    time_first_layers,
)
from .sources import batches_in, random_states, samples_in_all, tensor_of
from .targets import parsed

TARGET_KEYS = ("labels", "label", "targets", "target", "y")


def example_batch(example: object) -> Batch:
    """The argument `example`, inputs for one forward pass, as a batch; TypeError for others."""
    if isinstance(example, Tensor):
        return Batch((example,), {}, None)
    if isinstance(example, Mapping):
        return Batch((), {str(name): value for name, value in example.items()}, None)
    if isinstance(example, (tuple, list)):
        return Batch(tuple(example), {}, None)
    raise TypeError(
        f"example: found {type(example).__name__}, expected a tensor, a tuple of the forward's "
        "arguments or a dict of keyword arguments"
    )


def placed(batch: Batch, model: nn.Module) -> Batch:
    """The inputs of a batch on the model's device and, where they are floats, in its dtype."""
    return replace(batch, targets=None).map(Batches((), model)._move)


class Batches:
    """Iterates over `data` as batches; `len` is known for tensors, Datasets and DataLoaders.

    Raises ValueError for data without samples and TypeError for values that are no data. An
    iterator, such as a generator, has one pass; a second one raises ValueError.

    ranks: the processes that the samples are spread over: each brings its own part of the data
    mask:  the argument of `select`: which entry of a batch says what positions count
    """

    def __init__(
        self, data: object, model: nn.Module, ranks: Ranks = ALONE, mask: str | None = AUTO
    ) -> None:
        self._model, self._mask = model, mask
        self._decoder_layers: frozenset[str] | None = None
        self.ignored: int | None = IGNORED  # what hidden positions' labels become; None: they stay
        self._has_labels = False  # are the targets a dict's "labels"?
        self.shift = False  # is each position's label the next one's?
        tensors = [*model.parameters(), *model.buffers()]
        self._device = tensors[0].device if tensors else torch.device("cpu")
        self.on_gpu = self._device.type == "cuda"  # the model, or data that was read
        types = {p.dtype for p in model.parameters() if p.is_floating_point()}
        self._dtype = types.pop() if len(types) == 1 else None
        self._source = batches_in(data)
        self._once = isinstance(self._source, Iterator)
        self.started = False  # has the only pass of an iterator begun?
        self._first: Batch | None = None
        self.ranks = ranks
        self.empty = False  # this rank has no samples; its `first` is another rank's
        self.samples = 0  # of all ranks, or slightly more, once `share_first` ran; 0: unknown
        self._chosen: Callable[[Batch], Tensor] | None = None  # which samples a pass has
        # Sees every batch of a pass, if it is set.
        self.watch: Callable[[Iterator[Batch]], Iterator[Batch]] | None = None
        self._random, self._repeats = random_states(self._source), False

    def of(self, model: nn.Module) -> Batches:
        """The same data for another model."""
        other = Batches(self._source, model, self.ranks, self._mask)
        other.empty, other._decoder_layers = self.empty, self._decoder_layers
        other.samples = self.samples
        other.ignored, other.shift = self.ignored, self.shift
        other._has_labels = self._has_labels
        other._random, other._repeats = self._random, self._repeats
        if self.empty:
            other._first = self._unprepared().map(other._move)
        return other

    def where(self, chosen: Callable[[Batch], Tensor]) -> Batches:
        """The same data, with only the samples of each batch for which chosen(batch) is true.

        `first` is still the first batch of all samples.
        """
        other = self.of(self._model)
        other._chosen = chosen
        return other

    def share_first(self) -> Batch:
        """The first batch, on a rank without samples that of another rank.

        ValueError where no rank has samples.
        """
        first = self._first_or_none()
        has = self.ranks.gather("whether there are samples", first is not None)
        if any(has) and not all(has):
            shared = first and first.on(torch.device("cpu"))
            shared = self.ranks.from_rank(has.index(True), "a batch", shared)
            self.empty = first is None
            if shared is not None and self.empty:
                self._first = shared.map(self._move)
        counts = self.ranks.gather("samples", self._count())
        self.samples = 0 if None in counts else sum(filter(None, counts))
        return self.first()

    def _count(self) -> int | None:
        """How many samples this rank has, or slightly more; None: it is unknown."""
        if self.empty or self._first is None:
            return 0
        known = samples_in_all(self._source)
        of_first = samples_of(self._first)
        return known if known is not None or not of_first else len(self) * of_first or None

    def repeat(self) -> None:
        """Gives every pass of a DataLoader the same order and random numbers from now on."""
        self._repeats = True

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def once(self) -> bool:
        return self._once

    def __len__(self) -> int:
        """The number of batches, or slightly more; 0 where it is unknown."""
        try:
            return len(self._source)  # type: ignore[arg-type]
        except TypeError:
            return 0

    def own_loss_shifts(self) -> bool:
        """Does the model's own loss shift this data's labels (see `shifts_labels`)?"""
        assert not self.shift
        return self._has_labels and shifts_labels(self._model, self.first())

    def first(self) -> Batch:
        """The first batch; a pass still begins with it."""
        return self._prepared(self._unprepared())

    def _unprepared(self) -> Batch:
        first = self._first_or_none()
        if first is None:
            raise ValueError("data: found no samples, expected at least one")
        return first

    def _first_or_none(self) -> Batch | None:
        if self._first is None:
            batches = self._read()
            self._first = next(batches, None)
            self._rest = batches if self._once else None
        return self._first

    def __iter__(self) -> Iterator[Batch]:
        if self.empty:
            return iter(())
        return self._pass() if self.watch is None else self.watch(self._pass())

    def _pass(self) -> Iterator[Batch]:
        if not self._once:
            batches, chosen = map(self._prepared, self._read()), self._chosen
            if chosen is None:
                return batches
            parts = (batch.only(chosen(batch)) for batch in batches)
            return (part for part in parts if part is not None)
        if self.started:
            raise ValueError(
                "data: found an iterator, which can be read only once, but another pass is needed; "
                "expected a list, Dataset or DataLoader, or a larger memory_limit"
            )
        self.started = True
        return map(self._prepared, self._read_on())

    def _read_on(self) -> Iterator[Batch]:
        yield self._unprepared()
        assert self._rest is not None
        yield from self._rest

    def _read(self) -> Iterator[Batch]:
        if self._repeats:
            for generator, state in self._random:
                generator.set_state(state)
        on_gpu = self._device.type == "cuda"
        parsed = self._ahead() if on_gpu else map(self._parse, self._source)
        return (batch for batch in parsed if samples_of(batch) != 0)

    def _ahead(self) -> Iterator[Batch]:
        """Batches, each copied to the GPU while the GPU computes on the batch before it."""
        copies, ready = torch.cuda.Stream(self._device), deque[tuple[Batch, torch.cuda.Event]]()

        def next_one() -> Batch:
            batch, copied = ready.popleft()
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            return batch.map(partial(_used_on, current))

        for batch in self._source:
            with torch.cuda.stream(copies):
                ready.append((self._parse(batch), copies.record_event()))
            if len(ready) > 1:
                yield next_one()
        if ready:
            yield next_one()

    def _parse(self, batch: object) -> Batch:
        if isinstance(batch, Mapping):
            return self._parse_entries({str(name): value for name, value in batch.items()})
        targets = None
        if isinstance(batch, (tuple, list)) and len(batch) > 1:
            *inputs, targets = batch
            if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):
                inputs = list(inputs[0])
        else:
            single = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(single, Tensor):
                raise TypeError(
                    f"data: found a batch of type {type(batch).__name__}, expected a tensor, "
                    "(inputs, targets) or a dict"
                )
            inputs = [single]
        padding = Padding(padding_of({}, self._mask, None)[0])
        args = tuple(self._move(value) for value in inputs)
        return Batch(args, {}, self._targets(targets), padding)

    def _parse_entries(self, entries: dict[str, Any]) -> Batch:
        """A batch that is a dict; keys that the model does not take name a mask only."""
        key = next((key for key in TARGET_KEYS if key in entries), None)
        targets = None if key is None else self._targets(entries[key])
        kwargs = {name: self._move(value) for name, value in entries.items() if name != key}
        samples = samples_of(Batch((), kwargs, None))
        mask, decoder = padding_of(kwargs, self._mask, samples)
        named = self._mask not in (None, AUTO)
        if named and self._mask in kwargs and not accepts(self._model, str(self._mask)):
            del kwargs[str(self._mask)]
        self._has_labels = key == LABELS
        if key is not None and targets is not None:
            made = inputs_of_labels(self._model, kwargs, key, targets)
            if is_encoder_decoder(self._model, kwargs | made) and self._mask is not None:
                decoder = _labelled(targets) if decoder is None else decoder
            kwargs |= made
        return Batch((), kwargs, targets, Padding(mask, decoder))

    def _targets(self, targets: Any) -> Any:
        """The targets on the model's device."""
        if targets is None:
            return None
        return tree_map(partial(self._move, cast=False), parsed(targets))

    def _prepared(self, batch: Batch) -> Batch:
        """The batch with the labels that the loss takes, and the layers that its masks are of."""
        padding, targets = batch.padding, batch.targets
        if padding.hides and is_encoder_decoder(self._model, batch.kwargs):
            if self._decoder_layers is None:
                self._decoder_layers = decoder_layers(self._model, batch)
            padding = replace(padding, decoder_layers=self._decoder_layers)
        if padding.hides:
            padding = replace(padding, time_first=time_first_layers(self._model))
        if isinstance(targets, Tensor) and self.ignored is not None:
            targets = visible(targets, padding.outputs, self.ignored)
            if self.shift:
                targets = shifted(targets, self.ignored)
        return replace(batch, targets=targets, padding=padding)

    def _move(self, value: Any, cast: bool = True) -> Any:
        if not isinstance(value, Tensor):
            if hasattr(value, "__array__"):
                value = tensor_of(value)
            else:
                return value
        if value.is_inference():  # autograd refuses it
            value = value.clone()
        self.on_gpu = self.on_gpu or value.is_cuda
        dtype = self._dtype if cast and value.is_floating_point() else None
        to_gpu = self._device.type == "cuda"
        is_strided = value.layout is torch.strided
        if to_gpu and is_strided and not value.is_cuda and not value.is_pinned():
            value = value.pin_memory()  # only copies from pinned memory run in the background
        return value.to(self._device, dtype, non_blocking=to_gpu)


def _used_on(stream: torch.cuda.Stream, value: Any) -> Any:
    """Keeps a tensor's memory until this stream has finished with it."""
    if isinstance(value, Tensor) and value.is_cuda:
        for held in held_tensors(value):
            held.record_stream(stream)
    return value


def _labelled(labels: Any) -> Tensor | None:
    """The positions (m, T) bool that have a label; None where labels are not of that form."""
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return None
    return labels != IGNORED
