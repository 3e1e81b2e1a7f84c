"""The random numbers that data draw: the same in every pass, and without an effect on training."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from .sources import batches_in, generators_of

SEED = 0  # of the random numbers in each pass


class RepeatedPasses:
    """Data in which every pass draws the same random numbers, for shuffling and augmentation.

    Each pass sets the seeds of the global generators of torch, Python and NumPy, and of those in
    `generators`. So use it within `preserving_random_state(generators)`.

    Attributes:
        generators: the generators that the data draw from, besides the global ones

    Raises:
        TypeError: for something that is not data; for an iterator; and for a DataLoader whose
            workers persist, since two passes of it at a time would share them
    """

    def __init__(self, data: object) -> None:
        if getattr(data, "persistent_workers", False):
            raise TypeError(
                "data: found a DataLoader with persistent_workers, in which a check's pass would "
                "end the pass that training is in; expected persistent_workers=False"
            )
        self._source = batches_in(data)
        if isinstance(self._source, Iterator):
            raise TypeError(
                f"data: found an iterator ({type(data).__name__}), which can be read only once; "
                "expected tensors, a list, Dataset or DataLoader"
            )
        self.generators = generators_of(self._source)

    def __len__(self) -> int:
        return len(self._source)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[object]:
        seed_all(self.generators)
        return iter(self._source)


def seed_all(generators: Iterable[torch.Generator] = ()) -> None:
    """Sets the seeds of the global generators of torch, Python and NumPy, and of `generators`."""
    random.seed(SEED)
    np.random.seed(SEED)
    for generator in (torch.default_generator, *generators):
        generator.manual_seed(SEED)
    if torch.cuda.is_initialized():  # otherwise torch would keep the seed for later
        torch.cuda.manual_seed_all(SEED)


@contextmanager
def preserving_random_state(generators: Iterable[torch.Generator]) -> Iterator[None]:
    """Restores the global random state of torch, Python and NumPy afterwards, and `generators`'."""
    states = [(generator, generator.get_state()) for generator in generators]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for generator, state in states:
            generator.set_state(state)
