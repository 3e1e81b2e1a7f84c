"""How many samples of a batch run at a time: so few that activations stay small.

On a CPU, the system gives a tensor of more than 32 MB fresh pages of memory, and takes them back
right after. A ResNet-50 takes 60 ms for an image in a batch of 32 and 37 ms in one of 8.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..runtime.progress import Bar
from .batch import Batch, samples_of
from .batches import Batches
from .forward import is_separate, leaves_of, run_model

ACTIVATION = 2**25  # the most bytes of an activation
FEW = 4  # samples that show how large activations are, and whether the samples are separate
ALL = 2**62  # samples: more than a batch has


class Parts:
    """Batches of a model's data, a few samples of one at a time.

    Batches stay whole on a GPU, where activations are small, and where the model combines samples.
    """

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self._batches, first = batches, batches.first()
        self._at_once = _at_once(model, first) if batches.device.type == "cpu" else ALL

    def first(self) -> Batch:
        return self._batches.first().split(self._at_once)[0]

    def all(self, bar: Bar) -> Iterator[Batch]:
        for batch in bar(self._batches, "activations"):
            yield from batch.split(self._at_once)


def _at_once(model: nn.Module, batch: Batch) -> int:
    """How many samples run at a time; ALL: all of a batch."""
    count = samples_of(batch) or 1
    if count == 1:
        return ALL
    try:
        few = batch.few(FEW)
        of_sample = _largest_activation(model, few) // (samples_of(few) or 1)
        at_once = max(1, ACTIVATION // max(1, of_sample))
        if at_once < count and is_separate(model, few):
            return at_once
    except (ValueError, RuntimeError):  # the model runs on no part of the batch
        pass
    return ALL


def _largest_activation(model: nn.Module, batch: Batch) -> int:
    """The bytes of the largest tensor that a module returns, other than the model's output."""
    returned = dict[tuple[int, ...], int]()  # bytes by shape

    def look(_: nn.Module, __: object, output: object) -> None:
        tensors = [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor)]
        returned.update({tuple(tensor.shape): tensor.nbytes for tensor in tensors})

    handles = [module.register_forward_hook(look) for module in model.modules()]
    try:
        outputs = run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for leaf in leaves_of(outputs):
        if isinstance(leaf, Tensor):
            returned.pop(tuple(leaf.shape), None)
    return max(returned.values(), default=0)
