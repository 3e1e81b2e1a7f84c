"""A copy of a model that is cut, run and restored, many times.

A new copy for each trial cut would take longer than the trial itself.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..data.forward import State
from ..graph.networks import tensors_of
from .copying import copied


class Spare:
    """One copy of a model, which `restored` gives back as it was when it was made.

    A cut changes modules' attributes and classes, and gives tensors other data. A forward may
    change attributes, collections that modules hold, and buffers. All of that is restored. Only
    what a forward changes deeper inside, as in a dict within a dict, stays changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = copied(model, checked=True)
        self._classes = [(module, type(module)) for module in self._model.modules()]
        self._named = tensors_of(self._model)  # a tied one under each of its names
        self._data = {id(tensor): (tensor, tensor.data) for tensor in self._named.values()}
        self._state = State(self._model)

    def restored(self, changed: Collection[str] | None) -> nn.Module:
        """The copy as it was made. What an earlier call returned is the same module.

        changed: names of the parameters that the caller writes to; None: it may write to all
        """
        names = self._named if changed is None else changed
        written = {id(self._named[name]) for name in names}
        for module, kind in self._classes:
            module.__class__ = kind
        for key, (tensor, data) in self._data.items():
            tensor.data = data.clone() if key in written else data
            tensor.grad = None
        self._state.restore()
        return self._model
