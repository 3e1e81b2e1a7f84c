"""A copy of a model that is cut, run and made whole again, many times.

A new copy for each trial cut would take longer than the trial itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..graph.executor import tensors_of
from .copying import copied


class Spare:
    """One copy of a model, which `whole` gives back as it was when it was made.

    A cut changes modules' attributes and classes, and gives tensors other data. A forward may
    change attributes, collections that modules hold, and buffers. All of that is put back. Only
    what a forward changes deeper inside, as in a dict within a dict, stays changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = copied(model, checked=True)
        self._modules = [
            (module, type(module), dict(vars(module)), _collections_of(module))
            for module in self._model.modules()
        ]
        self._named = tensors_of(self._model)  # a tied one under each of its names
        self._data = {id(tensor): (tensor, tensor.data) for tensor in self._named.values()}
        self._buffers = {id(buffer) for buffer in self._model.buffers()}

    def whole(self, changed: set[str]) -> nn.Module:
        """The copy as it was made. What an earlier call returned is the same module.

        changed: names of the tensors that the caller writes to
        """
        for module, kind, attributes, collections in self._modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for collection, content in collections:
                _put_back(collection, content)
        written = self._buffers | {id(self._named[name]) for name in changed}
        for key, (tensor, data) in self._data.items():
            tensor.data = data.clone() if key in written else data
        return self._model


def _put_back(collection: Any, content: Any) -> None:
    """Gives a collection its content back, also where its class allows no changes."""
    if isinstance(collection, list):
        list.__setitem__(collection, slice(None), content)
    else:
        kind: Any = dict if isinstance(collection, dict) else set
        kind.clear(collection)
        kind.update(collection, content)


def _collections_of(module: nn.Module) -> list[tuple[Any, Any]]:
    """The collections that a module holds, each with its content."""
    return [
        (held, kind(held)) for held in vars(module).values()
        for kind in (dict, list, set) if isinstance(held, kind)
    ]  # fmt: skip
