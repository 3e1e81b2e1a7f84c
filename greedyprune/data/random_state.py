"""Random numbers: what the data draw from, left as training expects it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import DataLoader

from .batches import batches_in

SEED = 0  # of what the data draw in a pass


class Passes:
    """Data, every pass of which draws the same random numbers: shuffling, augmentation.

    Use it within `undisturbed`. TypeError for what is no data, for an iterator, and for a
    DataLoader whose passes share their workers with those of a training loop.
    """

    def __init__(self, data: object) -> None:
        if getattr(data, "persistent_workers", False):
            raise TypeError(
                "data: found a DataLoader with persistent_workers, where a second pass ends the "
                "one that training is in; expected a loader without"
            )
        self._source = batches_in(data)
        if isinstance(self._source, Iterator):
            raise TypeError(
                f"data: found an iterator ({type(data).__name__}), which can be gone through once; "
                "expected tensors, a list, Dataset or DataLoader"
            )
        self.generators = _generators(self._source)

    def __len__(self) -> int:
        return len(self._source)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[object]:
        random.seed(SEED)
        np.random.seed(SEED)
        for generator in (torch.default_generator, *self.generators):
            generator.manual_seed(SEED)
        if torch.cuda.is_initialized():  # else it would be seeded once it is
            torch.cuda.manual_seed_all(SEED)
        return iter(self._source)


def _generators(source: object) -> list[torch.Generator]:
    """Those that a DataLoader and its samplers draw from, beside the global one."""
    if not isinstance(source, DataLoader):
        return []
    within = getattr(source.batch_sampler, "sampler", None)
    holders = (source, source.sampler, source.batch_sampler, within)
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


@contextmanager
def undisturbed(generators: Iterable[torch.Generator]) -> Iterator[None]:
    """Afterwards torch's, Python's and NumPy's random numbers go on as before; `generators` too."""
    states = [(generator, generator.get_state()) for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in states:
            generator.set_state(state)
