"""One batch of the data: the model's inputs, the targets, and which positions count."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..runtime.sparse import held_tensors, rows_at
from .padding import NO_PADDING, Padding
from .targets import part_of, samples_in

MARKED = 4096  # entries of a tensor that go into its batch's mark


@dataclass(frozen=True)
class Batch:
    """Positional and keyword inputs of the model, and the targets; None: the data have none.

    targets: a tensor, or lists and dicts of tensors for a user's own loss
    padding: which positions count
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    padding: Padding = NO_PADDING

    def take(self, samples: Tensor) -> Batch:
        """The samples with these indices (s,) int64."""
        count = samples_of(self)

        def chosen(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() and len(value) == count:
                return rows_at(value, samples)
            return value

        targets = self.targets
        if samples_in(targets) == count:
            targets = part_of(targets, samples)
        return replace(replace(self, targets=None).map(chosen), targets=targets)

    def few(self, count: int) -> Batch:
        """The first samples, as a copy without history; the batch itself if it has no more."""
        samples = samples_of(self)
        if samples is None or samples <= count:
            return self
        few = self.take(torch.arange(count))
        return few.map(lambda value: value.detach() if isinstance(value, Tensor) else value)

    def only(self, chosen: Tensor) -> Batch | None:
        """The samples that are chosen, (m,) bool; of a (1,) bool the whole batch. None: none is."""
        if len(chosen) != samples_of(self) or bool(chosen.all()):
            return self if bool(chosen[0]) else None
        return self.take(chosen.nonzero().flatten()) if bool(chosen.any()) else None

    def on(self, device: torch.device) -> Batch:
        """The batch with its tensors on this device."""
        return self.map(lambda value: value.to(device) if isinstance(value, Tensor) else value)

    def map(self, function: Callable[[Any], Any]) -> Batch:
        """The batch with function(value) in the place of every value."""
        kwargs = {name: function(value) for name, value in self.kwargs.items()}
        args = tuple(function(value) for value in self.args)
        targets = tree_map(function, self.targets)
        return Batch(args, kwargs, targets, self.padding.map(function))

    def to(self, dtype: torch.dtype) -> Batch:
        """The batch with its floating-point inputs in this dtype."""

        def cast(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        kwargs = {name: cast(value) for name, value in self.kwargs.items()}
        return replace(self, args=tuple(cast(value) for value in self.args), kwargs=kwargs)

    @property
    def mark(self) -> str:
        """A digest that the batch is recognised by: shapes, dtypes and a sample of its numbers."""
        digest = hashlib.blake2b(digest_size=8)

        def add(value: Any) -> Any:
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
                for held in held_tensors(value.detach()):
                    flat = held.reshape(-1)
                    stride = max(1, flat.numel() // MARKED)
                    sample = flat[::stride].cpu().clone(memory_format=torch.contiguous_format)
                    if sample.numel():
                        digest.update(sample.view(torch.uint8).numpy().data)
            else:
                digest.update(repr(type(value)).encode())
            return value

        self.map(add)
        return digest.hexdigest()

    def split(self, size: int) -> list[Batch]:
        """The batch in parts of about the same number of samples, at most `size`."""
        count = samples_of(self) or 1
        tensors = [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]
        has_samples = all(v.dim() and len(v) == count for v in tensors)
        if self.targets is not None:
            has_samples = has_samples and samples_in(self.targets) == count
        if count <= size or not has_samples:
            return [self]
        return [self.take(part) for part in torch.arange(count).tensor_split(-(-count // size))]


def samples_of(batch: Batch) -> int | None:
    for value in (*batch.args, *batch.kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    return None
